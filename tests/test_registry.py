"""Which editors there are, what is told of them, and one that another package brings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import errata
from errata.atlas.records import records
from errata.base.errors import ConfigError, DisablingEdit
from errata.editors import registry
from errata.editors.method import Method
from errata.editors.registry import METHODS, method_of, methods

DOC = Path(__file__).parents[1] / "docs" / "how-to" / "editors.md"
# The editor that the guide shows whole.
TOY = re.search(r"```python\n(\"\"\"An editor from outside.*?)```", DOC.read_text(), flags=re.S)[1].replace(
    "mine", "toy"
)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with a package that brings the editor, as pip would have installed it."""
    (tmp_path / "toy_editor.py").write_text(TOY)
    info = tmp_path / "toy_editor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-editor\nVersion: 1.0\n")

    def brings(points: str = "toy = toy_editor:METHOD") -> None:
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}\n")

    brings()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield brings
    sys.modules.pop("toy_editor", None)


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "errata.cli.app", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# ---- our own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_setting_is_told(method):
    told = method.config.described()
    assert told.keys() == method.config.model_fields.keys()
    assert all(text.endswith(".") for text in told.values()), told
    assert method.summary
    assert method.source


def test_descriptions_of_a_class_come_before_those_of_its_base():
    assert next(iter(METHODS["rome"].config.described())) == "layer"
    assert [*METHODS["rome"].config.described()][-2:] == ["max_drift", "probes"]
    assert METHODS["rome"].config.described()["clamp"] == "‖δ‖ is kept below this many times ‖v₀‖; None: no bound."
    assert (
        METHODS["rome"]
        .config.described()["prefixes"]
        .endswith('("" is the bare prompt). Samples come from the model itself, top-k 5, and end in ". ".')
    )


def test_descriptions_are_there_without_docstrings():
    code = "from errata.editors.rome import rome; assert __debug__ is False; print(rome.config.described()['steps'])"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == METHODS["rome"].config.described()["steps"] != ""


def test_unknown():
    with pytest.raises(ConfigError, match="did you mean 'rome'"):
        method_of("rme")


# ---- from outside -------------------------------------------------------------------------------------


def test_a_package_brings_one(outside):
    assert [*methods()][-1] == "toy"
    assert method_of("toy").config.described()["scale"] == "Standard deviation of the noise."
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        method_of("toyy")


def test_it_is_listed_and_evaluated(outside, tmp_path):
    listed = json.loads(run("editors", "--json", folder=tmp_path).stdout)["editors"]
    assert [each["name"] for each in listed] == [*METHODS, "toy"]
    options = ("--limit", "3", "--editor", "toy:scale=0.5", "--out", "run", "--no-generation", "--json")
    done = run("evaluate", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "toy-scale=0.5" in done.stdout
    bad = run("evaluate", "--limit", "3", "--editor", "toy:scale=0", "--out", "other", folder=tmp_path)
    assert bad.returncode == 2
    assert "NoiseConfig: scale = 0 is not valid" in bad.stderr


def test_it_has_all_that_errata_adds(outside):
    """Options of every editor, settings in layers, and side effects, which nothing in its file speaks of."""
    model = errata.load_model("atlas")
    rewrites = [record.rewrite for record in records(2)]
    toy = method_of("toy")
    assert toy(model, rewrites[0], scale=0.2).config["scale"] == 0.2
    one, other = toy(model, rewrites, sequential=True)
    assert one.fingerprints != other.fingerprints  # the second is made with the first applied
    assert one.notes["health"]["disabling"] is False
    with pytest.raises(DisablingEdit, match="by toy would disable the model"):
        toy(model, rewrites[0], scale=1e6)
    assert toy(model, rewrites[0], scale=1e6, force=True).notes["health"]["disabling"] is True
    with pytest.raises(ConfigError, match="toy has no preset 'paper': it has none"):
        toy(model, rewrites[0], preset="paper")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("rome = toy_editor:METHOD", "has the name of one of errata's own"),
        ("toy = nowhere:METHOD", "of toy-editor .* cannot be loaded: ModuleNotFoundError"),
        ("toy = toy_editor:OTHER", "cannot be loaded: AttributeError"),
        ("toy = toy_editor:make_editor", "is not a Method called 'toy'"),
        ("tov = toy_editor:METHOD", "is not a Method called 'tov'"),
    ],
)
def test_one_that_cannot_be_used(outside, points, message):
    outside(points)
    with pytest.raises(ConfigError, match=message):
        methods()
    assert isinstance(method_of("rome"), Method)  # ours are there all the same
