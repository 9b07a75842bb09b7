"""Effects of states with modules severed, after Figure 3 of the paper.

At each layer three bars: AIE of restoring the state, the same with attention severed, and with MLPs severed, in
percentage points. A severed module is held at its output of the corrupted run, so its contribution is missing from the
effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import (
    as_array,
    canvas,
    checked_intervals,
    effect_axis,
    heading,
    layer_axis,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From dark to light too, for those who see no colours.
_BARS = {
    "state": ("effect of restoring the state", "#6A5AA8"),
    "severed_attention": ("with attention severed", "#E1752D"),
    "severed_mlp": ("with MLPs severed", "#A6DBC9"),
}

_LAYER, _NARROWEST, _WIDEST, _HEIGHT = 0.22, 5.6, 12.0, 3.0  # inches
_GROUP = 0.84  # of a layer's width
_TICK = 0.45  # inches between ticks, at least


def severed_figure(
    mean: Mapping[str, ArrayLike],
    low: Mapping[str, ArrayLike],
    high: Mapping[str, ArrayLike],
    *,
    title: str | None = None,
) -> Figure:
    """Draw average indirect effects of states, as they are and with modules severed, as bars at each layer.

    Args:
        mean: for "state" and any of "severed_attention", "severed_mlp" AIE as a difference of probabilities
            `[layers]`; where it is not finite there is no bar.
        low: lower ends of the 95 % intervals, of the same parts and shapes; not finite where there is none.
        high: upper ends.
        title: a line above the bars.

    Raises:
        ConfigError: if there is no "state", a part is another, or means and intervals do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    unknown = [part for part in mean if part not in _BARS]
    if "state" not in mean or unknown:
        raise ConfigError(
            f"bars are of 'state' and any of 'severed_attention', 'severed_mlp'; got {', '.join(mean) or 'nothing'}"
        )
    means = {part: as_array(part, mean[part]) for part in _BARS if part in mean}
    shape = means["state"].shape
    if any(array.shape != shape for array in means.values()) or len(shape) != 1 or shape[0] == 0:
        shapes = ", ".join(f"{part!r} {list(array.shape)}" for part, array in means.items())
        raise ConfigError(f"bars stand at the same layers, and the shapes are {shapes}: give each as [layers]")
    lows, highs = checked_intervals(means, low, high)

    layers = np.arange(shape[0])
    width = min(max(_LAYER * len(layers) + 1.0, _NARROWEST), _WIDEST)
    figure = canvas(width, _HEIGHT)
    axis = figure.subplots()
    bar = _GROUP / len(means)
    thin = min(0.8, 72 * bar * width / len(layers) / 9)  # a ninth of a bar
    for place, (part, values) in enumerate(means.items()):
        label, colour = _BARS[part]
        at = layers + (place - (len(means) - 1) / 2) * bar
        axis.bar(at, np.where(np.isfinite(values), values, np.nan), bar, color=colour, label=label, zorder=2)
        axis.errorbar(
            at,
            (lows[part] + highs[part]) / 2,
            (highs[part] - lows[part]) / 2,
            fmt="none",
            ecolor="0.15",
            elinewidth=thin,
            zorder=3,
        )
    effect_axis(axis)
    layer_axis(axis, len(layers), title="", xlabel="layer", most=int(width / _TICK))
    middle, half = (len(layers) - 1) / 2, max(len(layers), 4) / 2
    axis.set_xlim(middle - half, middle + half)
    axis.set_ylabel("AIE and 95 % interval\n(percentage points)", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(means), fontsize=8, frameon=False, handlelength=1.2)
    heading(figure, title)
    settle(figure)
    return figure
