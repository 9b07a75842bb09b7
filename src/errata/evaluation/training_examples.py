"""Training examples from benchmark records, and the check that editors are not measured on their training facts."""

from __future__ import annotations

from collections.abc import Sequence, Set

from errata.base.errors import ConfigError
from errata.base.facts import fact_key
from errata.editors.hypernetworks.training_examples import TrainingExample
from errata.tasks.task import Case, Task


def training_examples(task: Task, records: Sequence[Case]) -> list[TrainingExample]:
    """A training example for each record, as its task says."""
    return [
        TrainingExample(record.rewrite, training.equivalents, training.others, task.relation(record))
        for record in records
        for training in [task.training(record)]
    ]


def require_unseen(name: str, trained_on: Set[str], task: Task, records: Sequence[Case]) -> None:
    """Check that an editor is not measured on facts that it was trained on.

    Two facts are the same if they have the same subject, in any letter case, and the same relation or the same prompt.

    Args:
        name: name of the editor.
        trained_on: `fact_key` of the facts that it was trained on.
        task, records: the task and records on which it is measured.

    Raises:
        ConfigError: if it was; the message names the first of these facts.
    """
    shared = [
        record.rewrite.text
        for record in records
        if any(fact_key(record.rewrite.subject, relation) in trained_on for relation in _relations(task, record))
    ]
    if shared:
        some = ", ".join(map(repr, shared[:3])) + (", …" if len(shared) > 3 else "")
        raise ConfigError(
            f"{name} was trained on {len(shared)} of the {len(records)} facts that it is to be measured on ({some}), "
            "and a fact that it was trained on is not a test: take other records, or allow it by --allow-seen"
        )


def _relations(task: Task, record: Case) -> list[str]:
    """The names that the record's relation may have in a trained editor."""
    return [*filter(None, [task.relation(record)]), record.rewrite.prompt]
