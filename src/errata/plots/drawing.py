"""Shared parts of all pictures of causal tracing: canvas, maps, titles, ticks, scales, files.

Parts are "state", "mlp" and "attention" restored in a corrupted run, and "severed_mlp" and "severed_attention",
states restored while modules are held at their outputs of the corrupted run. Layers count from 0.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.base.files import written_whole
from errata.plots.text import font_glyphs, plain, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Arrays = dict[str, NDArray[np.float64]]

# The paper's colours. Each runs from light to dark, so that maps can be read without colour vision. What is
# restored decides: severed maps are of states, and are compared with the map of states.
_COLOURS = {
    "state": "Purples",
    "mlp": "Greens",
    "attention": "Reds",
    "severed_mlp": "Purples",
    "severed_attention": "Purples",
}
_OTHER_COLOURS = "Blues"
_NAMES = {"state": "states", "mlp": "MLP outputs", "attention": "attention outputs"}
_SEVERED = {"severed_mlp": "MLPs severed", "severed_attention": "attention severed"}

# The paper's names of the roles that tokens have in a prompt.
_ROLES = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "after_subject": "first subsequent token",
    "further": "further tokens",
    "last": "last token",
}

_ROW, _COLUMN = 0.2, 0.055  # inches of a token and of a layer
_NARROWEST, _WIDEST = 1.7, 3.6  # inches of a map
_BAR = 0.09  # inches of a colour bar's width
_LETTER = 0.08  # inches of a letter of the heading, rather more than less
_LINE = 0.15  # inches of a line of it
_DPI = 200

# Nothing that differs between two writings of the same figure: neither the time nor versions.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


# ---------------------------------------------------------------------------------------------
# Numbers


def checked(values: Mapping[str, ArrayLike], rows: Sequence[str], kind: str) -> Arrays:
    """Maps as arrays `[rows, layers]`, after a check that they have one row for each of these tokens or roles.

    Raises:
        ConfigError: if there are none, or if they do not.
    """
    if not values or not rows:
        raise ConfigError(f"there is nothing to draw: give at least one map and one {kind}")
    arrays = {part: as_array(part, array) for part, array in values.items()}
    for part, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != len(rows) or array.shape[1] == 0:
            raise ConfigError(
                f"the map {part!r} has the shape {list(array.shape)} and there are {len(rows)} {kind}s: "
                f"give it as [{kind}s, layers]"
            )
    return arrays


def require_subject(subject: tuple[int, int], tokens: Sequence[str]) -> None:
    """Check that the subject lies within the tokens.

    Raises:
        ConfigError: if it is not.
    """
    first, last = subject
    if not 0 <= first <= last < len(tokens):
        raise ConfigError(
            f"the subject cannot be tokens {first} to {last} of {len(tokens)}: "
            "give the indexes of its first and its last token"
        )


def checked_like(arrays: Arrays, values: Mapping[str, ArrayLike], name: str) -> Arrays:
    """Values for these arrays, after a check that they have the same parts and shapes.

    Raises:
        ConfigError: if they do not.
    """
    if set(values) != set(arrays):
        raise ConfigError(
            f"{name} is of {', '.join(values) or 'nothing'} and what it belongs to of {', '.join(arrays)}: "
            "give both of the same parts"
        )
    found = {part: as_array(part, values[part]) for part in arrays}
    for part, array in found.items():
        if array.shape != arrays[part].shape:
            raise ConfigError(
                f"{name} of {part!r} has the shape {list(array.shape)} and what it belongs to "
                f"{list(arrays[part].shape)}: give both of the same rows and layers"
            )
    return found


def checked_intervals(
    arrays: Arrays, low: Mapping[str, ArrayLike], high: Mapping[str, ArrayLike]
) -> tuple[Arrays, Arrays]:
    """Lower and upper ends of the intervals of these arrays; NaN where they are not finite.

    Raises:
        ConfigError: if they have other parts or shapes, or an interval ends before it begins.
    """
    ends = checked_like(arrays, low, "the interval's lower end"), checked_like(arrays, high, "the interval's upper end")
    for part in arrays:
        if (ends[0][part] > ends[1][part]).any():
            raise ConfigError(f"an interval of {part!r} ends before it begins: give the lower ends as low")
    lows, highs = ({part: np.where(np.isfinite(end), end, np.nan) for part, end in found.items()} for found in ends)
    return lows, highs


def as_array(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """The values as an array.

    Raises:
        ConfigError: if they are not numbers, or rows of different lengths.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the values of {name!r} make no array of numbers ({error})") from error


class Scale(NamedTuple):
    """The colour scale shared by maps that are compared.

    Attributes:
        begin: the value at which they begin.
        end: the value at which they end.
        below: whether values are well below the beginning, which the bars then tell with an arrow.
    """

    begin: float
    end: float
    below: bool


def scale(arrays: Iterable[NDArray[np.float64]], low: float | None) -> Scale:
    """One scale for all arrays, from `low` if anything is above it, else from the lowest value; to the highest."""
    values = np.concatenate([array[np.isfinite(array)] for array in arrays])
    if values.size == 0:
        return Scale(0.0, 1.0, below=False)
    least, end = float(values.min()), float(values.max())
    begin = low if low is not None and low < end else least
    end = end if begin < end else begin + 1e-3
    return Scale(begin, end, below=least < begin - 0.02 * (end - begin))


# ---------------------------------------------------------------------------------------------
# Words


def single_layer(part: str, window: int | None) -> bool:
    """Whether a site of the part is one layer and not a window of them."""
    return part == "state" or part in _SEVERED or window == 1


def part_title(part: str, window: int | None) -> str:
    """Title of a part's map, in two lines."""
    if part in _SEVERED:
        return f"states restored,\n{_SEVERED[part]}"
    where = "a window" if window is None else f"a window of {window} layers"
    return f"{_NAMES.get(part, part)} restored\nin {'one layer' if single_layer(part, window) else where}"


def part_name(part: str) -> str:
    """Name of a part, in the plural."""
    return f"states, {_SEVERED[part]}" if part in _SEVERED else _NAMES.get(part, part)


def role_name(role: str) -> str:
    """The role as the label of a row or line, with a star if it is one of the subject's."""
    return _ROLES.get(role, role) + "*" * role.startswith("subject_")


def layer_name(part: str, window: int | None) -> str:
    """Label of the layer axis of a part's map."""
    return "layer" if single_layer(part, window) else "layer at the window's centre"


# ---------------------------------------------------------------------------------------------
# Drawing


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, without pyplot and its list of open figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), dpi=_DPI / 2)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Compute the final layout; each further layout would shift things slightly."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")


def heading(figure: Figure, title: str | None, *more: str) -> None:
    """Add the title and further lines at the top, wrapped; the figure grows by their height."""
    glyphs = font_glyphs()
    lines = [*(visible(line, glyphs) for line in (title or "").splitlines()), *more]
    # Not matplotlib's own wrapping, which takes dollar signs for mathematics.
    room = int(figure.get_figwidth() / _LETTER)
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, room)]
    if wrapped:
        figure.set_figheight(figure.get_figheight() + _LINE * (len(wrapped) + 1))
        plain(figure.suptitle("\n".join(wrapped), fontsize=9))


def map_grid(
    arrays: Arrays,
    labels: Sequence[str],
    *,
    levels: int = 1,
    row: float = _ROW,
    lowest: float = 0.8,
    margin: float = 1.4,
) -> tuple[Figure, Any]:
    """A figure with room for a map of each array, once or on several levels.

    Args:
        arrays: the arrays to draw.
        labels: labels of the rows, on the left of every level.
        levels: how many maps there are of each array.
        row: inches of a row.
        lowest: inches of a map, at least.
        margin: inches for labels.

    Returns:
        the figure, and axes `[levels, parts]`.
    """
    widths = [min(max(_COLUMN * array.shape[1], _NARROWEST), _WIDEST) for array in arrays.values()]
    height = max(row * len(labels), lowest)
    figure = canvas(sum(widths) + 0.8 * len(arrays) + margin, levels * (height + 0.9) + 0.1)
    axes = figure.subplots(levels, len(arrays), squeeze=False, sharey=True, width_ratios=widths)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    for axis in axes[:, 0]:
        for text in axis.get_yticklabels():
            plain(text)
    return figure, axes


def heat_map(
    axis: Axes,
    values: NDArray[np.float64],
    part: str,
    colours: Scale,
    *,
    title: str,
    xlabel: str,
    label: str,
    points: bool = False,
) -> None:
    """One map with its colour bar; sites without a finite value are grey.

    Args:
        axis: where.
        values: `[rows, layers]`, the first row at the top.
        part: whose colours it has.
        colours: what they mean.
        title: above it.
        xlabel: name of the layers.
        label: label of the colour bar.
        points: whether the bar's ticks are percentage points, of values that are probabilities.
    """
    from matplotlib.colors import Normalize

    image = axis.imshow(
        np.ma.masked_invalid(values),
        norm=Normalize(colours.begin, colours.end),
        cmap=_COLOURS.get(part, _OTHER_COLOURS),
        aspect="auto",
    )
    axis.set_facecolor("0.8")
    box = axis.get_window_extent().transformed(axis.figure.dpi_scale_trans.inverted())
    bar = axis.figure.colorbar(
        image,
        cax=axis.inset_axes((1 + _BAR / 2 / box.width, 0, _BAR / box.width, 1)),
        extend="min" if colours.below else "neither",
        extendfrac=_BAR / box.height,
    )
    number_ticks(bar.ax.yaxis, points=points)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    plain(bar.ax.yaxis.label)
    layer_axis(axis, values.shape[1], title=title, xlabel=xlabel)
    for spine in axis.spines.values():
        spine.set_linewidth(0.5)


def layer_axis(axis: Axes, layers: int, *, title: str, xlabel: str, most: int = 8) -> None:
    """Title, and a tick for every layer or for every few, at most about `most` of them."""
    plain(axis.set_title(title, fontsize=9))
    axis.set_xlabel(xlabel, fontsize=8)
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= most * step)
    axis.set_xticks(range(0, layers, step))
    axis.tick_params(labelsize=8, length=2)


def effect_axis(axis: Axes) -> None:
    """Make the vertical axis one of effects in percentage points, with zero marked and no frame around."""
    axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axis.grid(axis="y", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    number_ticks(axis.yaxis, points=True)


def number_ticks(axis: Axis, *, points: bool) -> None:
    """Tick labels as short as they can be, in percentage points if the values are probabilities to be shown so."""
    from matplotlib.ticker import Formatter, FuncFormatter

    def number(value: float, _: int | None) -> str:
        if abs(value) < 1e-9 * max(map(abs, axis.get_view_interval())):
            value = 0.0  # neither 1e-17 nor -0
        return Formatter.fix_minus(f"{100 * value if points else value:.4g}")

    axis.set_major_formatter(FuncFormatter(number))


# ---------------------------------------------------------------------------------------------
# Files


def require_ending(path: str | Path) -> str:
    """The ending of a picture's path, in lower case.

    Raises:
        ConfigError: if it is none that pictures are written in.
    """
    ending = Path(path).suffix.lower()
    if ending not in _METADATA:
        raise ConfigError(
            f"a picture cannot be written to {Path(path).name!r}: the ending tells the format, "
            f"so give it one of {', '.join(_METADATA)}"
        )
    return ending


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the path's ending; the same figure gives the same bytes.

    Raises:
        ConfigError: if the path ends otherwise.
        OutputError: if the file cannot be written.
        MissingExtra: if matplotlib is not installed.
    """
    ending = require_ending(path)
    needed("matplotlib", "plots")
    from matplotlib import rc_context

    # Type 42 fonts keep text as text, and publishers take no Type 3; a salt of our own makes SVG repeatable.
    settings = rc_context({"svg.hashsalt": "errata", "pdf.fonttype": 42, "ps.fonttype": 42})
    with written_whole(path) as temporary, settings:
        # Drawn in memory: where a disk is full, matplotlib's own clean-up of a PDF hides the reason.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=ending[1:], dpi=_DPI, metadata=_METADATA[ending])
        temporary.write_bytes(drawn.getvalue())
