"""What a setting does to an editor: the rows of a run that differ in it, as lines along it (Figures 17 and 18)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from errata.base.errors import ConfigError
from errata.evaluation.report import PARTS
from errata.evaluation.results import Results, Run
from errata.metrics.counterfact import Probability
from errata.metrics.summary import Estimate, estimate, harmonic_score
from errata.plots.settings import settings_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = (*PARTS, "s")


@dataclass(frozen=True)
class SettingScores:
    """ES, PS, NS and S along one setting.

    Attributes:
        model: whose.
        along: the setting.
        at: its values, ascending.
        lines: names of what is compared: editors, and those of their other settings that differ.
        scores: of each metric, by line and value; None where no row has these.
        unedited: of each metric, the unedited model's.
    """

    model: str
    along: str
    at: tuple[float, ...]
    lines: tuple[str, ...]
    scores: Mapping[str, Mapping[tuple[str, float], Estimate]]
    unedited: Mapping[str, Estimate]

    @classmethod
    def of(cls, run: Run, along: str, probability: Probability = "per_token") -> SettingScores:
        """Of a run's rows, those whose editors have the setting, as a number.

        Raises:
            ConfigError: if no row has, or two are the same but for their names, or the run is no CounterFact's.
        """
        if run.kind != "counterfact":
            raise ConfigError(f"{run.folder} is of {run.kind}, and these figures are of CounterFact's numbers")
        rows = {name: results for name, results in run.edited.items() if _number(_config(results).get(along))}
        if not rows:
            there = sorted({key for each in run.edited.values() for key, v in _config(each).items() if _number(v)})
            advice = f"choose of {', '.join(there)}" if there else "it has no row with a setting that is a number"
            raise ConfigError(f"no row of {run.folder} has a setting {along!r} that is a number: {advice}")
        labels = _labels(rows, along)
        found: dict[str, dict[tuple[str, float], Estimate]] = {metric: {} for metric in METRICS}
        for name, results in rows.items():
            place = labels[name], float(_config(results)[along])
            if place in found["s"]:
                raise ConfigError(
                    f"two rows of {run.folder} have the same settings, one of them {name}: name other runs"
                )
            for metric, each in _estimates(run, results, probability).items():
                found[metric][place] = each
        at = tuple(sorted({value for _, value in found["s"]}))
        lines = tuple(dict.fromkeys(labels.values()))
        model = str(run.settings.get("model", ""))
        return cls(model, along, at, lines, found, _estimates(run, run.unedited, probability))

    def figure(self, title: str | None = None) -> Figure:
        """The scores along the setting, after Figures 17 and 18 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        return settings_figure(
            {metric: self._array(metric, "mean") for metric in METRICS},
            {metric: self._array(metric, "low") for metric in METRICS},
            {metric: self._array(metric, "high") for metric in METRICS},
            self.lines,
            self.at,
            along=self.along,
            unedited={metric: self.unedited[metric].mean for metric in METRICS},
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
    """What each row's line is called: its editor, and the settings by which rows of one value are told apart."""
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


def _estimates(run: Run, results: Results, probability: Probability) -> dict[str, Estimate]:
    numbers = {name: list(values.values()) for name, values in run.numbers(results, probability).items()}
    found = {name: estimate(numbers[name]) for name in PARTS}
    return {**found, "s": harmonic_score({name: numbers[name] for name in PARTS})}
