"""Average indirect effects as lines with their intervals, after Figure 7 of the paper.

One panel for each part, AIE in percentage points against layer, one line for each role. Roles differ in colour, marker
and dashes: colours are Okabe and Ito's, distinguishable with colour blindness; the subject's tokens have solid lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errata.base.extras import needed
from errata.plots.drawing import (
    canvas,
    checked,
    checked_intervals,
    effect_axis,
    heading,
    layer_axis,
    layer_name,
    part_title,
    role_name,
    settle,
)
from errata.plots.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_PANEL, _HEIGHT, _LEGEND = 2.7, 3.0, 2.3  # inches
_MARKERS = 12  # markers on a line, about: with one at each of 48 layers no line could be seen

_COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#000000")
_SHAPES = ("o", "s", "D", "^", "v", "P", "X")
_DASHES = ("-", "-", "-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (4, 1.2, 1.2, 1.2)), (0, (7, 2)))


def lines_figure(
    mean: Mapping[str, ArrayLike],
    low: Mapping[str, ArrayLike],
    high: Mapping[str, ArrayLike],
    roles: Sequence[str],
    *,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw average indirect effects against layers, the panels of parts side by side on one vertical scale.

    Args:
        mean: for each part ("state", "mlp", "attention", "severed_mlp", "severed_attention", or another name) AIE
            as a difference of probabilities `[roles, layers]`; where it is not finite, the line is broken.
        low: lower ends of the 95 % intervals, of the same parts and shapes; not finite where there is none.
        high: upper ends.
        roles: one a row ("subject_first", "subject_middle", "subject_last", "after_subject", "further", "last", or
            another name). Those without any finite mean have no line.
        window: how many layers were restored together in the parts "mlp" and "attention".
        title: a line above the panels.

    Raises:
        ConfigError: if there are no means, or means, intervals and roles do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    means = checked(mean, roles, "role")
    lows, highs = checked_intervals(means, low, high)

    figure = canvas(_PANEL * len(means) + _LEGEND + 0.6, _HEIGHT)
    axes = figure.subplots(1, len(means), squeeze=False, sharey=True)[0]
    shown: dict[str, Line2D] = {}
    for axis, (part, values) in zip(axes, means.items(), strict=True):
        for row, role in enumerate(roles):
            if np.isfinite(values[row]).any():
                # One layer makes no line: roles stand side by side.
                shift = (row - (len(roles) - 1) / 2) / 10 if values.shape[1] == 1 else 0.0
                line = _line(axis, row, shift, values[row], lows[part][row], highs[part][row])
                shown.setdefault(role_name(role), line)
        effect_axis(axis)
        layer_axis(axis, values.shape[1], title=part_title(part, window), xlabel=layer_name(part, window))
    axes[0].set_ylabel("AIE (percentage points)", fontsize=8)
    if shown:
        named = {role_name(role): shown[role_name(role)] for role in roles if role_name(role) in shown}
        legend = figure.legend(
            named.values(),
            named.keys(),
            loc="outside right center",
            title="mean, 95 % interval",
            alignment="left",
            title_fontsize=8,
            fontsize=8,
            frameon=False,
            handlelength=3.2,
        )
        for text in legend.get_texts():
            plain(text)
    heading(figure, title)
    settle(figure)
    return figure


def _line(
    axis: Axes, row: int, shift: float, mean: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> Line2D:
    """The line of one role `[layers]` and its interval."""
    again, style = divmod(row, len(_COLOURS))
    layers = np.arange(len(mean)) + shift
    every = max(1, round(len(mean) / _MARKERS))
    (line,) = axis.plot(
        layers,
        np.where(np.isfinite(mean), mean, np.nan),
        color=_COLOURS[style],
        linestyle=_DASHES[style],
        linewidth=1.3,
        marker=_SHAPES[(style + again) % len(_SHAPES)],
        markersize=3.5,
        markeredgewidth=0,
        # Roles have theirs at different layers, so that those of lines that coincide do not hide each other.
        markevery=(row % every, every),
        zorder=3,
    )
    # With an edge where there is one layer: its interval has no width.
    edge = 1.3 if len(mean) == 1 else 0
    axis.fill_between(layers, low, high, color=_COLOURS[style], alpha=0.2, linewidth=edge)
    return line
