"""`errata export` as a user has it: an adapter, a whole model, one edit; and one line for what cannot be done."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import typer

from errata.base.errors import ErrataError
from errata.cli.export import export
from errata.cli.options import layer_numbers
from errata.edits import Dense, Edit, RankOne
from errata.models import weights
from errata.models.loading import load_pretrained
from errata.models.saving import save_pretrained
from helpers.adapters import apart, logits
from helpers.edits import down, random_edit
from helpers.models import fresh_model

app = typer.Typer()
app.command("export")(export)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two edits of it made one after the other, one in another layer, and a dense one."""
    folder = tmp_path_factory.mktemp("export")
    save_pretrained(fresh_model("llama"), folder / "model")
    model = load_pretrained(folder / "model")
    first, third = random_edit(model, 1), random_edit(model, 3, layer=2)
    first.save(folder / "first.safetensors")
    third.save(folder / "third.safetensors")
    random_edit(model, 4, dense=True).save(folder / "dense.safetensors")
    with first.applied(model):
        random_edit(model, 2).save(folder / "second.safetensors")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        edits = [str(folder / f"{each}.safetensors") for each in arguments[0].split()]
        given = [*edits, "--model", str(folder / "model"), *map(str, arguments[1:])]
        app(given, standalone_mode=False)
        return capsys.readouterr().out

    return run


def edited(folder, *names):
    model = load_pretrained(folder / "model")
    for name in names:
        Edit.load(folder / f"{name}.safetensors").apply(model)
    return logits(model.hf)


def test_an_adapter_a_model_and_an_edit_say_the_same(run, folder, tmp_path):
    arguments = ("--lora", "a", "--merge", "m", "--out", "e.safetensors", "--json")
    told = json.loads(run("first second third", *arguments))
    assert told["written"] == {"lora": "a", "merge": "m", "out": "e.safetensors"}
    assert told["model"] == "model"
    assert len(told["edits"]) == 3
    assert told["residuals"] == {}
    wanted = edited(folder, "first", "second", "third")
    assert torch.equal(logits(load_pretrained(tmp_path / "m").hf), wanted)
    model = load_pretrained(folder / "model")
    assert apart(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), tmp_path / "a")), wanted) < 1e-5
    with Edit.load(tmp_path / "e.safetensors").applied(model):
        assert apart(logits(model.hf), wanted) < 1e-5
    assert [each["id"] for each in json.loads((tmp_path / "m" / "errata.json").read_text())["edits"]] == told["edits"]


def test_scaled_and_restricted(run, folder, tmp_path):
    said = run("first second third", "--layers", "0-1", "--scale", "0.5", "--out", "e.safetensors", "--merge", "m")
    assert "written: e.safetensors" in said
    model = load_pretrained(folder / "model")
    plain = weights.matrix(model, down(model)).detach().clone()
    change = sum(Edit.load(folder / f"{name}.safetensors").deltas[0].matrix() for name in ("first", "second"))
    edit = Edit.load(tmp_path / "e.safetensors")
    assert edit.weights == (down(model),)
    with edit.applied(model):
        torch.testing.assert_close(weights.matrix(model, down(model)).detach(), plain + 0.5 * change)
        assert torch.equal(logits(load_pretrained(tmp_path / "m").hf), logits(model.hf))


def test_a_dense_change_is_truncated_when_asked_and_the_residual_told(run, tmp_path):
    told = json.loads(run("dense", "--lora", "a", "--rank", "4", "--json"))
    (residual,) = told["residuals"].values()
    assert 0.1 < residual < 1
    assert "the residual is" in run("dense", "--out", "e.safetensors", "--rank", "4")
    assert not isinstance(Edit.load(tmp_path / "e.safetensors").deltas[0], (Dense, RankOne))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("first",), "nothing is to be written"),
        (("first", "--lora", "a", "--merge", "a"), "are both a"),
        (("first", "--out", "e.json"), "its ending must be"),
        (("first", "--lora", "taken"), "holds other things"),
        (("first", "--merge", "taken"), "holds other things"),
        (("first", "--lora", "a", "--layers", "x"), "names no layers"),
        (("first", "--lora", "a", "--layers", "5-3"), "names no layers"),
        (("first", "--lora", "a", "--layers", "7"), "no layer 7"),
        (("first", "--lora", "a", "--layers", "0"), "changes nothing in layers"),
        (("first", "--lora", "a", "--scale", "nan"), "finite number"),
        (("dense", "--lora", "a"), "give a rank"),
        (("second", "--lora", "a"), "made for other weights"),
        (("first first", "--lora", "a"), "with itself"),
        (("second", "--merge", "m"), "made for other weights"),
        (("missing", "--merge", "m"), "there is no file"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path, arguments, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    with pytest.raises(ErrataError, match=says) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_layers_as_people_write_them():
    assert layer_numbers("3") == [3]
    assert layer_numbers("3-5") == [3, 4, 5]
    assert layer_numbers("2, 4-6") == [2, 4, 5, 6]
