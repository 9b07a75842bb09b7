"""Figure of an editor's training: losses by step, and validation.

Losses are means over some steps; validations are points. The best one is marked by a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import as_array, canvas, effect_axis, heading, settle
from errata.plots.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL, _HEIGHT = 2.9, 2.9  # inches
_POINTS = 100  # of a line of losses, at most

_LOSSES = {
    "edit": "new object after an equivalent prompt\n(−log P, nats a token)",
    "locality": "other texts\n(KL divergence, nats a token)",
}
_TRAIN, _VALID = "#56B4E9", "#D55E00"  # Okabe and Ito's


def training_figure(
    losses: Mapping[str, ArrayLike],
    validated_at: Sequence[int],
    validations: Mapping[str, ArrayLike],
    *,
    best: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a training: two panels of losses, one of success.

    Args:
        losses: "edit" and "locality" of each step, `[steps]`, in nats.
        validated_at: after how many steps each validation was, `[v]`.
        validations: "edit" and "locality" in nats, "success" a share, each `[v]`.
        best: after how many steps the network that is kept was had.
        title: a line above the panels.

    Raises:
        ConfigError: if something is missing, or sizes do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    missing = [name for name in _LOSSES if name not in losses] + [
        name for name in (*_LOSSES, "success") if name not in validations
    ]
    if missing:
        raise ConfigError(f"a training has edit, locality and success; {missing[0]!r} is missing")
    at = np.asarray(validated_at, dtype=np.float64)
    points = {name: as_array(name, values) for name, values in validations.items()}
    lines = {name: as_array(name, values) for name, values in losses.items()}
    if any(values.shape != at.shape for values in points.values()) or len({v.shape for v in lines.values()}) > 1:
        raise ConfigError("losses are as many as steps, and each number of a validation as many as these")

    figure = canvas(3 * _PANEL, _HEIGHT)
    axes = figure.subplots(1, 3)
    for axis, (name, words) in zip(axes, _LOSSES.items(), strict=False):
        x, y = _means(lines[name])
        axis.plot(x, y, color=_TRAIN, linewidth=1.3, label="training")
        axis.plot(at, points[name], color=_VALID, marker="o", markersize=3, linewidth=1, label="validation")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        plain(axis.set_title(words, fontsize=9))
    success = axes[2]
    success.plot(at, points["success"], color=_VALID, marker="o", markersize=3, linewidth=1)
    success.set_ylim(-0.03, 1.03)
    effect_axis(success)
    plain(success.set_title("new object said\n(percent of examples)", fontsize=9))
    for axis in axes:
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8, length=2)
        axis.set_xlim(left=0)
        if best is not None:
            axis.axvline(best, color="0.35", linewidth=1, linestyle=(0, (2, 2)), label="kept")
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    for text in legend.get_texts():
        plain(text)
    heading(figure, title)
    settle(figure)
    return figure


def _means(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and losses, means over as many steps as make `_POINTS` points."""
    share = max(1, -(-len(values) // _POINTS))
    parts = [values[i : i + share] for i in range(0, len(values), share)]
    ends = [min(i + share, len(values)) for i in range(0, len(values), share)]
    return np.array(ends, dtype=np.float64), np.array([part.mean() for part in parts])
