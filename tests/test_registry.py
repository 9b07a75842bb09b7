"""Which editors there are, what is told of them, and one that another package brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from errata.base.errors import ConfigError
from errata.editors import registry
from errata.editors.registry import METHODS, Method, method_of, methods

TOY = '''
"""An editor from outside: it adds noise to a bias-free down-projection, and hopes."""

import torch
from pydantic import Field

from errata.base.config import Config
from errata.editors.editor import Editor
from errata.editors.registry import Method
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.models.weights import down_weight_name


class ToyConfig(Config):
    """Settings of the toy.

    Attributes:
        scale: how much
            noise.
    """

    scale: float = Field(0.1, gt=0)


def prepare(model, settings, second_moment, seed):
    config = ToyConfig(**settings)

    def make(model, rewrites):
        generator = torch.Generator().manual_seed(seed)
        write = config.scale * torch.randn(model.d_model, generator=generator)
        read = torch.randn(model.d_mlp, generator=generator)
        deltas = [RankOne(down_weight_name(model, 2), write, read)]
        return [Edit.of(model, deltas, "toy", [each], config=config.model_dump(), seed=seed) for each in rewrites]

    return Editor("toy", config.model_dump(), make)


METHOD = Method("toy", "Noise", "a test", ToyConfig, prepare)
'''


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
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "errata.cli.app", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# ---- our own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_setting_is_told(method):
    told = method.config.described()
    assert [*told] == [*method.config.model_fields]
    assert all(text.endswith(".") for text in told.values()), told
    assert method.summary
    assert method.source


def test_a_description_goes_on_over_lines():
    assert METHODS["rome"].config.described()["clamp"] == "‖δ‖ is kept below this many times ‖v₀‖; None: it is not."
    assert (
        METHODS["rome"]
        .config.described()["prefixes"]
        .endswith('("" is the bare prompt). Samples come from the model itself, top-k 5, and end in ". ".')
    )


def test_unknown():
    with pytest.raises(ConfigError, match="did you mean 'rome'"):
        method_of("rme")


# ---- from outside -------------------------------------------------------------------------------------


def test_a_package_brings_one(outside):
    assert [*methods()][-1] == "toy"
    assert method_of("toy").config.described() == {"scale": "how much noise."}
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
    assert "ToyConfig: scale = 0 does not do" in bad.stderr


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("rome = toy_editor:METHOD", "has the name of one of errata's own"),
        ("toy = nowhere:METHOD", "of toy-editor .* cannot be loaded: ModuleNotFoundError"),
        ("toy = toy_editor:OTHER", "cannot be loaded: AttributeError"),
        ("toy = toy_editor:prepare", "is no Method called 'toy'"),
        ("tov = toy_editor:METHOD", "is no Method called 'tov'"),
    ],
)
def test_one_that_cannot_be_used(outside, points, message):
    outside(points)
    with pytest.raises(ConfigError, match=message):
        methods()
    assert isinstance(method_of("rome"), Method)  # ours are there all the same
