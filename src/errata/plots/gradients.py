"""Causal traces beside integrated gradients, after Figure 16 of the paper.

Above, the indirect effect P*,clean[o] − P*[o] of restoring each site, in percentage points; below, the norm of
the integrated gradient of the answer's probability at the same site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from errata.base.extras import needed
from errata.plots.drawing import (
    checked,
    checked_like,
    heading,
    heat_map,
    layer_name,
    map_grid,
    part_name,
    part_title,
    require_subject,
    scale,
    settle,
)
from errata.plots.text import font_glyphs, probability, token_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOWEST = 1.5  # inches of a map: a colour bar's label needs its height


def gradients_figure(
    effects: Mapping[str, ArrayLike],
    norms: Mapping[str, ArrayLike],
    tokens: Sequence[str],
    subject: tuple[int, int],
    *,
    answer: str | None = None,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the indirect effects of one trace above the integrated gradients of the same sites.

    Effects share one scale. Norms have one each: a state is far larger than what one module adds to it, and so are its
    gradients. All begin at zero.

    Args:
        effects: for each part ("state", "mlp", "attention", or another name) indirect effects as differences of
            probabilities `[tokens, layers]`; sites without a finite one are grey.
        norms: norms of integrated gradients, of the same parts and shapes.
        tokens: one label a row, as in `trace_figure`.
        subject: indexes of the subject's first and last token, both inclusive.
        answer: whose probability it is, for the heading.
        window: how many layers were restored together in the parts "mlp" and "attention".
        title: a line above the maps.

    Raises:
        ConfigError: if there are no maps, or maps, tokens and subject do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    above = checked(effects, tokens, "token")
    below = checked_like(above, norms, "the gradients' norm")
    require_subject(subject, tokens)
    glyphs = font_glyphs()
    name = probability(answer, glyphs)

    figure, axes = map_grid(above, token_labels(tokens, subject, glyphs), levels=2, lowest=_LOWEST)
    measured = f"above: indirect effect (IE) on {name}, percentage points; below: norm of its integrated gradients"
    heading(figure, title, measured)
    effect_colours = scale(above.values(), 0.0)
    for column, part in enumerate(above):
        heat_map(
            axes[0, column],
            above[part],
            part,
            effect_colours,
            title=part_title(part, window),
            xlabel=layer_name(part, window),
            label="IE (percentage points)",
            points=True,
        )
        heat_map(
            axes[1, column],
            below[part],
            part,
            scale([below[part]], 0.0),
            title=f"integrated gradients\nof {part_name(part)}",
            xlabel="layer",
            label="norm",
        )
    settle(figure)
    return figure
