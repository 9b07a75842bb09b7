"""Causal traces as heat maps, after Figure 1 (e, f, g) of the paper.

One map for each part, tokens down and layers across; the subject's tokens are starred. The colour of a site is
P*,clean[o], the answer's probability when that site alone is restored. All maps of a figure share one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from errata.base.extras import needed
from errata.plots.drawing import (
    checked,
    heading,
    heat_map,
    layer_name,
    map_grid,
    part_title,
    require_subject,
    scale,
    settle,
)
from errata.plots.drawing import require_ending as require_ending
from errata.plots.drawing import save as save
from errata.plots.text import font_glyphs, probability, token_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def trace_figure(
    maps: Mapping[str, ArrayLike],
    tokens: Sequence[str],
    subject: tuple[int, int],
    *,
    low: float | None = None,
    high: float | None = None,
    answer: str | None = None,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the maps of one trace side by side.

    Args:
        maps: for each part ("state", "mlp", "attention", "severed_mlp", "severed_attention", or another name)
            probabilities `[tokens, layers]`; sites without a finite one are grey.
        tokens: one label for each row. White space in them is made visible, long labels are cut, and characters
            for which matplotlib's fonts (`rcParams["font.family"]`) have no glyph read like `\\u{1f5fc}`.
        subject: indexes of the subject's first and last token, both inclusive.
        low: the corrupted run's probability, at which the colours begin; if None, if no site is above it, or if the
            clean run's is lower, they begin at the lowest value.
        high: the clean run's probability, shown above the maps.
        answer: the answer whose probability is shown, for the labels.
        window: number of layers restored together in the parts "mlp" and "attention".
        title: a line above the maps.

    Raises:
        ConfigError: if there are no maps, or maps, tokens and subject do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    arrays = checked(maps, tokens, "token")
    require_subject(subject, tokens)
    raised = low is not None and high is not None and high < low  # the corruption helps the answer
    colours = scale(arrays.values(), None if raised else low)
    glyphs = font_glyphs()
    label = probability(answer, glyphs)

    figure, axes = map_grid(arrays, token_labels(tokens, subject, glyphs))
    runs = [f"{run} {value:.3g}" for run, value in (("clean", high), ("corrupted", low)) if value is not None]
    heading(figure, title, *([f"{label}: {', '.join(runs)}"] if runs else []))
    for axis, (part, array) in zip(axes[0], arrays.items(), strict=True):
        xlabel = layer_name(part, window)
        heat_map(axis, array, part, colours, title=part_title(part, window), xlabel=xlabel, label=label)
    settle(figure)
    return figure
