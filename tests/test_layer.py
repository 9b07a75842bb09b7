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
from errata.editors.published import Published, shape_of
from errata.editors.rome import RomeConfig, rome
from errata.editors.rome import layer as layers
from errata.editors.rome import site as sites
from errata.editors.rome.layer import known_layer, known_settings, resolve
from errata.editors.rome.site import Site, _centre, early_site
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


def stand_in(model_type: str, n_layers: int, d_model: int):
    hf = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return SimpleNamespace(hf=hf, n_layers=n_layers, d_model=d_model, hints={}, name="big")


@pytest.fixture
def tiny_is_published(monkeypatch):
    preset = Published("Tiny", {"layer": 2, "clamp": 3.0, "steps": 7}, "a test")
    monkeypatch.setattr(layers, "PUBLISHED", {("gpt2", 4, 16): preset})
    return preset


# ---- published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "n_layers", "d_model", "layer", "more"), PUBLISHED)
def test_published_settings_are_known_by_architecture(model_type, n_layers, d_model, layer, more):
    model = stand_in(model_type, n_layers, d_model)
    preset = layers.PUBLISHED[shape_of(model)]
    assert preset.settings == {"layer": layer, **more}
    found, how = known_layer(model)
    assert found == layer
    assert preset.model in how
    assert "published" in how
    assert known_settings(model) == RomeConfig(**more)
    for other in (
        stand_in(model_type, n_layers + 1, d_model),
        stand_in(model_type, n_layers, d_model + 64),
        stand_in("llama", n_layers, d_model),
    ):
        assert shape_of(other) not in layers.PUBLISHED
        assert known_layer(other) is None
        assert known_settings(other) == RomeConfig()


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
        found, said = resolve(model, [FACT], config, named)
        assert found.layer == layer
        assert said.startswith(how)
    # Settings are the caller's where he gives any, else the preset's, and the hints' before these.
    assert resolve(hinted, [FACT], RomeConfig(clamp=2.0))[0] == RomeConfig(layer=1, clamp=2.0)
    assert resolve(hinted, [FACT])[0] == RomeConfig(layer=1, clamp=3.0, steps=3)
    assert resolve(plain, [FACT])[0] == RomeConfig(layer=2, clamp=3.0, steps=7)


def test_a_hint_of_layer_zero_counts():
    assert resolve(model_of({"rome_layer": 0}), [FACT])[0].layer == 0


def test_a_layer_that_is_not_there():
    for hints, named in (({"rome_layer": 9}, None), (None, 4), (None, -1)):
        with pytest.raises(ConfigError, match="layers 0 to 3"):
            resolve(model_of(hints), [FACT], layer=named)


def test_an_unknown_model_is_offered_auto():
    model = model_of()
    with pytest.raises(ConfigError, match=r'known for tiny: say layer=\.\.\., 0 to 3, or layer="auto"') as caught:
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
    site = early_site(model, [KNOWN, *others, KNOWN], samples=3, progress=lambda done, of: told.append((done, of)))
    assert abs(site.layer - model.hints["rome_layer"]) <= 1
    assert told[:3] == [(0, 3), (1, 3), (2, 3)]  # the same fact is traced once
    assert 1 <= site.facts <= 3
    assert len(site.effects) == model.n_layers
    assert "facts" in str(site)
    # A site that is found once serves for any table.
    config, how = resolve(model, [FACT], layer=site)
    assert config.layer == site.layer
    assert how == str(site)


def test_a_site_with_little_effect_is_called_weak(monkeypatch):
    strong = early_site(atlas(), [KNOWN], samples=3)
    assert not strong.weak
    assert "weak" not in str(strong)
    assert str(Site(1, (0.0, 0.005, 0.0), 1)).endswith("brings back only 0.5 points: weak evidence)")
    monkeypatch.setattr(sites, "_WEAK_EFFECT", 1.0)
    with pytest.warns(sites.WeakSite, match=f"weak evidence for layer {strong.layer}: .* brings back only"):
        early_site(atlas(), [KNOWN], samples=3)


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
    site = Site(1, (0.1, 0.254, 0.2), 1)
    assert "a trace of the fact" in str(site)
    assert "25.4 points" in str(site)
    assert "12 facts" in str(Site(1, (0.1, 0.2), 12))


def test_each_published_layer_names_the_file_that_it_is_from():
    for (model_type, *_), preset in layers.PUBLISHED.items():
        folder = "hparams/MEMIT/" if model_type == "gpt_neox" else "hparams/ROME"
        assert folder in preset.source
