"""Where the subject stands: every known trap by example, and a property over every kind of tokenizer."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from errata.base.errors import ConfigError, FactError, UnsupportedModel
from errata.base.facts import Fact
from errata.models.tokens import Span, check_length, locate, locate_fact
from helpers.budget import examples
from tokenizers_zoo import UNITS, byte_fallback, byte_level, gpt2_tokenizer, unigram, word_piece

ZOO = {
    "gpt2": gpt2_tokenizer,
    "gpt2-trimmed-prefixed": lambda: gpt2_tokenizer(trim=True, prefix=True),
    "byte-level": byte_level,
    "unigram": unigram,
    "unigram-stripping": lambda: unigram(strip_accents=True),
    "byte-fallback": byte_fallback,
    "word-piece": word_piece,
}


def place(tokenizer, prompt: str, subject: str) -> Span:
    return locate(tokenizer, prompt.replace("{}", subject), prompt.index("{}"), subject)


def vocabulary(tokenizer, span: Span) -> list[str]:
    """The subject's tokens as the vocabulary spells them."""
    return tokenizer.convert_ids_to_tokens(list(span.ids[span.first : span.last + 1]))


# ---------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize(
    ("prompt", "subject", "first", "expected"),
    [
        pytest.param("{} is in", "The Space Needle", 0, "The ĠSpace ĠNeed le", id="at the start"),
        pytest.param("Go to {}", "The Space Needle", 2, "ĠThe ĠSpace ĠNeed le", id="at the end"),
        pytest.param('He said "{}" is', "Space Needle", 3, "Space ĠNeed le", id="in quotes"),
        pytest.param("“{}” is", "Space Needle", 2, "Space ĠNeed le", id="in curly quotes of two tokens"),
        pytest.param("'{}'s wife", "O'Brien", 1, "O ' Brien", id="apostrophes"),
        pytest.param("{}'s wife", "Charles'", 0, "Charles ''", id="ends inside two apostrophes"),
        pytest.param("in {} is", "東京", 1, "Ġæ Ŀ ± äº ¬", id="CJK: characters split into bytes"),
        pytest.param("{}は", "東京", 0, "æĿ ± äº ¬", id="CJK at the start"),
        pytest.param("See {} now", "🗼", 1, "ĠðŁ Ĺ ¼", id="emoji"),
        pytest.param("See {}", "👍🏽", 1, "ĠðŁĳ į ðŁ ı ½", id="emoji with skin tone, at the end"),
        pytest.param("{} x", "👩\u200d🔬", 0, "ðŁĳ © âĢ į ðŁ Ķ ¬", id="joined emoji"),
        pytest.param("The {} is", "Cafe\u0301", 1, "ĠCafe Ì ģ", id="combining accent at the end"),
        pytest.param("It  {}  is", "New  York", 2, "ĠNew Ġ ĠYork", id="double spaces"),
        pytest.param("The {} is", " Paris ", 2, "ĠParis", id="white space around the subject"),
        pytest.param("The\n{}\nis", "\tParis\u3000", 3, "Paris", id="other white space around it"),
        pytest.param("{}ers are", "New York", 0, "New ĠYorkers", id="ends inside a token"),
        pytest.param("{}ly is", "Need", 0, "Need", id="ends at a token, inside a word"),
        pytest.param("un{}ed", "expect", 1, "expected", id="ends inside, begins at a token"),
        pytest.param("In Man{} is", "hattan", 1, "ĠManhattan", id="begins inside a token"),
        pytest.param("New York is not {} at", "New York", 4, "ĠNew ĠYork", id="occurs twice"),
        pytest.param("{} is a", "A", 0, "A", id="one letter"),
        pytest.param("the <|endoftext|>{} is", "Needle", 3, "Need le", id="after a special token"),
        pytest.param("the {} is", "a<|endoftext|>", 1, "Ġa <|endoftext|>", id="contains a special token"),
    ],
)
def test_gpt2(prompt, subject, first, expected):
    tokenizer = gpt2_tokenizer()
    span = place(tokenizer, prompt, subject)
    assert vocabulary(tokenizer, span) == expected.split(" ")
    assert span.first == first
    assert list(span.ids) == tokenizer(prompt.replace("{}", subject))["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        pytest.param("{} is", "The Needle", ["ĠThe", "ĠNeed", "le"], id="the prefix space is in a token"),
        pytest.param("{} is", "𠮷", ["ð", "ł", "®", "·"], id="the prefix space is a token of its own"),
        pytest.param("a  {}  is", "New  York", ["ĠNew", "Ġ", "ĠYork"], id="double spaces"),
        pytest.param("{} is", "A", ["ĠA"], id="one letter"),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_space_before_the_text(prompt, subject, expected, trim):
    tokenizer = gpt2_tokenizer(trim=trim, prefix=True)
    assert vocabulary(tokenizer, place(tokenizer, prompt, subject)) == expected


@pytest.mark.parametrize("letter", ["A", "é"])
def test_offsets_trimmed_by_a_space_that_was_not_there(letter):
    """The post-processor takes the inserted space for one of the text: the first letter is left no width."""
    tokenizer = gpt2_tokenizer(trim=True, prefix=True, post_prefix=False)
    assert tokenizer(letter, return_offsets_mapping=True)["offset_mapping"] == [(1, 1)]
    span = place(tokenizer, "{} cat is", letter)
    assert (span.first, span.last, span.offsets[0]) == (0, 0, (0, 1))
    assert place(tokenizer, "{} is", f"{letter} cat").first == 0


def test_a_trimmed_space_after_a_composed_accent_is_not_the_accent():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer(trim=True).backend_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    span = place(tokenizer, "The {}  is", "Cafe\u0301")
    assert vocabulary(tokenizer, span) == ["ĠCafÃ©"]
    assert span.tokens == ("The", "Cafe", " ", "is")


@pytest.mark.parametrize(
    ("make", "prompt", "subject", "before", "expected", "after"),
    [
        # byte-level BPE with a start token and trimmed offsets
        (byte_level, "{} is", "The Space", ["<|endoftext|>"], ["The", "Space"], ["is"]),
        (byte_level, "a “{}”", "Needle", ["<|endoftext|>", "a", "“"], ["Needle"], ["”[1/2]", "”[2/2]"]),
        (byte_level, "The {} is", "東京", ["<|endoftext|>", "The"], ["東京"], ["is"]),
        (byte_level, "{}  is", " Needle ", ["<|endoftext|>"], ["Needle"], ["  ", "is"]),
        # unigram: a start token, ▁ in front, NFKC, spaces joined
        (unigram, "{} is", "The Space", ["<s>"], ["The", " Space"], [" is"]),
        (unigram, "{} is", "A", ["<s>", " "], ["A"], [" is"]),
        (unigram, "The {} is", "🗼", ["<s>", "The"], [" 🗼"], [" is"]),
        (unigram, "The {} is", "ﬁ", ["<s>", "The"], [" ﬁ"], [" is"]),
        (unigram, "The  {}  is", "New  York", ["<s>", "The"], [" Ne", "w", " York"], [" is"]),
        (unigram, "is {} is", "Space e\u0301", ["<s>", "is"], [" Space", " e"], [" is"]),
        # the same with accents stripped and lower case
        (lambda: unigram(strip_accents=True), "is {} is", "İ", ["<s>", "is"], [" İ"], [" is"]),
        # byte fallback: a character that is not in the vocabulary is all of its bytes
        (byte_fallback, "{} is", "The Space", ["<s>"], ["The", " Space"], [" is"]),
        (byte_fallback, "{} is", "東", ["<s>", " "], ["東[1/3]", "東[2/3]", "東[3/3]"], [" is"]),
        (byte_fallback, "is {}", "é", ["<s>", "is", " "], ["é[1/2]", "é[2/2]"], []),
        # word pieces: white space dropped, [CLS] and [SEP] around, lower case, no accents
        (word_piece, "{} is", "The Space", ["[CLS]"], ["The", "Space"], ["is", "[SEP]"]),
        (word_piece, "The {}", "Space  Needle", ["[CLS]", "The"], ["Space", "Needle"], ["[SEP]"]),
        (word_piece, "is {}é is", "Ca", ["[CLS]", "is"], ["C", "a"], ["é", "is", "[SEP]"]),
        (word_piece, "in {} is", "東京", ["[CLS]", "in"], ["東", "京"], ["is", "[SEP]"]),
        (word_piece, "is “{}'s” is", "e\u0301", ["[CLS]", "is", "“"], ["e"], ["'", "s", "”", "is", "[SEP]"]),
    ],
)
def test_trained(make, prompt, subject, before, expected, after):
    span = place(make(), prompt, subject)
    assert span.tokens == (*before, *expected, *after)
    assert (span.first, span.last) == (len(before), len(before) + len(expected) - 1)


def test_expansions_take_every_token_of_the_character():
    """½ becomes 1, ⁄, 2 and İ becomes i and a dot: all tokens have the same offsets, the last one counts."""
    vocab = [("<unk>", 0.0), *((character, -5.0) for character in "▁1⁄2ix\u0307")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert vocabulary(tokenizer, place(tokenizer, "{}x", "½")) == ["1", "⁄", "2"]
    assert vocabulary(tokenizer, place(tokenizer, "x{} x", "İ")) == ["i", "\u0307"]
    assert place(tokenizer, "x{}", "½").tokens == (" ", "x", "½[1/3]", "½[2/3]", "½[3/3]")


def test_unknown_tokens_count():
    tokenizer = unigram()
    span = place(tokenizer, "The {} is", "\U00012000\U00012001")  # cuneiform, fused into one unknown token
    assert vocabulary(tokenizer, span)[-1] == "<unk>"
    assert span.tokens[span.last].strip() == "\U00012000\U00012001"


def test_added_tokens():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer().backend_tokenizer)  # a copy
    tokenizer.add_tokens(["Needle", AddedToken("Tower", lstrip=True, rstrip=True)])
    assert vocabulary(tokenizer, place(tokenizer, "The {} is", "Space Needle")) == ["ĠSpace", "Ġ", "Needle"]
    span = place(tokenizer, "The {}  is", "Eiffel Tower")
    assert vocabulary(tokenizer, span) == ["ĠE", "iff", "el", "Tower"]
    assert span.tokens[span.after] == "is"


def test_slot_decides_between_two_subjects():
    tokenizer = gpt2_tokenizer()
    assert locate_fact(tokenizer, Fact("Rome", "{} is Rome, and Rome")).first == 0
    assert locate_fact(tokenizer, Fact("Rome", "Rome is Rome, and {}")).first == 6
    assert locate_fact(tokenizer, Fact("an", "an ananan {}")).role("subject_first") == 3


def test_truncation_and_padding_of_the_tokenizer_do_not_matter():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(word_piece().backend_tokenizer.to_str()), pad_token="[UNK]"
    )
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert place(tokenizer, "the the the the {} is", "Needle") == place(word_piece(), "the the the the {} is", "Needle")


# ---------------------------------------------------------------------------------------------
# Roles, lengths, readable tokens


def test_roles():
    span = place(gpt2_tokenizer(), "The {} is in", "Space Needle")
    roles = ("subject_first", "subject_last", "after_subject", "last")
    assert [span.role(role) for role in roles] == [1, 3, 4, 5]
    assert span.role() == span.last == 3
    assert span.after == 4


@pytest.mark.parametrize("make", [gpt2_tokenizer, word_piece])
def test_no_token_after_the_subject(make):
    """[SEP] is not a token of the prompt; the last token is the one that the model predicts from."""
    span = place(make(), "The {}", "Needle")
    with pytest.raises(FactError, match="subject ends the prompt"):
        span.role("after_subject")
    assert span.role("last") == len(span.ids) - 1


def test_trimmed_white_space_is_a_token_after_the_subject():
    assert place(gpt2_tokenizer(trim=True), "The {} ", "Needle").role("after_subject") == 3


def test_unknown_role():
    span = place(gpt2_tokenizer(), "The {} is", "Needle")
    with pytest.raises(ConfigError, match=r"'subject_middle'.*after_subject"):
        span.role("subject_middle")  # type: ignore[arg-type]


def test_length():
    span = place(gpt2_tokenizer(), "The {} is in", "Space Needle")
    check_length(span, 6)
    with pytest.raises(FactError, match=r"6 tokens .* at most 4.* by 2 tokens"):
        check_length(span, 4)


def test_a_long_prompt_is_located_without_a_warning(caplog):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer().backend_tokenizer, model_max_length=8)
    assert place(tokenizer, "so " * 20 + "{} is", "Needle").first == 20
    assert not caplog.records


def test_readable_tokens():
    span = place(gpt2_tokenizer(), "the {} <|endoftext|>", "é東  x")
    assert span.tokens == ("the", " é", "東[1/2]", "東[2/2]", " ", " x", " ", "<|endoftext|>")
    span = place(gpt2_tokenizer(trim=True, prefix=True), "{}  is", "𠮷x")
    assert span.tokens == (" ", "𠮷[1/4]", "𠮷[2/4]", "𠮷[3/4]", "𠮷[4/4]", "x", " ", "is")


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(("start", "subject"), [(5, "Rome"), (-4, "Rom"), (40, "R"), (4, "rome"), (4, "")])
def test_subject_is_not_there(start, subject):
    with pytest.raises(FactError, match="does not stand at character"):
        locate(gpt2_tokenizer(), "The Rome of Rome", start, subject)


@pytest.mark.parametrize(
    ("make", "subject"),
    [
        (word_piece, "\u200d"),
        (lambda: unigram(strip_accents=True), "\u0301"),
        (gpt2_tokenizer, " "),
        (word_piece, " \t"),
    ],
)
def test_subject_that_the_tokenizer_drops(make, subject):
    with pytest.raises(FactError, match=re.escape(f"no token stands for the subject {subject!r}")):
        place(make(), "The {} is", subject)


def test_half_a_character():
    with pytest.raises(FactError, match="lone surrogate"):
        place(gpt2_tokenizer(), "The {} is", "a\ud83d")


def test_slow_tokenizer():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UnsupportedModel, match="SlowTokenizer"):
        place(SlowTokenizer(), "The {} is", "Needle")


# ---------------------------------------------------------------------------------------------
# Properties

PROMPTS = (
    *("{} is in", "The {} is", "Go to {}", "{}", '"{}" is', "“{}”, they say", "'{}'s", "{}'s", "{}s"),
    *("un{}ly", "It  {}  is", "東京{}は", "🗼{}🗼", "The\n{}\n", "(New York) {} New York", "x-{}-x", "½{}½"),
)
MANY = settings(
    max_examples=examples(2000),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
known = st.lists(st.sampled_from(UNITS), min_size=1, max_size=5).map("".join).filter(str.strip)
anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)


def bare(tokenizer, text: str) -> str:
    """The text as the tokenizer sees it, without white space and the marks of a word's inside."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    return re.sub(r"\s|##|▁", "", text)


def check_ends(tokenizer, text: str, start: int, subject: str, span: Span) -> None:
    """The ends overlap the subject, and the characters that tokens cover are covered between them."""
    stop = start + len(subject)
    for index in (span.first, span.last):
        begin, end = span.offsets[index]
        assert text[max(begin, start) : min(end, stop)].strip()
    encoding = tokenizer(text)
    covering = {encoding.char_to_token(place) for place in range(start, stop) if text[place].strip()} - {None}
    for index in covering - set(range(span.first, span.last + 1)):
        assert index < span.first, "a character of the subject stands after its last token"
        assert not tokenizer.decode([span.ids[index]]).strip(), "only a space may claim a character falsely"
        assert span.offsets[index + 1][0] <= span.offsets[index][0]
    later = span.offsets[span.after :]
    assert not any(text[max(begin, start) : min(end, stop)].strip() for begin, end in later)
    assert all(0 <= begin <= end <= len(text) for begin, end in span.offsets)
    assert len(span.ids) == len(span.offsets) == len(span.tokens)


@pytest.mark.parametrize("name", ZOO)
@MANY
@given(prompt=st.sampled_from(PROMPTS), subject=known)
def test_the_span_spells_the_subject(name, prompt, subject):
    tokenizer = ZOO[name]()
    text, start = prompt.replace("{}", subject), prompt.index("{}")
    span = locate(tokenizer, text, start, subject)
    check_ends(tokenizer, text, start, subject, span)
    inside = list(span.ids[span.first : span.last + 1])
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in inside
    assert bare(tokenizer, subject) in bare(tokenizer, tokenizer.decode(inside))


@pytest.mark.parametrize("name", ZOO)
@settings(MANY, max_examples=examples(500))
@given(prompt=st.sampled_from(PROMPTS), subject=anything)
def test_the_ends_overlap_any_subject(name, prompt, subject):
    tokenizer = ZOO[name]()
    text, start = prompt.replace("{}", subject), prompt.index("{}")
    try:
        span = locate(tokenizer, text, start, subject)
    except FactError:
        kept = unicodedata.normalize("NFKD", subject)
        assert not any(unicodedata.category(character)[0] in "LNPS" for character in kept)
    else:
        check_ends(tokenizer, text, start, subject, span)
