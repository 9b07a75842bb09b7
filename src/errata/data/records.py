"""Records: a rewrite, and the prompts that test whether the edit worked and what else changed."""

from __future__ import annotations

from dataclasses import dataclass

from errata.base.facts import Rewrite


@dataclass(frozen=True)
class Record:
    """One record of CounterFact. All prompts are complete texts up to the object.

    Attributes:
        case_id: its number in its set.
        relation: name of the relation.
        rewrite: the fact and its new object; its prompt is the rewrite prompt.
        paraphrase: the same fact in other words.
        neighborhood: other subjects with the same relation and the old object; they should not move.
        attribute: subjects that have the new object anyway.
        generation: openings that call the fact up indirectly, for free text.
        object_ids: what the set calls the old and the new object, such as Wikidata's "Q5083"; "" where it does not.
    """

    case_id: int
    relation: str
    rewrite: Rewrite
    paraphrase: tuple[str, ...]
    neighborhood: tuple[str, ...]
    attribute: tuple[str, ...]
    generation: tuple[str, ...]
    object_ids: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class QuestionRecord:
    """A question, its new answer, and questions about other facts, as in zsRE and WikiBigEdit.

    Attributes:
        case_id: its number in its set.
        rewrite: the question, with `{}` for the subject, and the answer to be; the old object is "".
        paraphrase: the same question in other words, whole texts.
        locality: questions of other facts, whole texts, each with its answer; they should not move.
    """

    case_id: int
    rewrite: Rewrite
    paraphrase: tuple[str, ...]
    locality: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ZsreRecord(QuestionRecord):
    """A record of zsRE."""


@dataclass(frozen=True)
class WikiBigEditRecord(QuestionRecord):
    """A record of WikiBigEdit."""
