"""Scores of a run's rows as lines along one setting of an editor, such as the layer (Figures 5, 17 and 18)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from errata.base.errors import ConfigError
from errata.evaluation.results import Results, Run
from errata.metrics.summary import Estimate
from errata.plots.drawing import save
from errata.plots.setting_scores import settings_figure
from errata.tasks.task import Probability, Task, estimates

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SettingScores:
    """The main numbers of a task along one setting: for CounterFact ES, PS, NS and S.

    Attributes:
        model: name of the model.
        along: the setting.
        at: its values, ascending.
        lines: names of what is compared: editors, and those of their other settings that differ.
        metrics: names of the numbers; the last one is the score that the others make up, if the task has one.
        scores: scores of each metric, by line and value; metrics that no row has are left out.
        unedited: score of the unedited model for each metric.
        records: how many records the run has.
        failures: edits that could not be made, by line and value.
    """

    model: str
    along: str
    at: tuple[float, ...]
    lines: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: Mapping[str, Mapping[tuple[str, float], Estimate]]
    unedited: Mapping[str, Estimate]
    records: int
    failures: Mapping[tuple[str, float], int]

    @classmethod
    def of(cls, run: Run, along: str, probability: Probability = "per_token") -> SettingScores:
        """The scores of the rows whose editors have a number for the setting.

        Raises:
            ConfigError: if no row has it, or two rows are the same but for their names.
        """
        rows = {name: results for name, results in run.edited.items() if _number(_config(results).get(along))}
        if not rows:
            there = sorted({key for each in run.edited.values() for key, v in _config(each).items() if _number(v)})
            advice = f"choose from {', '.join(there)}" if there else "it has no row with a setting that is a number"
            raise ConfigError(f"no row of {run.folder} has a setting {along!r} that is a number: {advice}")
        labels = _labels(rows, along)
        metrics = _metrics(run.task)
        failures: dict[tuple[str, float], int] = {}
        found: dict[str, dict[tuple[str, float], Estimate]] = {metric: {} for metric in metrics}
        for name, results in rows.items():
            place = labels[name], float(_config(results)[along])
            if place in failures:
                raise ConfigError(
                    f"two rows of {run.folder} have the same settings, one of them {name}: name other runs"
                )
            failures[place] = sum(each.answers is None for each in results.by_case.values())
            for metric, each in _estimates(run, results, metrics, probability).items():
                found[metric][place] = each
        at = tuple(sorted({value for _, value in failures}))
        lines = tuple(dict.fromkeys(labels.values()))
        model = str(run.settings.get("model", ""))
        unedited = _estimates(run, run.unedited, metrics, probability)
        return cls(model, along, at, lines, metrics, found, unedited, len(run.records), failures)

    def best(self, line: str) -> float:
        """The value of the setting at which a line's last metric is highest; the first one if it has none."""
        scores = {value: self.scores[self.metrics[-1]].get((line, value)) for value in self.at}
        there = {value: each.mean for value, each in scores.items() if each and math.isfinite(each.mean)}
        return max(there, key=lambda value: there[value]) if there else self.at[0]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON-able values; null where absent."""

        def as_dict(one: Estimate | None) -> dict[str, Any]:
            numbers = {"mean": one.mean, "low": one.low, "high": one.high} if one else {}
            return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

        return {
            "model": self.model,
            "records": self.records,
            "along": self.along,
            "at": list(self.at),
            "lines": {
                line: {
                    "best": self.best(line),
                    "failures": [self.failures.get((line, value)) for value in self.at],
                    **{
                        name: [as_dict(self.scores[name].get((line, value))) for value in self.at]
                        for name in self.metrics
                    },
                }
                for line in self.lines
            },
            "unedited": {name: as_dict(self.unedited[name]) for name in self.metrics},
        }

    def plot(self, path: str | Path) -> None:
        """Draw the figure into a .png, .svg or .pdf file.

        Raises:
            ConfigError: if the path ends otherwise.
            OutputError: if the file cannot be written.
            MissingExtra: if matplotlib is not installed.
        """
        save(self.figure(), path)

    def figure(self, title: str | None = None) -> Figure:
        """The scores along the setting, after Figures 17 and 18 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        return settings_figure(
            {metric: self._array(metric, "mean") for metric in self.metrics},
            {metric: self._array(metric, "low") for metric in self.metrics},
            {metric: self._array(metric, "high") for metric in self.metrics},
            self.lines,
            self.at,
            along=self.along,
            unedited={metric: self.unedited[metric].mean for metric in self.metrics},
            title=title,
        )

    def _array(self, metric: str, what: str) -> NDArray[np.float64]:
        nothing = Estimate(np.nan, np.nan, np.nan, 0)
        values = [
            [getattr(self.scores[metric].get((line, value), nothing), what) for value in self.at] for line in self.lines
        ]
        return np.clip(np.array(values, dtype=np.float64), 0, 1)


def _config(results: Results) -> Mapping[str, Any]:
    config = results.settings.get("config")
    return config if isinstance(config, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _labels(rows: Mapping[str, Results], along: str) -> dict[str, str]:
    """The name of each row's line: its editor, and the settings by which rows of one value are told apart."""
    editors = {name: str(results.settings.get("editor")) for name, results in rows.items()}
    configs = {name: _config(results) for name, results in rows.items()}
    found = {}
    for name, config in configs.items():
        keys = _telling([configs[other] for other in rows if editors[other] == editors[name]], along)
        told = [f"{key.replace('_', ' ')} {_shown(config.get(key))}" for key in keys]
        own = [editors[name]] if len(set(editors.values())) > 1 or not told else []
        found[name] = ", ".join([*own, *told])
    return found


def _telling(configs: Sequence[Mapping[str, Any]], along: str) -> list[str]:
    """The settings that tell rows of one value apart; not those that follow others, as a layer's second moment does."""
    keys = [along]
    for key in dict.fromkeys(key for config in configs for key in config):
        if len({_values(config, keys) for config in configs}) < len(
            {_values(config, [*keys, key]) for config in configs}
        ):
            keys.append(key)
    return keys[1:]


def _values(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    return json.dumps([config.get(key) for key in keys])


def _shown(value: Any) -> str:
    text = f"{value:g}" if _number(value) else "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _metrics(task: Task) -> tuple[str, ...]:
    """The numbers to draw: those that make up the task's score, and the score; or else the paper's first four."""
    score = next((column for column in task.columns if column.harmonic), None)
    if score:
        return (*score.harmonic, score.name)
    return tuple(column.name for column in task.columns if not column.own)[:4]


def _estimates(run: Run, results: Results, metrics: Sequence[str], probability: Probability) -> dict[str, Estimate]:
    numbers = {name: list(by_case.values()) for name, by_case in run.numbers(results, probability).items()}
    return estimates([column for column in run.task.columns if column.name in metrics], numbers)
