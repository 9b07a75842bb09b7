"""Scores of edits along one setting of an editor, such as the layer: after Figures 17 and 18 of the paper.

One panel for each metric, one line for each combination of the other settings that differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from errata.base.extras import needed
from errata.plots.drawing import checked, checked_intervals, number_ticks, settle
from errata.plots.panels import Line, ends, score_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_SHAPES = ("o", "D", "s", "^", "v", "P", "X")
_DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (4, 1.2, 1.2, 1.2)))
_WIDE = 8  # from this ratio of the ends on, the axis is logarithmic


def settings_figure(
    mean: Mapping[str, ArrayLike],
    low: Mapping[str, ArrayLike],
    high: Mapping[str, ArrayLike],
    lines: Sequence[str],
    at: Sequence[float],
    *,
    along: str,
    unedited: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw scores along a setting, the panels of metrics side by side on one vertical scale.

    Args:
        mean: for each metric ("es", "ps", "ns", "s", or another name) fractions `[lines, values]`; where one is not
            finite, there is no point.
        low: lower ends of the 95 % intervals, of the same metrics and shapes; not finite where there is none.
        high: upper ends.
        lines: names, one a row.
        at: values of the setting, one a column.
        along: the setting's name.
        unedited: for each metric the unedited model's.
        title: a line above the panels.

    Raises:
        ConfigError: if there are no means, or means, intervals, lines and values do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    means = checked(mean, lines, "line")
    lows, highs = checked_intervals(means, low, high)
    styles = [
        Line(name, _COLOURS[i % len(_COLOURS)], _SHAPES[i % len(_SHAPES)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(lines)
    ]
    figure, panels = score_panels(means, lows, highs, styles, at, unedited=unedited, title=title)
    logarithmic = min(at) > 0 and max(at) / min(at) >= _WIDE and any(value % 1 for value in at)
    for _, axis in panels:
        axis.set_xlabel(along.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=8, length=2)
        if logarithmic:
            axis.set_xscale("log")
        elif len(at) <= 8:
            axis.set_xticks(sorted(at))
            number_ticks(axis.xaxis, points=False)
        if not logarithmic and not any(value % 1 for value in at):
            axis.set_xlim(*ends(at))
    settle(figure)
    return figure
