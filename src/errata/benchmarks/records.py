"""A record of CounterFact: a rewrite, and the prompts that show what else moved."""

from __future__ import annotations

from dataclasses import dataclass

from errata.base.facts import Rewrite


@dataclass(frozen=True)
class Record:
    """One case. All prompts are whole texts up to the object.

    Attributes:
        case_id: its number in its set.
        relation: name of the relation.
        rewrite: the fact and its new object; its prompt is the rewrite prompt.
        paraphrase: the same fact in other words.
        neighborhood: other subjects with the same relation and the old object; they should not move.
        attribute: subjects that have the new object anyway.
        generation: openings that call the fact up indirectly, for free text.
    """

    case_id: int
    relation: str
    rewrite: Rewrite
    paraphrase: tuple[str, ...]
    neighborhood: tuple[str, ...]
    attribute: tuple[str, ...]
    generation: tuple[str, ...]
