"""Joining pieces of text: a prompt and its completion, a sentence and the prompt after it.

A space stands between words only in scripts that separate words by spaces. Whether one belongs between two pieces is
read off the text before the join: its script, and what it ends in.

| text before | space | example |
|---|---|---|
| ends in a letter, mark or digit of a script with spaces | yes | `The capital of France is` + `Paris` |
| the same in a script without them | no | `法国的首都是` + `巴黎`, `ประเทศไทยมีเมืองหลวงคือ` + `กรุงเทพ` |
| ends in a comma, colon, question mark, closing bracket or quote | as after a letter | `Answer:` + `Paris` |
| ends in an opening bracket or quote, an elision, `_`, `@`, `#` or `\\` | no | `He said "`, `la capitale de l'` |
| ends in a dash, `=`, `/`, `>` or another such sign | if one stands before the sign | `x =` + `5`, `x=` + `5` |
| ends in white space, or is empty | no | `Answer:\\n` + `Paris` |

A text that itself begins with white space or with closing punctuation gets no space either.
"""

from __future__ import annotations

import unicodedata

import regex

# Letters, marks and signs of scripts that run words together: those whose lines are broken by a dictionary (Thai, Lao,
# Khmer, Burmese and their kin), ideographs, kana; and a few that Unicode's line breaking does not set apart.
_UNSPACED = (
    r"\p{Line_Break=SA}\p{Ideographic}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Bopomofo}"
    r"\p{Script=Tibetan}\p{Script=Javanese}\p{Script=Balinese}"
)
_OF_UNSPACED = regex.compile(rf"[{_UNSPACED}]")
_WITH_SCRIPT = regex.compile(r"[^\p{Script=Common}\p{Script=Inherited}]")
_LAST_WITH_SCRIPT = regex.compile(r"(?r)[^\p{Script=Common}\p{Script=Inherited}]")

_APOSTROPHES = "'\u2019"
_OPENING = regex.compile(r"[\p{Ps}\p{Pc}¿¡@\\^]\Z|(?<!\w)#\Z|(?<!\p{Sm})<\Z")
_QUOTES = regex.compile(r"(?r)[\"'`*\p{Pi}\p{Pf}]+\Z")
_SIGNS = regex.compile(r"(?r)[\p{Pd}\p{Sm}/&|]+\Z")
_NUMBER_SIGN = regex.compile(r"(?<!\d\s*)[-−+±~≈]\Z")
_CURRENCY = regex.compile(r"(?<!\d\s?)\p{Sc}\Z")
_OPENS_BEFORE = regex.compile(r"[\s\p{Ps}\p{Pd}\p{Sm}/]\Z")
_OPENED = regex.compile(r"(?:^|[\s\p{Ps}])['\u2018]")
_WORD = regex.compile(r"(?r)[\p{L}\p{M}]+\Z")
_CLOSING = regex.compile(r"[\p{Pe}\p{Pf},;:!?%]|\.(?![\p{L}\p{N}])|'s\b")

# Ends of sentences, by script, where they are not a full stop and a space.
_STOPS = {
    r"\p{Ideographic}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Bopomofo}": "。",
    r"\p{Script=Khmer}": "។",
    r"\p{Script=Myanmar}": "။",
    r"\p{Script=Tibetan}": "།",
    r"\p{Script=Thai}\p{Script=Lao}": " ",
    r"\p{Script=Devanagari}": "। ",
    r"\p{Script=Bengali}": "। ",
    r"\p{Script=Ethiopic}": "። ",
    r"\p{Script=Armenian}": "։ ",
}
_STOP_OF = tuple((regex.compile(f"[{scripts}]"), stop) for scripts, stop in _STOPS.items())
_FULL_STOP = ". "

# Where an answer ends: not at a point or comma within a number, nor at the point of "St." or "U.S.".
_PHRASE_END = regex.compile(
    r"[\r\n]|(?<!\b\p{Lu}\p{L}?)\.(?![\p{L}\p{N}])|,(?!\p{N})|[\p{STerm}--.]|[;:!?()\[\]\"“”„«»」』、，；：]", regex.V1
)


def separator(before: str, after: str) -> str:
    """The space that a writer puts between two pieces of text, or ""."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    if _CLOSING.match(after) or _opens(before, after):
        return ""
    return "" if runs_on(before) else " "


def joined(before: str, after: str, between: str | None = None) -> str:
    """Two pieces of text as one.

    Args:
        before, after: the pieces; an `after` that begins with white space is taken as it is.
        between: the text to put between them; None: `separator` decides.
    """
    if between is None or after[:1].isspace():
        between = separator(before, after)
    return before + between + after


def plain(before: str, after: str, between: str | None = None) -> str:
    """A text without its leading white space, if `joined` would insert the same white space.

    After a character that may end a chat marker the white space is kept: the tokenizer decides there.
    """
    word = after.lstrip()
    space = after[: len(after) - len(word)]
    if not space or not before or unicodedata.category(before[-1]) in ("Pe", "Sm"):
        return after
    return word if space == (separator(before, word) if between is None else between) else after


def runs_on(text: str) -> bool:
    """Whether the script at the end of a text writes no spaces between words."""
    if not text:
        return False
    last = text[-1]
    if unicodedata.category(last)[0] == "P" and unicodedata.east_asian_width(last) in "WF":
        return True  # full-width punctuation brings its own space
    found = _LAST_WITH_SCRIPT.search(text)
    return found is not None and _OF_UNSPACED.match(found[0]) is not None


def ended(text: str) -> str:
    """A text with its script's full stop appended, and a space if that script puts one after a sentence."""
    found = _LAST_WITH_SCRIPT.search(text)
    return text + (_stop(found[0]) if found else _FULL_STOP)


def after_sentence(sentence: str, text: str) -> str:
    """A sentence, which may be "", and a text, joined.

    If the text is in a script without spaces, a full stop and space at the sentence's end are replaced by that script's
    full stop: a space there would change the tokens of the text's first word.
    """
    first = _WITH_SCRIPT.search(text)
    if sentence and first and _OF_UNSPACED.match(first[0]):
        if sentence.endswith(_FULL_STOP):
            sentence = sentence.removesuffix(_FULL_STOP) + (_stop(first[0]).strip() or _FULL_STOP.strip())
        return sentence + text
    return joined(sentence, text)


def phrase(text: str) -> str:
    """The first phrase of a text: up to the end of the line, or to punctuation that is not part of a number or name.

    White space around it and an opening quote are dropped.
    """
    text = text.lstrip("\"'“„«「『 \t\r\n")
    found = _PHRASE_END.search(text)
    return (text[: found.start()] if found else text).strip()


def moved_spaces(text: str) -> tuple[str, str]:
    """A text without its trailing spaces, and those spaces. Tokenizers read a space with the word that follows."""
    kept = text.rstrip(" ") or text
    return kept, text[len(kept) :]


def _stop(letter: str) -> str:
    return next((stop for of, stop in _STOP_OF if of.match(letter)), _FULL_STOP)


def _opens(before: str, after: str) -> bool:
    """Whether no space may follow a text, because it ends in an opening bracket, a hyphen or the like."""
    if _OPENING.search(before) or _CURRENCY.search(before):
        return True
    if quotes := _QUOTES.search(before):
        return _quote_opens(before[: quotes.start()], quotes[0], after)
    if signs := _SIGNS.search(before):
        rest = before[: signs.start()]
        if rest and not rest[-1].isspace():
            return True
        return after[0].isdigit() and _NUMBER_SIGN.search(before) is not None
    return False


def _quote_opens(rest: str, quotes: str, after: str) -> bool:
    """Whether quotes after `rest` are opening ones, or an apostrophe that belongs to the next word."""
    if quotes == "»" and rest.rfind("«") > rest.rfind("»"):
        return False
    if not rest or _OPENS_BEFORE.search(rest):
        return True
    if quotes == "*" and rest[-1].isdigit():
        return after[0].isdigit()  # a product
    if not rest[-1].isalnum():
        return quotes[0] in "\"'`*" and rest.count(quotes[0]) % 2 == 0
    if quotes not in _APOSTROPHES or not rest[-1].isalpha():
        return False
    word = _WORD.search(rest)
    assert word is not None  # it ends in a letter
    return not _OPENED.search(rest[: word.start()]) and not (len(word[0]) > 1 and word[0][-1] in "sS")
