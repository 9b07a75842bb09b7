"""Pictures of edits over many records: what is drawn where, and that all can be read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from errata.base.errors import ConfigError
from errata.plots.drawing import save
from errata.plots.sequence import sequence_figure
from errata.plots.setting_scores import settings_figure

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra errata-lm[plots]")

METRICS = ("es", "ps", "ns", "s")
TOKENS = ("subject_first", "subject_last", "after_subject", "last")
UNEDITED = {"es": 0.2, "ps": 0.25, "ns": 0.79, "s": 0.31}


def scores(layers: int = 8, tokens: int = 4):
    rng = np.random.default_rng(0)
    return {metric: rng.uniform(0.2, 0.9, (tokens, layers)) for metric in METRICS}


def layers(count: int = 8, mean=None, at=None, tokens=TOKENS, unedited=UNEDITED, title="XL"):
    mean = mean or scores(count, len(tokens))
    low, high = ({name: each + by for name, each in mean.items()} for by in (-0.05, 0.05))
    at = range(count) if at is None else at
    return settings_figure(mean, low, high, tokens, at, along="layer", unedited=unedited, title=title)


def recall(points: int = 101):
    at = np.arange(points)
    return at.tolist(), {"untouched": 1 - 0.1 * at / points, "edited": 1 - at / points, "newest": 1 - 0.2 * at / points}


def sequence(points: int = 101, **changes):
    return sequence_figure(*recall(points), **{"newest": 10, "title": "XL", **changes})


def lines(axis):
    """The lines of an axis that are no help lines: those with markers."""
    return [line for line in axis.lines if line.get_marker() != "None"]


def drawn_texts(figure):
    figure.canvas.draw()
    found = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text is not None and text.get_visible() and text.get_text()]


@pytest.mark.parametrize(
    ("draw", "size"), [*((layers, count) for count in (1, 6, 8, 48, 96)), *((sequence, n) for n in (2, 101, 1001))]
)
def test_texts_are_inside_and_apart(draw, size):
    figure = draw(size)
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, box), (other, beside) in combinations(boxes, 2):
        assert not box.overlaps(beside), f"{one!r} and {other!r}"
    for text, box in boxes:
        assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes), f"{text!r} hides what is drawn"


@pytest.mark.parametrize("draw", [layers, sequence])
def test_the_same_figure_is_the_same_bytes(draw, tmp_path):
    figure = draw()
    for ending in (".png", ".svg", ".pdf"):
        for name in "ab":
            save(figure, tmp_path / f"{name}{ending}")
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_each_metric_has_its_panel_each_token_its_line_and_the_unedited_model_another():
    mean = scores()
    figure = layers(mean=mean)
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == [
        "efficacy",
        "generalisation",
        "specificity",
        "score S",
    ]
    for metric, axis in zip(METRICS, figure.axes, strict=True):
        for row, line in enumerate(lines(axis)):
            np.testing.assert_array_equal(line.get_ydata(), mean[metric][row])
            np.testing.assert_array_equal(line.get_xdata(), np.arange(8))
            band = axis.collections[row].get_paths()[0].vertices
            assert {0.05} == set(
                np.abs(np.interp(band[1:9, 0], np.arange(8), mean[metric][row]) - band[1:9, 1]).round(9)
            )
        assert any(line.get_linestyle() != "-" and set(line.get_ydata()) == {UNEDITED[metric]} for line in axis.lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *TOKENS,
        "unedited model",
    ]


def test_lines_can_be_told_apart_without_colours():
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines(layers().axes[0])]
    assert len({marker for _, marker, _ in looks}) == len({colour for colour, _, _ in looks}) == 4


def test_layers_stand_where_they_are_in_any_order():
    mean = scores(3)
    axis = layers(3, mean, at=(12, 4, 40)).axes[0]
    (line, *_) = lines(axis)
    assert line.get_xdata().tolist() == [4, 12, 40]
    assert line.get_ydata().tolist() == mean["es"][0, [1, 0, 2]].tolist()
    assert axis.get_xticks().tolist() == [4, 12, 40]


def test_values_without_a_score_have_no_point():
    mean = scores()
    mean["es"][0] = np.nan
    mean["es"][1, 3] = np.nan
    for metric in METRICS:
        mean[metric][3] = np.nan
    figure = layers(mean=mean, unedited=None)
    assert [len(line.get_xdata()) for line in lines(figure.axes[0])] == [7, 8]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "subject_last",
        "after_subject",
        "subject_first",
    ]
    nothing = {metric: np.full((4, 8), np.nan) for metric in METRICS}
    assert not layers(mean=nothing, unedited=None).legends


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mean": {"es": np.zeros((3, 8))}}, "shape"),
        ({"at": range(7)}, "there are 7 places"),
    ],
)
def test_what_does_not_fit(change, named):
    with pytest.raises(ConfigError, match=named):
        layers(**{"mean": scores(), **change})


def test_recall_against_edits():
    at, wanted = recall(11)
    wanted["edited"][0] = wanted["newest"][0] = np.nan
    figure = sequence_figure(at, wanted, newest=10)
    (axis,) = figure.axes
    untouched, edited, newest = lines(axis)
    np.testing.assert_array_equal(untouched.get_ydata(), wanted["untouched"])
    np.testing.assert_array_equal(edited.get_xdata(), at[1:])
    np.testing.assert_array_equal(newest.get_ydata(), wanted["newest"][1:])
    assert len({line.get_marker() for line in lines(axis)}) == len({line.get_color() for line in lines(axis)}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "untouched facts",
        "all edits so far",
        "the newest 10, when made",
    ]
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 10), (-0.03, 1.03))


@pytest.mark.parametrize(
    ("edits", "recalled", "named"),
    [
        ([], {"edited": []}, "one at least"),
        ([0, 1], {}, "nothing"),
        ([0, 1], {"forgotten": [1, 1]}, "forgotten"),
        ([0, 1], {"edited": [1]}, "'edited' \\[1\\]"),
        ([0, 1], {"edited": ["x", "y"]}, "no array"),
    ],
)
def test_what_makes_no_line(edits, recalled, named):
    with pytest.raises(ConfigError, match=named):
        sequence_figure(edits, recalled)
