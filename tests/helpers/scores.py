"""Numbers of records from what a model says to their prompts, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from errata.evaluation.results import Result
from errata.metrics.summary import Estimate, Method
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.task import Probability, Scored, Task, estimates


def numbers_of(
    answers: Scored, task: Task = COUNTERFACT, probability: Probability = "per_token"
) -> dict[str, float | None]:
    """The numbers of one record that follow from its answers alone."""
    texts = {"ge", "rs", "essence"}
    found = task.numbers(Result(0, answers), probability)
    return {name: value for name, value in found.items() if name not in texts}


def summarise(scores: Sequence[Mapping[str, float | None]], method: Method = "normal") -> dict[str, Estimate]:
    """Means over records of CounterFact's numbers, and S."""
    numbers = {column.name: [each.get(column.name) for each in scores] for column in COUNTERFACT.columns}
    return estimates(COUNTERFACT.columns, numbers, method)
