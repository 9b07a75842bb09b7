"""Lessons for editors that are trained, made of benchmark records, which editors themselves never see."""

from __future__ import annotations

from collections.abc import Sequence, Set

from errata.base.errors import ConfigError
from errata.base.facts import fact_key
from errata.benchmarks.records import Record
from errata.editors.hypernetworks.lessons import Lesson
from errata.evaluation.results import AnyRecord


def lessons(records: Sequence[AnyRecord]) -> list[Lesson]:
    """A lesson a record.

    Of CounterFact: the new object is to be said after the rewrite prompt and the paraphrases, and what is said after
    neighbourhood prompts is to stay. Of zsRE: after the question and its rephrasings; other questions are to stay.
    """
    found = []
    for record in records:
        rewrite = record.rewrite
        equivalents = (rewrite.text, *record.paraphrase)
        if isinstance(record, Record):
            others = tuple((prompt, rewrite.fact.object) for prompt in record.neighborhood)
            found.append(Lesson(rewrite, equivalents, others, record.relation))
        else:
            found.append(Lesson(rewrite, equivalents, record.locality))
    return found


def require_unseen(name: str, seen: Set[str], records: Sequence[AnyRecord]) -> None:
    """Make sure that an editor has not learnt from facts that it is measured on.

    A fact is one subject, in any letter case, and one relation, or else one prompt.

    Args:
        name: the editor's.
        seen: `fact_key` of what it has learnt from.
        records: what it is measured on.

    Raises:
        ConfigError: if it has; the first are named.
    """
    shared = [
        record.rewrite.text
        for record in records
        if any(fact_key(record.rewrite.subject, relation) in seen for relation in _relations(record))
    ]
    if shared:
        some = ", ".join(map(repr, shared[:3])) + (", …" if len(shared) > 3 else "")
        raise ConfigError(
            f"{name} has learnt from {len(shared)} of the {len(records)} facts that it is to be measured on ({some}), "
            "and what it has seen is no test: take other records, or allow it by --allow-seen"
        )


def _relations(record: AnyRecord) -> list[str]:
    """What the record's relation may be called."""
    named = [record.relation] if isinstance(record, Record) and record.relation else []
    return [*named, record.rewrite.prompt]
