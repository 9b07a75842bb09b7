"""Averages over many facts: Figures 2 and 7 of the paper as numbers.

AIE of a role and layer is the mean over facts of the indirect effect of the sites in that role. Where a fact has
several tokens in a role (middle subject, further), its sites count as their mean. Intervals are 95 %, normal:
1.96·std/√n over facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from errata.base.errors import ConfigError
from errata.tracing.trace import ROLES, CausalTrace


@dataclass(frozen=True, eq=False)
class AverageEffects:
    """Mean effects over facts.

    Attributes:
        facts: how many.
        clean, corrupted, total_effect: means over facts; ATE is the last.
        mean: for each part, AIE `[roles, layers]` with rows in the order of `ROLES`; NaN where no fact has the role.
        interval: half widths of the 95 % intervals, same shape.
        counts: facts that have each role.
    """

    facts: int
    clean: float
    corrupted: float
    total_effect: float
    mean: Mapping[str, np.ndarray]
    interval: Mapping[str, np.ndarray]
    counts: tuple[int, ...]


def average_effects(traces: Iterable[CausalTrace]) -> AverageEffects:
    """Average traces of one model.

    Raises:
        ConfigError: if there are none, or they differ in their model, parts or number of layers.
    """
    traces = list(traces)
    shapes = {(trace.model, *((part, values.shape[1]) for part, values in trace.restored.items())) for trace in traces}
    if len(shapes) != 1:
        raise ConfigError("averages need traces of one model with the same parts, and at least one of them")
    mean, interval = {}, {}
    for part in traces[0].restored:
        by_role = [[_in_role(trace, part, role) for trace in traces if role in trace.roles] for role in ROLES]
        layers = traces[0].restored[part].shape[1]
        mean[part] = np.stack([np.mean(r, 0) if r else np.full(layers, np.nan) for r in by_role])
        interval[part] = np.stack(
            [1.96 * np.std(r, 0, ddof=1) / len(r) ** 0.5 if len(r) > 1 else np.full(layers, np.nan) for r in by_role]
        )
    return AverageEffects(
        facts=len(traces),
        clean=float(np.mean([trace.clean for trace in traces])),
        corrupted=float(np.mean([trace.corrupted for trace in traces])),
        total_effect=float(np.mean([trace.total_effect for trace in traces])),
        mean=mean,
        interval=interval,
        counts=tuple(sum(role in trace.roles for trace in traces) for role in ROLES),
    )


def _in_role(trace: CausalTrace, part: str, role: str) -> np.ndarray:
    rows = [index for index, its_role in enumerate(trace.roles) if its_role == role]
    return trace.indirect_effect(part)[rows].mean(0)
