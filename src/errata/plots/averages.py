"""Average indirect effects as heat maps, after Figure 2 of the paper.

One map for each part, roles of tokens down and layers across. AIE is the mean over facts of P*,clean[o] − P*[o], in
percentage points. All maps share one scale that begins at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import (
    checked,
    heading,
    heat_map,
    layer_name,
    map_grid,
    part_title,
    role_name,
    scale,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _LOWEST = 0.27, 1.6  # inches of a role and of a map: a colour bar's label needs its height
_MARGIN, _COUNTED = 2.0, 0.7  # inches for the names of roles, and for counts beside them


def average_figure(
    mean: Mapping[str, ArrayLike],
    roles: Sequence[str],
    *,
    counts: Sequence[int] | None = None,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw average indirect effects, the maps of parts side by side.

    Args:
        mean: for each part ("state", "mlp", "attention", "severed_mlp", "severed_attention", or another name) AIE
            as a difference of probabilities `[roles, layers]`; sites without a finite one are grey.
        roles: one a row ("subject_first", "subject_middle", "subject_last", "after_subject", "further", "last", or
            another name).
        counts: number of facts that have each role, shown beside its name.
        window: number of layers restored together in the parts "mlp" and "attention".
        title: a line above the maps.

    Raises:
        ConfigError: if there are no maps, or maps, roles and counts do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    arrays = checked(mean, roles, "role")
    if counts is not None and len(counts) != len(roles):
        raise ConfigError(f"there are {len(counts)} counts and {len(roles)} roles: give the number of facts of each")
    colours = scale(arrays.values(), 0.0)

    labels = [role_name(role) for role in roles]
    if counts is not None:
        labels = [f"{label} (n = {count:,})" for label, count in zip(labels, counts, strict=True)]
    margin = _MARGIN if counts is None else _MARGIN + _COUNTED
    figure, axes = map_grid(arrays, labels, row=_ROW, lowest=_LOWEST, margin=margin)
    heading(figure, title)
    for axis, (part, array) in zip(axes[0], arrays.items(), strict=True):
        heat_map(
            axis,
            array,
            part,
            colours,
            title=part_title(part, window),
            xlabel=layer_name(part, window),
            label="AIE (percentage points)",
            points=True,
        )
    settle(figure)
    return figure
