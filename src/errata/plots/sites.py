"""Scores of edits by layer and token, after Figure 5 of the paper.

One panel a metric, in percent against layer, one line a token role with its 95 % band; the unedited model is a dashed
line across. Roles differ in colour, marker and dashes, as in the lines of causal tracing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import canvas, checked, checked_intervals, effect_axis, heading, layer_axis, role_name, settle
from errata.plots.text import plain

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_PANEL, _HEIGHT = 2.6, 3.0  # inches
_MARKERS = 12  # markers on a line, about

_TITLES = {
    "es": "efficacy\n(rewrite prompts)",
    "ps": "generalisation\n(paraphrases)",
    "ns": "specificity\n(neighborhood prompts)",
    "s": "score S\n(harmonic mean)",
}

# Role in the words of causal tracing, colour (Okabe and Ito's), marker, dashes.
_STYLES = {
    "subject_first": ("first subject", "#56B4E9", "o", "-"),
    "subject_last": ("last subject", "#D55E00", "D", "-"),
    "subject_first_after": ("first after", "#E69F00", "^", (0, (4, 1.5))),
    "last": ("last", "#0072B2", "P", (0, (4, 1.2, 1.2, 1.2))),
}


def sites_figure(
    mean: Mapping[str, ArrayLike],
    low: Mapping[str, ArrayLike],
    high: Mapping[str, ArrayLike],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    unedited: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw scores against layers, the panels of metrics side by side on one vertical scale.

    Args:
        mean: for each metric ("es", "ps", "ns", "s", or another name) fractions `[tokens, layers]`; where one is not
            finite, there is no point.
        low: lower ends of the 95 % intervals, of the same metrics and shapes; not finite where there is none.
        high: upper ends.
        tokens: one a row ("subject_first", "subject_last", "subject_first_after", "last").
        layers: one a column, from 0.
        unedited: for each metric the unedited model's.
        title: a line above the panels.

    Raises:
        ConfigError: if there are no means, or means, intervals, tokens and layers do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    means = checked(mean, tokens, "token")
    lows, highs = checked_intervals(means, low, high)
    unknown = [token for token in tokens if token not in _STYLES]
    if unknown:
        raise ConfigError(f"there is no token role {unknown[0]!r}: choose of {', '.join(_STYLES)}")
    if any(array.shape[1] != len(layers) for array in means.values()):
        raise ConfigError(f"there are {len(layers)} layers, and means of another number: give a layer for each column")

    order = np.argsort(layers)
    at = np.asarray(layers)[order]
    figure = canvas(_PANEL * len(means) + 0.6, _HEIGHT)
    axes = figure.subplots(1, len(means), squeeze=False, sharey=True)[0]
    shown: dict[str, Artist] = {}
    for axis, (metric, values) in zip(axes, means.items(), strict=True):
        for row, token in enumerate(tokens):
            name, colour, marker, dashes = _STYLES[token]
            there = order[np.isfinite(values[row, order])]
            if not there.size:
                continue
            # One layer makes no line: roles stand side by side.
            x = np.asarray(layers)[there] + (0.1 * (row - (len(tokens) - 1) / 2) if len(layers) == 1 else 0.0)
            every = max(1, round(there.size / _MARKERS))
            (line,) = axis.plot(
                x,
                values[row, there],
                color=colour,
                linestyle=dashes,
                linewidth=1.3,
                marker=marker,
                markersize=3.5,
                markeredgewidth=0,
                # Roles have theirs at different layers, so that those of lines that coincide do not hide each other.
                markevery=(row % every, every),
                zorder=3,
            )
            edge = 1.3 if there.size == 1 else 0  # a band over one layer has no width
            axis.fill_between(x, lows[metric][row, there], highs[metric][row, there], color=colour, alpha=0.2, lw=edge)
            shown.setdefault(role_name(name), line)
        if unedited and np.isfinite(unedited.get(metric, np.nan)):
            dashed = axis.axhline(unedited[metric], color="0.35", linewidth=1, linestyle=(0, (2, 2)), zorder=2)
            shown.setdefault("unedited model", dashed)
        effect_axis(axis)
        layer_axis(axis, int(at[-1]) + 1, title=_TITLES.get(metric, metric), xlabel="layer")
        if len(layers) <= 8:
            axis.set_xticks(at)
        axis.set_xlim(*_ends(at))
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("percent, and 95 % interval", fontsize=8)
    if shown:
        last = shown.pop("unedited model", None)
        if last is not None:
            shown["unedited model"] = last
        legend = figure.legend(
            shown.values(),
            shown.keys(),
            loc="outside lower center",
            ncols=len(shown),
            fontsize=8,
            frameon=False,
            handlelength=3.2,
        )
        for text in legend.get_texts():
            plain(text)
    heading(figure, title)
    settle(figure)
    return figure


def _ends(layers: np.ndarray) -> tuple[float, float]:
    """Ends of the axis of layers, with a little room."""
    room = max(0.04 * (layers[-1] - layers[0]), 0.3)
    return float(layers[0] - room), float(layers[-1] + room)
