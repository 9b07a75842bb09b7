"""Lessons for editors that are trained, made of benchmark records, which editors themselves never see."""

from __future__ import annotations

from collections.abc import Sequence, Set

from errata.base.errors import ConfigError
from errata.base.facts import fact_key
from errata.editors.hypernetworks.lessons import Lesson
from errata.tasks.task import Case, Task


def lessons(task: Task, records: Sequence[Case]) -> list[Lesson]:
    """A lesson for each record, as its task says."""
    return [
        Lesson(record.rewrite, training.equivalents, training.others, task.relation(record))
        for record in records
        for training in [task.training(record)]
    ]


def require_unseen(name: str, seen: Set[str], task: Task, records: Sequence[Case]) -> None:
    """Make sure that an editor has not learnt from facts that it is measured on.

    A fact is one subject, in any letter case, and one relation, or else one prompt.

    Args:
        name: the editor's.
        seen: `fact_key` of what it has learnt from.
        task, records: what it is measured on.

    Raises:
        ConfigError: if it has; the first are named.
    """
    shared = [
        record.rewrite.text
        for record in records
        if any(fact_key(record.rewrite.subject, relation) in seen for relation in _relations(task, record))
    ]
    if shared:
        some = ", ".join(map(repr, shared[:3])) + (", …" if len(shared) > 3 else "")
        raise ConfigError(
            f"{name} has learnt from {len(shared)} of the {len(records)} facts that it is to be measured on ({some}), "
            "and what it has seen is not a test: take other records, or allow it by --allow-seen"
        )


def _relations(task: Task, record: Case) -> list[str]:
    """The names that the record's relation may have in a trained editor."""
    return [*filter(None, [task.relation(record)]), record.rewrite.prompt]
