"""Scores of edits, in percent: one panel for each metric, with one line and 95 % band for each compared row.

Lines differ in colour, marker and dashes; the unedited model is a dashed line across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.base.errors import ConfigError
from errata.plots.drawing import Arrays, canvas, effect_axis, heading
from errata.plots.text import plain

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _HEIGHT = 2.6, 3.0  # inches
_MARKERS = 12  # markers on a line, about
_LEGEND = 110  # characters of a line of the legend

TITLES = {
    "es": "efficacy\n(rewrite prompts)",
    "ps": "generalisation\n(paraphrases)",
    "ns": "specificity\n(neighborhood prompts)",
    "s": "score S\n(harmonic mean)",
}


@dataclass(frozen=True)
class Line:
    """Name and style of a line: colour, marker, and dashes in matplotlib's form."""

    name: str
    colour: str
    marker: str
    dashes: Any


def score_panels(
    means: Arrays,
    lows: Arrays,
    highs: Arrays,
    lines: Sequence[Line],
    at: Sequence[float],
    *,
    unedited: Mapping[str, float] | None = None,
    title: str | None = None,
) -> tuple[Figure, list[tuple[str, Axes]]]:
    """Draw fractions `[lines, places]` of each metric on one vertical scale.

    Args:
        means: means by metric; values that are not finite are not drawn.
        lows: lower ends of the 95 % intervals; not finite where there is none.
        highs: upper ends.
        lines: one a row.
        at: where on the horizontal axis each column is.
        unedited: for each metric the unedited model's.
        title: a line above the panels.

    Returns:
        The figure, which is to be settled once its horizontal axes are labelled, and its axes by metric.

    Raises:
        ConfigError: if the places are not as many as the columns.
    """
    if any(array.shape[1] != len(at) for array in means.values()):
        raise ConfigError(f"there are {len(at)} places along the axis, and means of another number: give one for each")
    places = np.asarray(at)
    order = np.argsort(places, kind="stable")
    figure = canvas(_PANEL * len(means) + 0.6, _HEIGHT)
    axes = figure.subplots(1, len(means), squeeze=False, sharey=True)[0]
    shown: dict[str, Artist] = {}
    for axis, (metric, values) in zip(axes, means.items(), strict=True):
        for row, style in enumerate(lines):
            there = order[np.isfinite(values[row, order])]
            if not there.size:
                continue
            # One place makes no line: what is compared stands side by side.
            x = places[there] + (0.1 * (row - (len(lines) - 1) / 2) if len(at) == 1 else 0.0)
            every = max(1, round(there.size / _MARKERS))
            (line,) = axis.plot(
                x,
                values[row, there],
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.3,
                marker=style.marker,
                markersize=3.5,
                markeredgewidth=0,
                # Lines have theirs at different places, so that those that coincide do not hide each other.
                markevery=(row % every, every),
                zorder=3,
            )
            edge = 1.3 if there.size == 1 else 0  # a band over one place has no width
            axis.fill_between(
                x, lows[metric][row, there], highs[metric][row, there], color=style.colour, alpha=0.2, lw=edge
            )
            shown.setdefault(style.name, line)
        if unedited and np.isfinite(unedited.get(metric, np.nan)):
            dashed = axis.axhline(unedited[metric], color="0.35", linewidth=1, linestyle=(0, (2, 2)), zorder=2)
            shown.setdefault("unedited model", dashed)
        effect_axis(axis)
        plain(axis.set_title(TITLES.get(metric, metric), fontsize=9))
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("percent, and 95 % interval", fontsize=8)
    _legend(figure, shown)
    heading(figure, title)
    return figure, [*zip(means, axes, strict=True)]


def _legend(figure: Figure, shown: dict[str, Artist]) -> None:
    """Below the panels, the unedited model last."""
    if not shown:
        return
    last = shown.pop("unedited model", None)
    if last is not None:
        shown["unedited model"] = last
    legend = figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(shown), _LEGEND // (max(map(len, shown)) + 8))),
        fontsize=8,
        frameon=False,
        handlelength=3.2,
    )
    for text in legend.get_texts():
        plain(text)


def ends(at: Sequence[float]) -> tuple[float, float]:
    """Ends of a horizontal axis, with a little room."""
    low, high = float(min(at)), float(max(at))
    room = max(0.04 * (high - low), 0.3)
    return low - room, high + room
