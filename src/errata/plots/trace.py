"""Causal traces as heat maps, after Figure 1 (e, f, g) of the paper.

One map a part, tokens down and layers across; the subject's tokens are starred. The colour of a site is
P*,clean[o], the answer's probability when that site alone is restored. All maps of a figure share one scale.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.base.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# The paper's colours. Each runs from light to dark, so that maps can be read without colour vision.
_COLOURS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}
_OTHER_COLOURS = "Blues"
_NAMES = {"state": "states", "mlp": "MLP outputs", "attention": "attention outputs"}

_LABEL_LENGTH = 18  # characters of a token's label
_FRACTION = re.compile(r"\[\d+/\d+\]$")  # of a character, as readable tokens end in it

_ROW, _COLUMN = 0.2, 0.055  # inches of a token and of a layer
_NARROWEST, _WIDEST = 1.7, 3.6  # inches of a map
_BAR = 0.09  # inches of a colour bar's width
_LETTER = 0.08  # inches of a letter of the heading, rather more than less
_DPI = 200

# Nothing that differs between two writings of the same figure: neither the time nor versions.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


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
        maps: for each part ("state", "mlp", "attention", or another name) probabilities `[tokens, layers]`;
            sites without a finite one are grey.
        tokens: one label a row. White space in them is made visible, long ones are cut, and characters
            for which matplotlib's fonts (`rcParams["font.family"]`) have no glyph read like `\\u{1f5fc}`.
        subject: indexes of the subject's first and last token, both inclusive.
        low: the corrupted run's probability, at which the colours begin; if None, or if no site is above
            it, they begin at the lowest value.
        high: the clean run's probability, told above the maps.
        answer: whose probability it is, for the labels.
        window: how many layers were restored together in parts other than "state".
        title: a line above the maps.

    Raises:
        ConfigError: if there are no maps, or maps, tokens and subject do not fit together.
        MissingExtra: if matplotlib is not installed.
    """
    needed("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    arrays = _checked(maps, tokens, subject)
    begin, end = _scale(arrays.values(), low)
    glyphs = _glyphs()
    name = (answer or "").strip() or answer or "answer"
    probability = f"p({_visible(name, glyphs)})"

    widths = [min(max(_COLUMN * array.shape[1], _NARROWEST), _WIDEST) for array in arrays.values()]
    height = _ROW * max(len(tokens), 4)
    figure = Figure((sum(widths) + 0.8 * len(arrays) + 1.4, height + 1.3), dpi=_DPI / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure.set_layout_engine(layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(arrays), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axis, (part, array) in zip(axes, arrays.items(), strict=True):
        image = axis.imshow(
            np.ma.masked_invalid(array),
            norm=Normalize(begin, end),
            cmap=_COLOURS.get(part, _OTHER_COLOURS),
            aspect="auto",
        )
        axis.set_facecolor("0.8")
        well_below = np.nanmin(array, initial=begin) < begin - 0.02 * (end - begin)
        bar = figure.colorbar(
            image,
            ax=axis,
            extend="min" if well_below else "neither",
            extendfrac=_BAR / height,
            aspect=height / _BAR,
            fraction=0.05,
            pad=0.02,
        )
        bar.ax.tick_params(labelsize=7)
        bar.set_label(probability, fontsize=8)
        _plain(bar.ax.yaxis.label)
        _decorate(axis, part, array.shape[1], window)

    first, last = subject
    labels = [_label(token, glyphs) + "*" * (first <= row <= last) for row, token in enumerate(tokens)]
    axes[0].set_yticks(range(len(tokens)), labels)
    for text in axes[0].get_yticklabels():
        _plain(text)
    heading = [_visible(line, glyphs) for line in (title or "").splitlines()]
    runs = [f"{run} {value:.3g}" for run, value in (("clean", high), ("corrupted", low)) if value is not None]
    if runs:
        heading.append(f"{probability}: {', '.join(runs)}")
    if heading:
        # Not matplotlib's own wrapping, which takes dollar signs for mathematics.
        room = int(figure.get_figwidth() / _LETTER)
        lines = [line for part in heading for line in textwrap.wrap(part, room)]
        _plain(figure.suptitle("\n".join(lines), fontsize=9))
    # Laid out here once and for all: every further drawing would shift things by a hair.
    layout.execute(figure)
    figure.set_layout_engine("none")
    return figure


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

    with written_whole(path) as temporary, rc_context({"svg.hashsalt": "errata"}):
        figure.savefig(temporary, format=ending[1:], dpi=_DPI, metadata=_METADATA[ending])


def _checked(
    maps: Mapping[str, ArrayLike], tokens: Sequence[str], subject: tuple[int, int]
) -> dict[str, NDArray[np.float64]]:
    """The maps as arrays, once it is sure that everything fits together."""
    arrays = {part: np.asarray(values, dtype=np.float64) for part, values in maps.items()}
    if not arrays or not tokens:
        raise ConfigError("there is nothing to draw: give at least one map and one token")
    for part, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != len(tokens) or array.shape[1] == 0:
            raise ConfigError(
                f"the map {part!r} has the shape {list(array.shape)} and there are {len(tokens)} tokens: "
                "give it as [tokens, layers]"
            )
    first, last = subject
    if not 0 <= first <= last < len(tokens):
        raise ConfigError(
            f"the subject cannot be tokens {first} to {last} of {len(tokens)}: "
            "give the indexes of its first and its last token"
        )
    return arrays


def _scale(arrays: Iterable[NDArray[np.float64]], low: float | None) -> tuple[float, float]:
    """The values at which the colours of all maps begin and end."""
    values = np.concatenate([array[np.isfinite(array)] for array in arrays])
    if values.size == 0:
        return 0.0, 1.0
    end = float(values.max())
    begin = low if low is not None and low < end else float(values.min())
    return (begin, end) if begin < end else (begin, begin + 1e-3)


def _decorate(axis: Axes, part: str, layers: int, window: int | None) -> None:
    """Title and ticks of one map."""
    single = part == "state" or window == 1
    where = "one layer" if single else "a window" if window is None else f"a window of {window} layers"
    _plain(axis.set_title(f"{_NAMES.get(part, part)} restored\nin {where}", fontsize=9))
    axis.set_xlabel("layer" if single else "layer at the window's centre", fontsize=8)
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= 8 * step)
    axis.set_xticks(range(0, layers, step))
    axis.tick_params(labelsize=8, length=2)
    for spine in axis.spines.values():
        spine.set_linewidth(0.5)


def _plain(text: Text) -> None:
    """Keep matplotlib from reading dollar signs and backslashes as mathematics."""
    text.set_parse_math(False)
    text.set_usetex(False)


def _label(token: str, glyphs: set[int]) -> str:
    """A token as the label of its row: spaces visible, cut where it is long."""
    fraction = _FRACTION.search(token)
    ending = fraction[0] if fraction else ""  # never cut off: it tells rows apart
    space, ellipsis = _sign("␣", "_", glyphs), _sign("…", "...", glyphs)
    room = _LABEL_LENGTH - len(ending)
    text = token.removesuffix(ending).replace(" ", space)
    if len(_visible(text, glyphs)) > room:
        text = text[:room]
        while len(_visible(text, glyphs)) > room - len(ellipsis):
            text = text[:-1]
        text += ellipsis
    return _visible(text, glyphs) + ending


def _visible(text: str, glyphs: set[int]) -> str:
    """The text with signs or escapes for characters that show nothing or that the fonts do not have."""
    pieces = []
    for character in text:
        if character == "\n":
            pieces.append(_sign("↵", "\\n", glyphs))
        elif ord(character) in glyphs and (character == " " or unicodedata.category(character)[0] not in "CZ"):
            pieces.append(character)
        else:
            pieces.append(f"\\u{{{ord(character):x}}}")
    if pieces and unicodedata.combining(pieces[0][0]):  # an accent without its letter
        pieces.insert(0, _sign("◌", " ", glyphs))
    return "".join(pieces)


def _sign(sign: str, otherwise: str, glyphs: set[int]) -> str:
    return sign if ord(sign) in glyphs else otherwise


def _glyphs() -> set[int]:
    """Code points that matplotlib can draw with the fonts that it is set to, fall-backs included."""
    from matplotlib import font_manager, rcParams

    paths = []
    for family in rcParams["font.family"]:
        properties = font_manager.FontProperties(family=[family])
        with contextlib.suppress(ValueError):  # not installed: matplotlib passes over it too
            paths.append(font_manager.findfont(properties, fallback_to_default=False))
    paths = paths or [font_manager.findfont("DejaVu Sans")]  # its last resort, which it brings along
    return {code for path in paths for code in font_manager.get_font(path).get_charmap()}
