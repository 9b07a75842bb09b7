"""Which layer ROME edits: as named, as hinted, as published, or where a trace finds the site."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import errata
from errata.base.errors import ConfigError, FactError
from errata.base.facts import Fact
from errata.editors import layer_choice
from errata.editors.editor import Editor
from errata.editors.layer_choice import LayerChoice, _centre, choose_layer
from errata.editors.published import Published, shape_of
from errata.editors.rome import RomeConfig, rome
from errata.editors.rome.config import PUBLISHED as KNOWN_MODELS
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.statistics import SecondMoment
from tiny import byte_tokenizer, tiny

FACT = Fact("The Space Needle", "{} is located in the city of", "Seattle")
KNOWN = Fact("Arthur Conan Doyle", "The native language of {} is", "English")
# Of hparams/ROME, and hparams/MEMIT for gpt_neox: model type, layers, d_model, layer, clamp where it is not 4.
PUBLISHED = [
    ("gpt2", 24, 1024, 8, {"clamp": 3.0}),
    ("gpt2", 36, 1280, 12, {}),
    ("gpt2", 48, 1600, 17, {}),
    ("gptj", 28, 4096, 5, {}),
    ("gpt_neox", 44, 6144, 15, {}),
]


def model_of(hints: dict | None = None) -> Model:
    model = load_pretrained((tiny("gpt2", 4), byte_tokenizer()), name="tiny")
    if hints is not None:
        model.hf.config.errata = hints
    return model


@functools.cache
def atlas() -> Model:
    return errata.load_model("atlas")


UNBOUND = {"max_drift": None, "probes": None}  # of an editor's settings: side effects are measured outside


def bound(model: Model, config: RomeConfig | None = None, **settings) -> Editor:
    return rome.bind(model, config, second_moment=SecondMoment.identity(model.d_mlp), sample_now=False, **settings)


def settings_of(editor: Editor) -> dict:
    settings = {name: value for name, value in editor.config.items() if name in RomeConfig.model_fields}
    return {**settings, "same_subject": "joint" if editor.together else "apart"}


def stand_in(model_type: str, n_layers: int, d_model: int):
    hf = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return SimpleNamespace(hf=hf, n_layers=n_layers, d_model=d_model, hints={}, name="big")


@pytest.fixture
def tiny_is_published(monkeypatch):
    preset = Published("Tiny", {"layer": 2, "clamp": 3.0, "steps": 7}, "a test")
    monkeypatch.setitem(KNOWN_MODELS, ("gpt2", 4, 16), preset)
    return preset


# ---- published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "n_layers", "d_model", "layer", "more"), PUBLISHED)
def test_published_settings_are_known_by_architecture(model_type, n_layers, d_model, layer, more):
    model = stand_in(model_type, n_layers, d_model)
    preset = KNOWN_MODELS[shape_of(model)]
    assert preset.settings == {"layer": layer, **more}
    found, how = rome.known(model, {})
    assert found == {"layer": layer, **more}
    assert how == f"published for {preset.model}: {preset.source}"
    for other in (
        stand_in(model_type, n_layers + 1, d_model),
        stand_in(model_type, n_layers, d_model + 64),
        stand_in("llama", n_layers, d_model),
    ):
        assert shape_of(other) not in KNOWN_MODELS
        assert rome.known(other, {}) == ({}, "")


def test_a_published_model_needs_no_layer(tiny_is_published):
    model = model_of()
    edit = rome(model, FACT.rewrite("Paris"), second_moment=SecondMoment.identity(model.d_mlp), force=True)
    assert (edit.config["layer"], edit.config["clamp"], len(edit.notes["steps"])) == (2, 3.0, 7)
    assert edit.weights == ("transformer.h.2.mlp.c_proj.weight",)
    assert edit.notes["layer"] == f"published for Tiny: {tiny_is_published.source}"


# ---- which goes before which --------------------------------------------------------------------------


def test_what_is_named_goes_before_the_config_hint_and_preset(tiny_is_published):
    plain, hinted = model_of(), model_of({"rome_layer": 1, "rome": {"steps": 3}})
    cases = [
        (hinted, RomeConfig(layer=0), 2, 2, "named"),
        (hinted, RomeConfig(layer=0), None, 0, "named"),
        (hinted, None, 3, 3, "named"),
        (hinted, None, 0, 0, "named"),
        (hinted, None, None, 1, "the model's own hint"),
        (hinted, RomeConfig(), None, 1, "the model's own hint"),
        (plain, RomeConfig(), None, 2, "published for Tiny"),
        (plain, None, None, 2, "published for Tiny"),
    ]
    for model, config, named, layer, how in cases:
        editor = bound(model, config, layer=named)
        assert editor.config["layer"] == layer
        assert editor.layer_by.startswith(how)


def test_settings_come_in_layers_each_over_the_ones_before(tiny_is_published):
    """Default < published < the model's hints < preset < given, each setting by itself."""
    plain, hinted = model_of(), model_of({"rome_layer": 1, "rome": {"steps": 3}})
    assert rome.resolve(model_of({"other": 1}), {})[0] == RomeConfig(layer=2, clamp=3.0, steps=7)
    assert rome.resolve(plain, {})[0] == RomeConfig(layer=2, clamp=3.0, steps=7)
    assert rome.resolve(hinted, {})[0] == RomeConfig(layer=1, clamp=3.0, steps=3)
    assert rome.resolve(hinted, {"clamp": 2.0})[0] == RomeConfig(layer=1, clamp=2.0, steps=3)
    paper = RomeConfig.paper(layer=1, steps=3)  # whose clamp, None, goes before what was published
    assert paper.clamp is None
    assert rome.resolve(hinted, {}, preset="paper")[0] == paper
    given = {"clamp": 5.0, "steps": 9, "layer": 0}
    assert rome.resolve(hinted, given, preset="paper")[0] == RomeConfig.paper(**given)


def test_an_object_counts_with_what_was_set_in_it_and_names_go_before_it(tiny_is_published):
    model = model_of({"rome_layer": 1, "rome": {"steps": 3}})
    config = RomeConfig(clamp=2.0)
    assert RomeConfig(**settings_of(bound(model, config))) == RomeConfig(layer=1, clamp=2.0, steps=3, **UNBOUND)
    editor = bound(model, config, clamp=6.0)
    assert RomeConfig(**settings_of(editor)) == RomeConfig(layer=1, clamp=6.0, steps=3, **UNBOUND)
    by_default = RomeConfig(steps=RomeConfig().steps)  # set, although to what it is anyhow
    assert bound(model, by_default).config["steps"] == 20


def test_steps_given_to_the_atlas_change_steps_alone():
    known = rome.resolve(atlas(), {})[0]
    assert len(known.prefixes) == 15
    assert known.steps != 10
    for editor in (bound(atlas(), steps=10), bound(atlas(), RomeConfig(steps=10))):
        found = RomeConfig(**settings_of(editor))
        assert found == RomeConfig(**{**known.model_dump(), "steps": 10, **UNBOUND})


def test_a_hint_of_layer_zero_counts():
    assert rome.resolve(model_of({"rome_layer": 0}), {})[0].layer == 0


def test_a_layer_that_is_not_there():
    cases = (({"rome_layer": 9}, None, "layers 0 to 3"), (None, 4, "layers 0 to 3"), (None, -1, "layer = -1"))
    for hints, named, message in cases:
        with pytest.raises(ConfigError, match=message):
            bound(model_of(hints), layer=named)


def test_an_unknown_model_is_offered_auto():
    model = model_of()
    with pytest.raises(ConfigError, match=r'known for tiny: give layer=\.\.\., 0 to 3, or layer="auto"') as caught:
        rome(model, FACT.rewrite("Paris"), second_moment=SecondMoment.identity(model.d_mlp))
    assert "\n" not in str(caught.value)


# ---- auto ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["argument", "config"])
def test_auto_finds_the_site_that_is_known(by):
    model = atlas()
    settings = {"prefixes": "none", "steps": 1, "max_drift": None}
    config, layer = (
        (RomeConfig(**settings), "auto") if by == "argument" else (RomeConfig(layer="auto", **settings), None)
    )
    asked = []

    def moment(at: int) -> SecondMoment:
        asked.append(at)
        return SecondMoment.identity(model.d_mlp)

    edit = rome(model, KNOWN.rewrite("French"), config, layer=layer, second_moment=moment)
    assert abs(edit.config["layer"] - model.hints["rome_layer"]) <= 1
    assert asked == [edit.config["layer"]]
    assert edit.notes["layer"].startswith("the middle of the MLP's early site by a trace of the fact (")


def test_auto_of_several_facts():
    model, told = atlas(), []
    others = [
        Fact("Danielle Darrieux", "The native language of {} is", "French"),
        Fact("Suzuki Ertiga", "{} is listed under the country", "Japan"),
    ]
    site = choose_layer(model, [KNOWN, *others, KNOWN], samples=3, progress=lambda done, of: told.append((done, of)))
    assert abs(site.layer - model.hints["rome_layer"]) <= 1
    assert told[:3] == [(0, 3), (1, 3), (2, 3)]  # the same fact is traced once
    assert 1 <= site.facts <= 3
    assert len(site.effects) == model.n_layers
    assert "facts" in str(site)
    # A site that is found once serves for any table.
    editor = bound(model, layer=site)
    assert editor.config["layer"] == site.layer
    assert editor.layer_by == str(site)


def test_a_site_with_little_effect_is_called_weak(monkeypatch):
    strong = choose_layer(atlas(), [KNOWN], samples=3)
    assert not strong.weak
    assert "weak" not in str(strong)
    assert str(LayerChoice(1, (0.0, 0.005, 0.0), 1)).endswith("brings back only 0.5 points: weak evidence)")
    monkeypatch.setattr(layer_choice, "_WEAK_EFFECT", 1.0)
    with pytest.warns(layer_choice.WeakSite, match=f"weak evidence for layer {strong.layer}: .* brings back only"):
        choose_layer(atlas(), [KNOWN], samples=3)


def test_auto_is_refused_where_the_answer_does_not_depend_on_the_subject():
    model = model_of()
    with torch.no_grad():  # nothing moves between tokens
        for block in model.hf.transformer.h:
            block.attn.c_proj.weight.zero_()
    with pytest.raises(FactError, match="hardly depends on the subject") as caught:
        rome(
            model,
            FACT.rewrite("Paris"),
            layer="auto",
            second_moment=SecondMoment.identity(model.d_mlp),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("effects", "layer"),
    [
        ([0.0, 0.1, 0.5, 1.0, 0.5, 0.1, 0.0], 3),
        ([1.0, 0.9, 0.1, 0.0], 0),
        ([0.0, 0.9, 1.0, 0.9, 0.8, 0.9, 0.1], 3),
        ([0.9, 0.1, 0.2, 1.0, 0.1], 3),  # not the middle of two runs, but the run of the largest
        ([-0.3, -0.1, -0.2], 1),
        ([0.0], 0),
    ],
)
def test_the_middle_of_a_site(effects, layer):
    assert _centre(np.array(effects)) == layer


def test_a_site_says_why():
    site = LayerChoice(1, (0.1, 0.254, 0.2), 1)
    assert "a trace of the fact" in str(site)
    assert "25.4 points" in str(site)
    assert "12 facts" in str(LayerChoice(1, (0.1, 0.2), 12))


def test_each_published_layer_names_the_file_that_it_is_from():
    for (model_type, *_), preset in KNOWN_MODELS.items():
        folder = "hparams/MEMIT/" if model_type == "gpt_neox" else "hparams/ROME"
        assert folder in preset.source
