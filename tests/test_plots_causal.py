"""Pictures of averages, lines, severed effects and gradients: what is drawn where, and that all can be read."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest

from errata.base.errors import ConfigError
from errata.plots.averages import average_figure
from errata.plots.drawing import save
from errata.plots.gradients import gradients_figure
from errata.plots.lines import lines_figure
from errata.plots.severed import severed_figure

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra errata-lm[plots]")

PARTS = ("state", "mlp", "attention")
ROLES = ("subject_first", "subject_middle", "subject_last", "after_subject", "further", "last")
NAMES = [
    "first subject token*",
    "middle subject tokens*",
    "last subject token*",
    "first subsequent token",
    "further tokens",
    "last token",
]
TOKENS = ("In", " antidisestablishmentarianism", " 東京", "cel", "$x$", "\n", " is")
LABELS = ["In", "␣antidisestablish…*", r"␣\u{6771}\u{4eac}*", "cel*", "$x$", "↵", "␣is"]
SUBJECT = (1, 3)


def values(rows: int = 6, layers: int = 12, parts=PARTS, high: float = 0.1):
    """An array a part, of values from nearly zero to `high`, all different."""
    rng = np.random.default_rng(1)
    return {part: high * rng.uniform(0.01, 1 - 0.1 * place, (rows, layers)) for place, part in enumerate(parts)}


def around(mean, half: float = 0.01):
    """Ends of intervals around means."""
    return {part: array - half for part, array in mean.items()}, {part: array + half for part, array in mean.items()}


def bars_of(layers: int = 12, parts=("state", "severed_attention", "severed_mlp")):
    return {part: array[0] for part, array in values(1, layers, parts).items()}


@cache
def averages(layers: int = 12):
    return average_figure(values(6, layers), ROLES, counts=(1209, 884, 1209, 1209, 1190, 1209), window=10, title="XL")


@cache
def lines(layers: int = 12):
    mean = values(6, layers)
    return lines_figure(mean, *around(mean), ROLES, window=10, title="XL")


@cache
def severed(layers: int = 12):
    mean = bars_of(layers)
    return severed_figure(mean, *around(mean), title="XL")


@cache
def gradients(layers: int = 12):
    effects, norms = values(7, layers, high=0.5), values(7, layers, high=1e-5)
    return gradients_figure(effects, norms, TOKENS, SUBJECT, answer=" Seattle", window=10, title="XL")


def maps(figure):
    """Axes of maps, row by row, and those of their colour bars."""
    axes = [axis for axis in figure.axes if axis.images]
    return axes, [axis.images[0].colorbar.ax for axis in axes]


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def drawn_texts(figure):
    """All texts that are seen, but for ticks outside of their axis."""
    figure.canvas.draw()
    found = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.findobj(matplotlib.axes.Axes):
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text is not None and text.get_visible() and text.get_text()]


# ---------------------------------------------------------------------------------------------
# All


@pytest.mark.parametrize("layers", [1, 48])
@pytest.mark.parametrize("draw", [averages, lines, severed, gradients])
def test_texts_are_inside_and_apart(draw, layers):
    figure = draw(layers)
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, box), (other, beside) in combinations(boxes, 2):
        assert not box.overlaps(beside), f"{one!r} and {other!r}"
    for text, box in boxes:
        for axis in figure.findobj(matplotlib.axes.Axes):
            assert not box.overlaps(axis.get_window_extent()), f"{text!r} hides what is drawn"


def test_headings_take_nothing_from_maps():
    heights = [
        average_figure(values(), ROLES, title=title).axes[0].get_window_extent().height
        for title in (None, "one line", "a long title " * 40)
    ]
    assert max(heights) < 1.15 * min(heights)


@pytest.mark.parametrize(("draw", "ending"), [(averages, "svg"), (lines, "pdf"), (severed, "png"), (gradients, "svg")])
def test_files_are_repeatable(tmp_path, draw, ending):
    save(draw(), tmp_path / f"a.{ending}")
    save(draw(), tmp_path / f"b.{ending}")
    save(draw.__wrapped__(), tmp_path / f"c.{ending}")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_nothing_global_is_touched():
    """Importing brings in no matplotlib, and drawing neither pyplot nor torch."""
    program = """
import sys
from errata.plots.averages import average_figure
from errata.plots.gradients import gradients_figure
from errata.plots.lines import lines_figure
from errata.plots.severed import severed_figure
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
one = {"state": [[0.1, 0.2]]}
average_figure(one, ["last"])
lines_figure(one, one, one, ["last"])
gradients_figure(one, one, ["a"], (0, 0))
severed_figure({"state": [0.1]}, {"state": [0.1]}, {"state": [0.1]})
assert matplotlib.rcParams.copy() == before
assert not {"matplotlib.pyplot", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------------------------------------
# Averages


def test_averages_are_one_map_a_part():
    axes, bars = maps(averages())
    assert [axis.get_title() for axis in axes] == [
        "states restored\nin one layer",
        "MLP outputs restored\nin a window of 10 layers",
        "attention outputs restored\nin a window of 10 layers",
    ]
    assert [axis.get_xlabel() for axis in axes] == ["layer", *["layer at the window's centre"] * 2]
    assert [axis.images[0].get_cmap().name for axis in axes] == ["Purples", "Greens", "Reds"]
    assert {bar.get_ylabel() for bar in bars} == {"AIE (percentage points)"}
    assert texts(axes[0].yaxis) == [
        f"{name} (n = {n})" for name, n in zip(NAMES, ("1,209", "884", "1,209", "1,209", "1,190", "1,209"), strict=True)
    ]
    for axis, array in zip(axes, values().values(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), array)


def test_averages_share_a_scale_from_zero():
    mean = {"state": [[0.02, 0.16]], "severed_mlp": [[0.01, 0.04]]}
    axes, bars = maps(average_figure(mean, ["subject_last"]))
    assert {axis.images[0].get_clim() for axis in axes} == {(0.0, 0.16)}
    assert {axis.images[0].get_cmap().name for axis in axes} == {"Purples"}
    assert axes[1].get_title() == "states restored,\nMLPs severed"
    for bar in bars:
        bar.figure.canvas.draw()
        assert texts(bar.yaxis)[:3] == ["0", "2", "4"], "percentage points"


@pytest.mark.parametrize(("lowest", "extend"), [(-0.05, "min"), (-0.001, "neither"), (0.01, "neither")])
def test_averages_below_zero_are_told_by_all_bars(lowest, extend):
    axes, _ = maps(average_figure({"state": [[0.1, lowest]], "mlp": [[0.05, 0.01]]}, ["last"]))
    assert {axis.images[0].colorbar.extend for axis in axes} == {extend}
    assert {axis.images[0].get_clim() for axis in axes} == {(0.0, 0.1)}


def test_averages_of_roles_that_no_fact_has_are_grey():
    mean = values()
    for array in mean.values():
        array[1] = np.nan
    figure = average_figure(mean, ROLES, counts=(3, 0, 3, 3, 3, 3))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    axes, _ = maps(figure)
    for axis in axes:
        for layer in (0, 11):
            x, y = axis.transData.transform((layer, 1)).astype(int)
            assert pixels[len(pixels) - y, x].tolist() == [204] * 3
            x, y = axis.transData.transform((layer, 2)).astype(int)
            assert pixels[len(pixels) - y, x].tolist() != [204] * 3
    assert texts(axes[0].yaxis)[1] == "middle subject tokens* (n = 0)"


def test_averages_without_any_value():
    axes, _ = maps(average_figure({"state": np.full((6, 3), np.nan)}, ROLES))
    assert texts(axes[0].yaxis) == NAMES
    assert axes[0].images[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(
    ("mean", "roles", "counts", "message"),
    [
        ({}, ROLES, None, "nothing to draw"),
        (values(), (), None, "nothing to draw"),
        (
            values(5),
            ROLES,
            None,
            r"'state' has the shape \[5, 12\] and there are 6 roles: give it as \[roles, layers\]",
        ),
        ({"mlp": np.zeros(6)}, ROLES, None, r"'mlp' has the shape \[6\]"),
        (values(), ROLES, (1, 2), "2 counts and 6 roles"),
    ],
)
def test_averages_that_do_not_fit(mean, roles, counts, message):
    with pytest.raises(ConfigError, match=message):
        average_figure(mean, roles, counts=counts)


# ---------------------------------------------------------------------------------------------
# Lines


def roles_drawn(axis):
    """Lines of roles, without the one at zero."""
    return [line for line in axis.lines if line.get_marker() != "None"]


def test_lines_are_means_with_their_intervals():
    mean = values()
    figure = lines()
    assert [axis.get_title().split()[0] for axis in figure.axes] == ["states", "MLP", "attention"]
    assert figure.axes[0].get_ylabel() == "AIE (percentage points)"
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    for axis, array in zip(figure.axes, mean.values(), strict=True):
        assert len(roles_drawn(axis)) == len(axis.collections) == 6
        for line, band, row in zip(roles_drawn(axis), axis.collections, array, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([np.arange(12), row], axis=1))
            box = band.get_datalim(axis.transData)
            assert (box.y0, box.y1) == pytest.approx((row.min() - 0.01, row.max() + 0.01))
            assert band.get_facecolor()[0, :3].tolist() == list(matplotlib.colors.to_rgb(line.get_color()))


def test_lines_differ_in_more_than_colour():
    mean = values(14)
    figure = lines_figure(mean, *around(mean), [*ROLES, *map(str, range(8))])
    found = roles_drawn(figure.axes[0])
    assert len({line.get_color() for line in found[:7]}) == len({line.get_marker() for line in found[:7]}) == 7
    assert len({(line.get_color(), line.get_marker()) for line in found}) == 14


def test_lines_have_one_legend_beside_them():
    figure = lines()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES
    assert [handle.get_color() for handle in legend.get_lines()] == [
        line.get_color() for line in roles_drawn(figure.axes[0])
    ]
    assert "95 %" in legend.get_title().get_text()
    figure.canvas.draw()
    assert all(axis.get_window_extent().x1 < legend.get_window_extent().x0 for axis in figure.axes)


def test_lines_of_roles_that_no_fact_has():
    mean = values()
    mean["state"][:3] = np.nan
    mean["mlp"][1:3] = np.nan
    mean["attention"][1] = np.nan
    figure = lines_figure(mean, *around(mean), ROLES)
    assert [len(roles_drawn(axis)) for axis in figure.axes] == [3, 4, 5]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [NAMES[0], *NAMES[2:]]
    nothing = {"state": np.full((6, 2), np.nan)}
    assert not lines_figure(nothing, nothing, nothing, ROLES).legends


@pytest.mark.parametrize("end", [np.nan, np.inf])
def test_means_without_intervals(end):
    mean = values(6, 3, ["state"])
    low, high = {"state": np.full((6, 3), -end)}, {"state": np.full((6, 3), end)}
    figure = lines_figure(mean, low, high, ROLES)
    figure.canvas.draw()
    assert len(roles_drawn(figure.axes[0])) == 6
    first = [{"state": of["state"][0]} for of in (mean, low, high)]
    severed_figure(*first).canvas.draw()


def test_lines_of_many_layers_have_few_markers():
    line = roles_drawn(lines(48).axes[0])[0]
    first, every = line.get_markevery()
    assert len(range(first, 48, every)) == 12
    assert roles_drawn(lines(12).axes[0])[5].get_markevery() == (0, 1)


def test_lines_of_one_layer_stand_side_by_side():
    figure = lines(1)
    figure.canvas.draw()
    for axis in figure.axes:
        places = [line.get_xdata()[0] for line in roles_drawn(axis)]
        assert len(set(places)) == 6
        assert sum(places) == pytest.approx(0)
        assert texts(axis.xaxis) == ["0"]
        assert all(band.get_linewidth()[0] > 1 for band in axis.collections), "or no interval is seen"


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (values(parts=["state"]), values(), "lower end is of state and what it belongs to of state, mlp, attention"),
        (values(), {}, "upper end is of nothing"),
        (values(layers=11), values(), r"lower end of 'state' has the shape \[6, 11\] .* \[6, 12\]"),
        (around(values())[1], around(values())[0], "an interval of 'state' ends before it begins"),
    ],
)
def test_lines_that_do_not_fit(low, high, message):
    with pytest.raises(ConfigError, match=message):
        lines_figure(values(), low, high, ROLES)


# ---------------------------------------------------------------------------------------------
# Severed


def test_bars_stand_side_by_side_at_their_layers():
    mean = bars_of()
    figure = severed()
    (axis,) = figure.axes
    groups = axis.containers[::2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "effect of restoring the state",
        "with attention severed",
        "with MLPs severed",
    ]
    edges = []
    for group, array in zip(groups, mean.values(), strict=True):
        assert [bar.get_height() for bar in group] == array.tolist()
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in group] == list(range(12))
        edges += [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in group]
    edges.sort()
    assert all(end <= begin + 1e-9 for (_, end), (begin, _) in pairwise(edges))


def test_bars_have_their_intervals():
    mean = bars_of()
    mean["severed_mlp"][3] = np.nan
    low, high = around(mean)
    high["state"] += 0.02  # an interval need not be even
    (axis,) = severed_figure(mean, low, high).axes
    for place, part in enumerate(mean):
        bars, errors = axis.containers[2 * place : 2 * place + 2]
        for bar, segment, ends in zip(
            bars, errors[2][0].get_segments(), zip(low[part], high[part], strict=True), strict=True
        ):
            if np.isfinite(ends).all():
                np.testing.assert_allclose(segment[:, 1], ends)
                np.testing.assert_allclose(segment[:, 0], bar.get_x() + bar.get_width() / 2)
            else:
                assert np.isnan(bar.get_height())


@pytest.mark.parametrize(("layers", "ticks"), [(1, [0]), (12, list(range(12))), (48, list(range(0, 48, 2)))])
def test_bars_of_many_layers_have_room(layers, ticks):
    figure = severed(layers)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert axis.get_xticks().tolist() == ticks
    bar = axis.containers[0][0].get_window_extent().width / figure.dpi
    assert bar > 0.05, "inches"
    low, high = axis.get_xlim()
    assert low <= -0.5
    assert high >= layers - 0.5


def test_bars_of_states_alone():
    mean = bars_of(parts=["state"])
    (axis,) = severed_figure(mean, *around(mean)).axes
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in axis.containers[0]], np.arange(12))


@pytest.mark.parametrize(
    ("mean", "low", "message"),
    [
        ({}, {}, "bars are of 'state' .* got nothing"),
        (bars_of(parts=["severed_mlp"]), {}, "bars are of 'state' .* got severed_mlp"),
        (bars_of(parts=["state", "mlp"]), {}, "got state, mlp"),
        ({"state": np.zeros(3), "severed_mlp": np.zeros(4)}, {}, r"'state' \[3\], 'severed_mlp' \[4\]"),
        ({"state": np.zeros((2, 3))}, {}, r"'state' \[2, 3\]"),
        ({"state": []}, {"state": []}, r"'state' \[0\]"),
        (bars_of(), bars_of(11), r"lower end of 'state' has the shape \[11\]"),
    ],
)
def test_bars_that_do_not_fit(mean, low, message):
    with pytest.raises(ConfigError, match=message):
        severed_figure(mean, low, mean)


# ---------------------------------------------------------------------------------------------
# Gradients


def test_effects_are_above_gradients():
    figure = gradients()
    axes, bars = maps(figure)
    above, below = values(7, high=0.5), values(7, high=1e-5)
    for axis, array in zip(axes, [*above.values(), *below.values()], strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), array)
    assert [axis.get_title() for axis in axes[2:]] == [
        "attention outputs restored\nin a window of 10 layers",
        "integrated gradients\nof states",
        "integrated gradients\nof MLP outputs",
        "integrated gradients\nof attention outputs",
    ]
    assert [axis.get_xlabel() for axis in axes[3:]] == ["layer"] * 3, "gradients have no window"
    assert [axis.images[0].get_cmap().name for axis in axes] == ["Purples", "Greens", "Reds"] * 2
    assert [bar.get_ylabel() for bar in bars] == ["IE (percentage points)"] * 3 + ["norm"] * 3
    heights = [axis.get_position().y0 for axis in axes]
    assert max(heights[3:]) < min(heights[:3])
    assert figure.get_suptitle().startswith("XL\nabove: indirect effect (IE) on p(Seattle)")


def test_effects_share_a_scale_and_gradients_have_one_each():
    effects, norms = values(7, 2, ["state", "mlp"], high=0.5), values(7, 2, ["state", "mlp"], high=1e-5)
    effects["mlp"][0, 0] = -0.1
    axes, _ = maps(gradients_figure(effects, norms, TOKENS, SUBJECT))
    assert {axis.images[0].get_clim() for axis in axes[:2]} == {(0.0, max(map(np.max, effects.values())))}
    assert [axis.images[0].get_clim() for axis in axes[2:]] == [(0.0, np.max(norm)) for norm in norms.values()]
    assert [axis.images[0].colorbar.extend for axis in axes] == ["min"] * 2 + ["neither"] * 2


def test_tokens_are_told_once_a_row():
    axes, _ = maps(gradients())
    assert [axis.yaxis.get_tick_params()["labelleft"] for axis in axes] == [True, False, False] * 2
    assert texts(axes[0].yaxis) == texts(axes[3].yaxis) == LABELS


def test_gradients_of_long_prompts_have_room():
    tokens = [f"token{i}" for i in range(40)]
    effects = values(40, 2, ["state"])
    figure = gradients_figure(effects, effects, tokens, (0, 1), title="long " * 60)
    boxes = [text.get_window_extent() for text in drawn_texts(figure) if text.get_text().startswith("token")]
    assert len(boxes) == 80
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize(
    ("effects", "norms", "subject", "message"),
    [
        ({}, {}, SUBJECT, "nothing to draw"),
        (values(6), values(6), SUBJECT, r"\[6, 12\] and there are 7 tokens"),
        (values(7), values(7, parts=["state"]), SUBJECT, "the gradients' norm is of state"),
        (values(7), values(7, 11), SUBJECT, r"the gradients' norm of 'state' has the shape \[7, 11\]"),
        (values(7), values(7), (3, 7), "tokens 3 to 7 of 7"),
    ],
)
def test_gradients_that_do_not_fit(effects, norms, subject, message):
    with pytest.raises(ConfigError, match=message):
        gradients_figure(effects, norms, TOKENS, subject)
