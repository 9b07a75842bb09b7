"""Known facts, selected like the paper's 1,000: the model's greedy continuation names the object before other answers.

A continuation is searched for competing answers: the objects of all facts with the same relation, or with the same
prompt if a fact has no relation. The fact is known if its own object comes first. Of two answers at the same position
the longer counts, so that "New York" does not name "York". Answers match whole words, in scripts that separate words; a
run of white space counts as one space.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, FactError
from errata.data.fact_table import FactRow
from errata.models.generation import generate, prompt_ids
from errata.models.model import Model

# Thai to Khmer, kana, Han and Hangul: words follow each other, or their particles, without a space.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_LETTER = rf"[^\W{_UNSPACED}]"  # what a word goes on with


@dataclass(frozen=True)
class Knowledge:
    """A model's answer to one fact.

    Attributes:
        row: the fact.
        continuation: the model's continuation.
        named: the answer that it names first, as the table writes it; None if it names none.
        known: whether that is the fact's object.
    """

    row: FactRow
    continuation: str
    named: str | None
    known: bool


@without_autocast
def knows(
    model: Model,
    rows: Sequence[FactRow],
    *,
    max_new_tokens: int = 20,
    batch_size: int = 32,
    all_answers: bool = False,
    ignore_case: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Knowledge]:
    """A model's answer to each fact, in order. See `judge` for the settings; `progress` is called with (done, of).

    Raises:
        FactError: if a fact has no object, or the model cannot continue its text.
        ConfigError: if a number is out of range.
    """
    require_objects(rows)
    said: dict[int, str] = {}
    for index, continuation in continuations(
        model, [row.fact.text for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size
    ):
        said[index] = continuation
        if progress:
            progress(len(said), len(rows))
    return judge(rows, [said[i] for i in range(len(rows))], all_answers=all_answers, ignore_case=ignore_case)


def continuations(
    model: Model, texts: Sequence[str], *, max_new_tokens: int = 20, batch_size: int = 32
) -> Iterator[tuple[int, str]]:
    """(index, greedy continuation) of each text, as they are generated.

    Texts of one length in tokens go together, so that none is padded and none depends on what it is asked with.

    Raises:
        FactError: before any work, if a text has no tokens or leaves no room for one more.
        ConfigError: if a number is out of range.
    """
    if min(max_new_tokens, batch_size) < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}: both must be 1 or more")
    alike: dict[int, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        if reason := refusal(model, text):
            raise FactError(reason)
        alike[_tokens(model, text)].append(index)
    for _, group in sorted(alike.items()):
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            whole = generate(model, [texts[i] for i in batch], max_new_tokens, greedy=True)
            yield from ((i, text[len(texts[i]) :]) for i, text in zip(batch, whole, strict=True))


def refusal(model: Model, text: str) -> str | None:
    """Why a model cannot continue a text; None if it can."""
    tokens = _tokens(model, text)
    if 0 < tokens < model.max_length:
        return None
    shown = text if len(text) <= 40 else text[:39] + "…"
    return (
        f"the text {shown!r} has {tokens} tokens, and {model.name} goes on from 1 to "
        f"{model.max_length - 1}: write it otherwise"
    )


def judge(
    rows: Sequence[FactRow], said: Sequence[str], *, all_answers: bool = False, ignore_case: bool = False
) -> list[Knowledge]:
    """Whether each continuation names its fact's object before any other answer.

    Args:
        rows: all facts of a table: the objects of the others are the answers that compete.
        said: the continuation of each.
        all_answers: any object of the table competes, not only those of the same relation or prompt.
        ignore_case: capital letters and small ones are the same.

    Raises:
        FactError: if a fact has no object.
    """
    require_objects(rows)

    def plain(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFC", text).split())
        return text.casefold() if ignore_case else text

    def kind(row: FactRow) -> tuple[str, str]:
        if all_answers:
            return "", ""
        return ("relation", row.relation) if row.relation else ("prompt", row.fact.prompt)

    answers: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # in plain form, and as the table writes it
    for row in rows:
        answers[kind(row)].setdefault(plain(row.fact.object), row.fact.object)
    patterns = {each: _naming(answers[each]) for each in answers}
    judged = []
    for row, continuation in zip(rows, said, strict=True):
        match = patterns[kind(row)].search(plain(continuation))
        named = answers[kind(row)][match[0]] if match else None
        known = match is not None and match[0] == plain(row.fact.object)
        judged.append(Knowledge(row, continuation, row.fact.object if known else named, known))
    return judged


def require_objects(rows: Sequence[FactRow]) -> None:
    """Check that every fact has an object.

    Raises:
        FactError: if one has none; the message names its row.
    """
    for row in rows:
        if not row.fact.object:
            raise FactError(f"the fact {row.name} ({row.fact.text!r}) has no object, so no model can be asked for it")


def _naming(answers: dict[str, str]) -> re.Pattern[str]:
    """Finds the first answer of a text, the longest where several begin at one place."""
    longest_first = sorted(answers, key=len, reverse=True)
    return re.compile(rf"(?<!{_LETTER})(?:{'|'.join(map(re.escape, longest_first))})(?!{_LETTER})")


def _tokens(model: Model, text: str) -> int:
    return len(prompt_ids(model, text))
