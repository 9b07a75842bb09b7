"""Pictures of traces: what they show, that no text breaks them, and that files are whole and repeatable."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from errata.base.errors import ConfigError, MissingExtra, OutputError
from errata.plots.trace import save, trace_figure

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra errata-lm[plots]")

TOKENS = ("The", " Space", " Need", "le", " is", " in")
SUBJECT = (0, 3)


def maps(tokens: int = 6, layers: int = 12, parts=("state", "mlp", "attention")):
    """Three maps of probabilities, each with its own highest site."""
    rng = np.random.default_rng(0)
    drawn = {part: rng.uniform(0.1, 0.4, (tokens, layers)) for part in parts}
    for layer, values in enumerate(drawn.values()):
        values[-1, layer % layers] = 0.5 + 0.1 * layer
    return drawn


def panels(figure):
    """Axes of the maps, and of their colour bars, left to right."""
    both = [axis for axis in figure.axes if axis.images]
    return both, [axis.images[0].colorbar.ax for axis in both]


def rows(figure) -> list[str]:
    return [text.get_text() for text in panels(figure)[0][0].get_yticklabels()]


def labels(*tokens: str, subject=(0, 0)) -> list[str]:
    """The labels of these rows in a picture that is really drawn: warnings are errors here."""
    figure = trace_figure(maps(len(tokens), 3, ["state"]), tokens, subject)
    figure.canvas.draw()
    return rows(figure)


def test_one_map_a_part():
    drawn = maps()
    figure = trace_figure(drawn, TOKENS, SUBJECT, low=0.15, high=0.8, answer=" Seattle", window=10, title="XL")
    axes, bars = panels(figure)
    assert [axis.get_title() for axis in axes] == [
        "states restored\nin one layer",
        "MLP outputs restored\nin a window of 10 layers",
        "attention outputs restored\nin a window of 10 layers",
    ]
    assert [axis.images[0].get_cmap().name for axis in axes] == ["Purples", "Greens", "Reds"]
    assert [axis.yaxis.get_tick_params()["labelleft"] for axis in axes] == [True, False, False]
    assert [bar.get_ylabel() for bar in bars] == ["p(Seattle)"] * 3
    assert figure.get_suptitle() == "XL\np(Seattle): clean 0.8, corrupted 0.15"
    for axis, values in zip(axes, drawn.values(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), values)


def test_rows_are_tokens_from_above_and_columns_are_layers():
    values = np.zeros((6, 12))
    values[0, 11] = 1.0
    figure = trace_figure({"state": values}, TOKENS, SUBJECT)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].sum(axis=2)
    axis = panels(figure)[0][0]

    def pixel(token, layer):
        x, y = axis.transData.transform((layer, token))
        return pixels[pixels.shape[0] - int(y), int(x)]

    assert pixel(0, 11) < 300 < 700 < min(pixel(5, 11), pixel(0, 0), pixel(1, 11))
    low, high = axis.get_window_extent().get_points()
    assert axis.transData.transform((11, 0))[0] > (low[0] + high[0]) / 2, "late layers are on the right"
    assert axis.transData.transform((11, 0))[1] > (low[1] + high[1]) / 2, "the first token is at the top"


def test_all_maps_have_one_scale():
    axes, _ = panels(trace_figure(maps(), TOKENS, SUBJECT, low=0.2))
    assert {axis.images[0].get_clim() for axis in axes} == {(0.2, 0.7)}
    assert {axis.images[0].colorbar.extend for axis in axes} == {"min"}
    axes, _ = panels(trace_figure(maps(), TOKENS, SUBJECT, low=0.1))
    assert {axis.images[0].colorbar.extend for axis in axes} == {"neither"}


@pytest.mark.parametrize(
    ("values", "low", "expected"),
    [
        ([[0.1, 0.4]], None, (0.1, 0.4)),
        ([[0.1, 0.4]], 0.0, (0.0, 0.4)),
        ([[0.1, 0.4]], 0.9, (0.1, 0.4)),  # nothing is above the corrupted run
        ([[0.4, 0.4]], None, (0.4, 0.401)),
        ([[np.nan, 0.4, 0.6]], None, (0.4, 0.6)),
        ([[np.nan, np.inf]], None, (0.0, 1.0)),
        ([[np.nan, np.nan]], None, (0.0, 1.0)),
    ],
)
def test_ends_of_the_scale(values, low, expected):
    figure = trace_figure({"state": values}, ["x"], (0, 0), low=low)
    figure.canvas.draw()
    assert panels(figure)[0][0].images[0].get_clim() == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        (12, [0, 2, 4, 6, 8, 10]),
        (48, [0, 10, 20, 30, 40]),
        (80, [0, 10, 20, 30, 40, 50, 60, 70]),
        (1000, [0]),
    ],
)
def test_layer_ticks(layers, expected):
    figure = trace_figure(maps(2, layers, ["state"]), ["a", "b"], (0, 0))
    figure.canvas.draw()
    for axis in panels(figure)[0]:
        assert axis.get_xticks().tolist() == expected
        assert [text.get_text() for text in axis.get_xticklabels()] == [str(layer) for layer in expected]


@pytest.mark.parametrize(
    ("part", "window", "title", "below"),
    [
        ("state", 10, "states restored\nin one layer", "layer"),
        ("mlp", 1, "MLP outputs restored\nin one layer", "layer"),
        ("mlp", None, "MLP outputs restored\nin a window", "layer at the window's centre"),
        ("other", 4, "other restored\nin a window of 4 layers", "layer at the window's centre"),
        ("severed_mlp", 4, "states restored,\nMLPs severed", "layer"),
        ("severed_attention", None, "states restored,\nattention severed", "layer"),
    ],
)
def test_a_single_map(part, window, title, below):
    (axis,), (bar,) = panels(trace_figure(maps(parts=[part]), TOKENS, SUBJECT, window=window))
    assert (axis.get_title(), axis.get_xlabel(), bar.get_ylabel()) == (title, below, "p(answer)")


def test_severed_maps_have_the_colours_of_states():
    axes, _ = panels(trace_figure(maps(parts=["state", "severed_mlp", "severed_attention"]), TOKENS, SUBJECT))
    assert {axis.images[0].get_cmap().name for axis in axes} == {"Purples"}


def test_colour_bars_are_as_high_as_their_maps():
    figure = trace_figure(maps(), TOKENS, SUBJECT, low=0.3, high=0.8, title="one line\nand a second")
    figure.canvas.draw()
    for axis, bar in zip(*panels(figure), strict=True):
        box, beside = axis.get_window_extent(), bar.get_tightbbox(for_layout_only=True)
        assert bar.get_window_extent().y1 == pytest.approx(box.y1)
        assert box.x1 < beside.x0
        assert beside.y0 == pytest.approx(box.y0, abs=2), "with its arrow"


def test_no_heading_without_words():
    state = maps(parts=["state"])
    assert trace_figure(state, TOKENS, SUBJECT).get_suptitle() == ""
    assert trace_figure(state, TOKENS, SUBJECT, low=0.0).get_suptitle() == "p(answer): corrupted 0"


def test_long_headings_stay_inside():
    figure = trace_figure(maps(1, 3, ["state"]), ["a"], (0, 0), low=0.1, title="In downtown $eattle " * 9)
    figure.canvas.draw()
    drawn, (axis, *_) = figure._suptitle.get_window_extent(), figure.axes
    assert 0 < drawn.x0 < drawn.x1 < figure.bbox.x1
    assert axis.title.get_window_extent().y1 < drawn.y0 < drawn.y1 < figure.bbox.y1


# ---------------------------------------------------------------------------------------------
# Labels


def test_the_subject_is_starred():
    assert labels(*TOKENS, subject=(1, 3)) == ["The", "␣Space*", "␣Need*", "le*", "␣is", "␣in"]


def test_white_space_is_visible():
    assert labels(" ", "\n", "a b", "\t", "\u00a0", "\u200d", "", subject=(6, 6)) == [
        *("␣", "↵", "a␣b", r"\u{9}", r"\u{a0}", r"\u{200d}", "*")
    ]


def test_characters_without_a_glyph_are_escaped():
    assert labels(" 東", "🗼[1/3]", "é", "e\u0301", "\u0301", "\ue000", "Ω") == [
        *(r"␣\u{6771}*", r"\u{1f5fc}[1/3]", "é", "e\u0301", "◌\u0301", r"\u{e000}", "Ω")
    ]


def test_long_tokens_are_cut():
    shown = labels("antidisestablishmentarianism", "x" * 18, "x" * 19, " 東京タワー[1/2]", "[1/2]", "\n" * 5000)
    assert shown == [*("antidisestablishm…*", "x" * 18, "x" * 17 + "…", r"␣\u{6771}…[1/2]", "[1/2]", "↵" * 17 + "…")]


def test_text_is_never_mathematics():
    hostile = ("$a$", "$", r"$\frac{$", "_x^2", "%", r"\alpha", "{}")
    assert labels(*hostile)[1:] == list(hostile[1:])
    figure = trace_figure(maps(parts=["state"]), TOKENS, SUBJECT, low=0.1, answer=r"$\frac{$", title="$_$\nsecond 東")
    figure.canvas.draw()
    assert figure.get_suptitle() == "$_$\nsecond \\u{6771}\np($\\frac{$): corrupted 0.1"


@pytest.mark.parametrize(("answer", "shown"), [("\n", "p(↵)"), ("  Paris ", "p(Paris)"), ("", "p(answer)")])
def test_answers(answer, shown):
    _, (bar,) = panels(trace_figure(maps(parts=["state"]), TOKENS, SUBJECT, answer=answer))
    assert bar.get_ylabel() == shown


def test_other_fonts_are_asked_for_their_glyphs():
    def drawn_in(*families: str) -> list[str]:
        with matplotlib.rc_context({"font.family": list(families), "axes.formatter.use_mathtext": True}):
            return labels("a b", "\n", "x" * 19)

    signs, plain = ["a␣b*", "↵", "x" * 17 + "…"], ["a_b*", "\\n", "x" * 15 + "..."]
    assert drawn_in("cmtt10") == plain
    assert drawn_in("No Such Font", "cmtt10") == plain
    assert drawn_in("cmtt10", "DejaVu Sans") == signs
    assert drawn_in("No Such Font") == signs


# ---------------------------------------------------------------------------------------------
# Errors, files, imports


@pytest.mark.parametrize(
    ("drawn", "tokens", "subject", "message"),
    [
        ({}, TOKENS, SUBJECT, "nothing to draw"),
        ({"state": np.zeros((0, 3))}, (), (0, 0), "nothing to draw"),
        (maps(5), TOKENS, SUBJECT, r"'state' has the shape \[5, 12\] and there are 6 tokens"),
        ({"mlp": np.zeros(6)}, TOKENS, SUBJECT, r"'mlp' has the shape \[6\]"),
        ({"mlp": np.zeros((6, 0))}, TOKENS, SUBJECT, r"'mlp' has the shape \[6, 0\]"),
        ({"mlp": [["a"]] * 6}, TOKENS, SUBJECT, "'mlp' make no array of numbers"),
        ({"mlp": [[0.1], [0.1, 0.2]]}, TOKENS, SUBJECT, "'mlp' make no array of numbers"),
        (maps(), TOKENS, (3, 2), "tokens 3 to 2 of 6"),
        (maps(), TOKENS, (0, 6), "tokens 0 to 6 of 6"),
        (maps(), TOKENS, (-1, 2), "tokens -1 to 2 of 6"),
    ],
)
def test_what_does_not_fit_together(drawn, tokens, subject, message):
    with pytest.raises(ConfigError, match=message):
        trace_figure(drawn, tokens, subject)


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("A.PNG", b"\x89PNG")],
)
def test_files_are_repeatable(tmp_path, name, begins):
    for folder in ("one", "two"):
        figure = trace_figure(maps(6, 3, ["mlp"]), TOKENS, SUBJECT, low=0.1, high=0.7, answer="Seattle", window=3)
        save(figure, tmp_path / folder / name)
    save(figure, tmp_path / "again" / name)
    first, *others = [(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "again")]
    assert first.startswith(begins)
    assert all(other == first for other in others)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.gz", ".svg"])
def test_other_endings(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        save(trace_figure(maps(1, 1, ["mlp"]), ["a"], (0, 0)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError):
        save(trace_figure(maps(1, 1, ["mlp"]), ["a"], (0, 0)), tmp_path / "file" / "a.png")
    assert (tmp_path / "file").read_text() == "kept"


def test_without_matplotlib(monkeypatch, tmp_path):
    figure = trace_figure(maps(1, 1, ["mlp"]), ["a"], (0, 0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'errata-lm\[plots\]'"):
        trace_figure(maps(), TOKENS, SUBJECT)
    with pytest.raises(MissingExtra, match=r"pip install 'errata-lm\[plots\]'"):
        save(figure, tmp_path / "a.png")


def test_nothing_global_is_touched(tmp_path):
    """Importing brings in no matplotlib, and drawing no pyplot: no window system, no list of open figures."""
    program = """
import sys
from errata.plots.trace import save, trace_figure
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
save(trace_figure({"state": [[0.1, 0.2]]}, ["a"], (0, 0)), sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.svg")], check=True)


def test_where_the_corruption_helps_the_answer_no_site_is_cut_off():
    figure = trace_figure({"state": [[0.9, 0.4], [0.95, 0.2]]}, ["a", "b"], (0, 0), low=0.9, high=0.2)
    assert figure.axes[0].images[0].get_clim() == (0.2, 0.95)


def test_a_pdf_has_no_fonts_of_type_3(tmp_path):
    save(trace_figure(maps(), TOKENS, SUBJECT), tmp_path / "t.pdf")
    drawn = (tmp_path / "t.pdf").read_bytes()
    assert b"/Type3" not in drawn
    assert b"/FontFile2" in drawn  # TrueType: what Type 42 is in a PDF
