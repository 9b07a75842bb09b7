"""Scores along a setting of an editor: which rows make which line, and what cannot be drawn."""

from __future__ import annotations

import pytest

from errata.base.errors import ConfigError
from errata.cli.evaluate import _spread
from errata.evaluation.results import Run
from errata.evaluation.setting_scores import SettingScores
from errata.plots.drawing import save
from errata.plots.setting_scores import settings_figure
from made_runs import counterfact_records, counterfact_result, write_run, zsre_records, zsre_result

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra errata-lm[plots]")


def run(tmp_path, configs: dict[str, dict], editors: dict[str, str] | None = None) -> Run:
    records = counterfact_records(5)
    made = {"unedited": "unedited", **{name: ("rome", "ft")[i % 2] for i, name in enumerate(configs)}}
    results = {name: [counterfact_result(record, kind) for record in records] for name, kind in made.items()}
    editors = editors or dict.fromkeys(configs, "ft-l")
    return Run.load(write_run(tmp_path / "run", records, results, editors=editors, configs=configs))


def test_other_settings_make_lines_and_what_follows_the_value_does_not(tmp_path):
    configs = {
        f"l{layer}e{epsilon}": {"layer": layer, "epsilon": epsilon, "moment": f"of {layer}", "steps": 25}
        for layer in (3, 0)
        for epsilon in (0.5, 0.25)
    }
    found = SettingScores.of(run(tmp_path, configs), "layer")
    assert (found.at, found.lines) == ((0.0, 3.0), ("epsilon 0.5", "epsilon 0.25"))
    numbers = run(tmp_path, configs).numbers(run(tmp_path, configs).edited["l0e0.25"])["ps"]
    assert found.scores["ps"]["epsilon 0.25", 0.0].mean == pytest.approx(sum(numbers.values()) / len(numbers))
    other = SettingScores.of(run(tmp_path, configs), "epsilon")
    assert (other.at, other.lines) == ((0.25, 0.5), ("layer 3", "layer 0"))


def test_editors_make_lines_and_a_row_without_the_setting_is_left_out(tmp_path):
    configs = {"a": {"layer": 1}, "b": {"layer": 2}, "c": {"layer": 2}, "d": {"layer": None}, "e": {"layer": True}}
    editors = {"a": "ft", "b": "ft", "c": "rome", "d": "rome", "e": "rome"}
    found = SettingScores.of(run(tmp_path, configs, editors), "layer")
    assert (found.at, found.lines) == ((1.0, 2.0), ("ft", "rome"))
    assert ("rome", 1.0) not in found.scores["s"]


def test_the_figure_has_a_panel_a_metric_and_a_point_where_there_is_one(tmp_path):
    configs = {"a": {"layer": 1}, "b": {"layer": 2}, "c": {"layer": 2}}
    figure = SettingScores.of(run(tmp_path, configs, {"a": "ft", "b": "ft", "c": "rome"}), "layer").figure()
    assert len(figure.axes) == 4
    drawn = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert [list(line.get_xdata()) for line in drawn] == [[1, 2], [2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ft", "rome", "unedited model"]
    assert figure.axes[0].get_xlabel() == "layer"
    save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(("at", "scale"), [((1e-4, 1e-3), "log"), ((0.5, 1.0), "linear"), ((0, 1, 47), "linear")])
def test_wide_settings_are_drawn_logarithmically(at, scale):
    values = {"es": [[0.5] * len(at)]}
    assert settings_figure(values, values, values, ["ft"], at, along="epsilon").axes[0].get_xscale() == scale


def test_what_cannot_be_drawn(tmp_path):
    some = run(tmp_path, {"a": {"layer": 1, "loss": "x"}, "b": {"layer": 1, "loss": "x"}})
    with pytest.raises(ConfigError, match="have the same settings, one of them b"):
        SettingScores.of(some, "layer")
    with pytest.raises(ConfigError, match="has a setting 'loss' that is a number: choose from layer"):
        SettingScores.of(some, "loss")
    with pytest.raises(ConfigError, match="there are 2 places"):
        settings_figure({"es": [[0.5]]}, {"es": [[0.5]]}, {"es": [[0.5]]}, ["ft"], [1, 2], along="layer")


def test_a_task_without_a_score_has_its_own_numbers(tmp_path):
    records = zsre_records(4)
    results = {name: [zsre_result(r, hits) for r in records] for name, hits in (("unedited", 0), ("a", 1), ("b", 2))}
    configs = {"a": {"layer": 1}, "b": {"layer": 2}}
    editors = dict.fromkeys(configs, "ft")
    some = Run.load(write_run(tmp_path / "r", records, results, "m", "zsre", editors, configs))
    found = SettingScores.of(some, "layer")
    assert found.metrics == ("efficacy", "paraphrase", "specificity")
    assert [found.scores["efficacy"]["ft", layer].mean for layer in found.at] == [0.5, 1.0]
    assert found.best("ft") == 1.0  # the last number is the same at both, so it is the first
    assert len(found.figure().axes) == 3


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("ft", ["ft"]),
        ("ft:layer={0..2}", ["ft:layer=0", "ft:layer=1", "ft:layer=2"]),
        ("ft:layer={2..1}", ["ft:layer=2", "ft:layer=1"]),
        ("ft:a={1,x},b={0..1}", ["ft:a=1,b=0", "ft:a=1,b=1", "ft:a=x,b=0", "ft:a=x,b=1"]),
        ("rome:kl_prompt={} is a,steps={3,4}", ["rome:kl_prompt={} is a,steps=3", "rome:kl_prompt={} is a,steps=4"]),
    ],
)
def test_many_rows_in_one_word(text, texts):
    assert _spread(text) == texts
