"""Scores of edits by layer and token, after Figure 5 of the paper.

One panel a metric, in percent against layer, one line a token role with its 95 % band; the unedited model is a dashed
line across. Roles differ in colour, marker and dashes, as in the lines of causal tracing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.plots.drawing import checked, checked_intervals, layer_axis, role_name, settle
from errata.plots.panels import TITLES, Line, ends, score_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In the words of causal tracing; colours are Okabe and Ito's.
_STYLES = {
    "subject_first": Line(role_name("first subject"), "#56B4E9", "o", "-"),
    "subject_last": Line(role_name("last subject"), "#D55E00", "D", "-"),
    "subject_first_after": Line(role_name("first after"), "#E69F00", "^", (0, (4, 1.5))),
    "last": Line(role_name("last"), "#0072B2", "P", (0, (4, 1.2, 1.2, 1.2))),
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
    lines = [_STYLES[token] for token in tokens]
    figure, panels = score_panels(means, lows, highs, lines, layers, unedited=unedited, title=title)
    for metric, axis in panels:
        layer_axis(axis, max(layers) + 1, title=TITLES.get(metric, metric), xlabel="layer")
        if len(layers) <= 8:
            axis.set_xticks(sorted(layers))
        axis.set_xlim(*ends(layers))
    settle(figure)
    return figure
