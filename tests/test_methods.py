"""All editors are one shape: called alike, side effects bounded alike, second moments found in the cache."""

from __future__ import annotations

import json

import pytest
import torch

import errata as package
from errata.atlas.records import records
from errata.base.errors import ConfigError, DisablingEdit
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.objective import Place
from errata.edits.edit import Edit
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.statistics import SecondMoment
from helpers.command_line import refused
from tiny import TEXT, byte_tokenizer, tiny

FACT = package.Fact("The Space Needle", "{} is located in the city of", "Seattle")
REWRITES = [FACT.rewrite("Paris"), package.Fact("Danielle Darrieux", "{} speaks", "French").rewrite("English")]
METHODS = {
    "rome": {"layer": 1, "prefixes": "none", "steps": 3},
    "ft": {"layer": 1, "steps": 2},
    "ft-l": {"layer": 1, "steps": 2, "epsilon": 1e-3},
    "attention": {"layer": 1, "steps": 2, "epsilon": 1e-3},
    "kn": {"steps": 2},
    "mend": {},
    "ke": {},
}


@pytest.fixture(scope="module")
def model():
    return load_pretrained((tiny("gpt2", 3), byte_tokenizer()), name="tiny")


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    """Settings with which each method makes an edit of the model."""
    found = {name: dict(own) for name, own in METHODS.items()}
    for name in ("mend", "ke"):
        place = Place.of(model, 2)
        network = new_network(name, place.shapes(model), model.d_model, {"blocks": 2})
        file = tmp_path_factory.mktemp(name) / "editor.safetensors"
        Trained(network.eval(), model.name, weights_digest(model.hf), {}).save(file)
        found[name]["trained"] = str(file)
    found["rome"]["second_moment"] = SecondMoment.identity(model.d_mlp)
    return found


def method_of(name):
    return getattr(package, name.replace("-", "_"))


@pytest.mark.parametrize("name", METHODS)
def test_side_effects_are_measured_kept_and_bounded(model, settings, name):
    before, method = weights_digest(model.hf), method_of(name)
    edit = method(model, REWRITES[0], force=True, **settings[name])
    health = edit.notes["health"]
    assert health["relative_norm"] == pytest.approx(edit.relative_norm(model))
    assert edit.config["max_drift"] == health["max_drift"] == 1.0
    drift = health["drift"]
    assert drift > 0
    with pytest.raises(DisablingEdit, match=f"by {name} would disable the model: .* force=True"):
        method(model, REWRITES[0], max_drift=drift / 2, **settings[name])
    kept = method(model, REWRITES, max_drift=drift / 2, errors="keep", **settings[name])
    assert isinstance(kept[0], DisablingEdit)
    forced = method(model, REWRITES[0], max_drift=drift / 2, force=True, **settings[name])
    assert forced.notes["health"] == {**health, "max_drift": drift / 2, "disabling": True}
    assert method(model, REWRITES[0], max_drift=2 * drift, **settings[name]).notes["health"]["disabling"] is False
    unmeasured = method(model, REWRITES[0], max_drift=None, **settings[name])
    assert "health" not in unmeasured.notes
    assert [each.norm() for each in unmeasured.deltas] == [each.norm() for each in edit.deltas]
    assert weights_digest(model.hf) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_bound_editor_makes_what_the_method_makes(model, settings, name):
    given = {**settings[name], "max_drift": None}
    edits = method_of(name)(model, REWRITES, **given)
    editor = package.editor(model, name, **given)
    assert editor.method == name
    made = [*editor(REWRITES), editor(REWRITES[0]), *editor.make(model, REWRITES)]
    for edit, same in zip([*edits, edits[0], *edits], made, strict=True):
        assert (edit.method, edit.rewrites, edit.weights) == (same.method, same.rewrites, same.weights)
        for one, other in zip(edit.deltas, same.deltas, strict=True):
            torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-4, atol=1e-6)
    assert editor([]) == []
    assert editor.config.get("max_drift") is None


def test_in_sequence_each_edit_is_made_with_the_earlier_ones_applied(model, settings):
    before, given = weights_digest(model.hf), {**settings["ft"], "max_drift": None}
    one, other = package.ft(model, REWRITES, sequential=True, **given)
    assert one == package.ft(model, REWRITES[0], **given)
    with one.applied(model):
        assert package.ft(model, REWRITES[1], **given) == other
    assert package.ft(model, REWRITES[1], **given) != other
    assert weights_digest(model.hf) == before


def test_a_setting_of_another_method_is_refused(model):
    with pytest.raises(ConfigError, match="KnowledgeNeuronsConfig has no setting 'layer'"):
        package.kn(model, REWRITES[0], layer=1)
    with pytest.raises(ConfigError, match="ft uses no second moment"):
        package.ft(model, REWRITES[0], layer=1, second_moment=SecondMoment.identity(model.d_mlp))
    with pytest.raises(ConfigError, match=r"config is a RomeConfig: write KnowledgeNeuronsConfig\(\.\.\.\)"):
        package.kn(model, REWRITES[0], package.RomeConfig(layer=1))


def test_an_editor_without_its_model_edits_nothing(model, settings):
    editor = package.editor(model, "ft", **settings["ft"])
    with pytest.raises(ConfigError, match=r"this ft editor has no model: make one with errata\.editor\(model"):
        editor.without_model()(REWRITES[0])
    assert editor.without_model().make(model, REWRITES) == editor.make(model, REWRITES)


def test_rome_finds_what_errata_stats_put_into_the_cache(errata, tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))
    hf, tokenizer = tiny("llama", layers=3), byte_tokenizer()
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = package.load_model(tmp_path / "m")
    assert model.own_corpus is None
    given = {"layer": 1, "prefixes": "none", "steps": 2, "max_drift": None}
    with pytest.raises(ConfigError, match="collect it with errata stats"):
        package.rome(model, REWRITES[0], **given)
    (tmp_path / "t.txt").write_text("\n\n".join(line[:80] for line in TEXT.splitlines()))
    for tokens in (50, 150):
        done = errata("stats", "--model", "m", "--layers", "1", "--corpus", "t.txt", "--tokens", tokens)
        assert done.returncode == 0, done.stderr
    edit = package.rome(model, REWRITES[0], **given)
    assert edit.notes["second_moment"]["tokens"] > 50  # of two the one of more tokens
    assert edit.notes["second_moment"]["fingerprint"]["layer"] == 1
    with pytest.raises(ConfigError, match="of the keys of layer 0"):  # nothing is cached for that one
        package.rome(model, REWRITES[0], **{**given, "layer": 0})
    command = ("edit", "--model", "m", "--subject", FACT.subject, "--prompt", FACT.prompt, "--to", "Paris")
    done = errata(*command, "--layer", "1", "--force", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["rome", "ft", "ft-l", "attention", "kn"])
def test_on_the_command_line_side_effects_are_bounded_for_every_editor(errata, tmp_path, name):
    record = records(1)[0]
    fact = ("--subject", record.rewrite.subject, "--prompt", record.rewrite.fact.prompt)
    command = ("edit", *fact, "--to", record.rewrite.new_object, "--editor", f"{name}:max_drift=1e-9,steps=2")
    refused(errata(*command, "--out", "x.safetensors"), f"by {name} would disable the model")
    assert not (tmp_path / "x.safetensors").exists()
    done = errata(*command, "--out", "x.safetensors", "--force", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["health"]["disabling"] is True
    assert Edit.load(tmp_path / "x.safetensors").notes["health"]["disabling"] is True
