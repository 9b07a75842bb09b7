"""Recall of facts, in percent, against the number of sequential edits on one model.

Lines differ in colour, marker and dashes. The line of untouched facts is the only solid one; it should stay level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import as_array, canvas, effect_axis, heading, settle
from errata.plots.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 5.2, 3.2  # inches
_MARKERS = 12  # markers on a line, about

# Name, colour (Okabe and Ito's), marker, dashes.
_STYLES = {
    "untouched": ("untouched facts", "#0072B2", "o", "-"),
    "edited": ("all edits so far", "#D55E00", "D", (0, (4, 1.5))),
    "newest": ("the newest, when made", "#E69F00", "^", (0, (1.2, 1.2))),
}


def sequence_figure(
    edits: Sequence[int], recalled: Mapping[str, ArrayLike], *, newest: int | None = None, title: str | None = None
) -> Figure:
    """Draw shares of recalled facts against the number of edits.

    Args:
        edits: how many edits were on the model, `[points]`, rising.
        recalled: for any of "untouched", "edited" and "newest" the share that is recalled `[points]`; where one is not
            finite, there is no point.
        newest: over how many edits, each when it was just made, "newest" is a mean; for its name.
        title: a line above.

    Raises:
        ConfigError: if there is nothing to draw, a line is another, or lines and edits do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    from matplotlib.ticker import MaxNLocator

    unknown = [name for name in recalled if name not in _STYLES]
    if unknown or not recalled:
        raise ConfigError(f"lines are of any of {', '.join(_STYLES)}; got {', '.join(recalled) or 'nothing'}")
    at = as_array("edits", edits)
    lines = {name: as_array(name, values) for name, values in recalled.items()}
    if at.ndim != 1 or not at.size or any(values.shape != at.shape for values in lines.values()):
        shapes = ", ".join(f"{name!r} {list(values.shape)}" for name, values in lines.items())
        raise ConfigError(f"there are edits {list(at.shape)} and lines {shapes}: give each as [points], one at least")

    figure = canvas(_WIDTH, _HEIGHT)
    axis = figure.subplots()
    for place, (name, values) in enumerate(lines.items()):
        label, colour, marker, dashes = _STYLES[name]
        if name == "newest" and newest is not None:
            label = f"the newest {newest}, when made" if newest > 1 else "the newest, when made"
        there = np.isfinite(values)
        every = max(1, round(int(there.sum()) / _MARKERS))
        axis.plot(
            at[there],
            values[there],
            label=label,
            color=colour,
            linestyle=dashes,
            linewidth=1.4,
            marker=marker,
            markersize=4,
            markeredgewidth=0,
            # Lines have theirs at different points, so that those of lines that coincide do not hide each other.
            markevery=(place * every // len(lines) % every, every),
            clip_on=False,
            zorder=3,
        )
    effect_axis(axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlim(min(0.0, at[0]), max(at[-1], 1.0))
    axis.tick_params(labelsize=8, length=2)
    axis.set_xlabel("edits on the model", fontsize=8)
    axis.set_ylabel("recalled (percent)", fontsize=8)
    legend = figure.legend(loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False, handlelength=3.2)
    for text in legend.get_texts():
        plain(text)
    heading(figure, title)
    settle(figure)
    return figure
