"""Fine-tuning: its settings, what is known for which model, what an edit tells, and that the model is left alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import errata
from errata.atlas.records import records
from errata.base.errors import ConfigError, Diverged, FactError
from errata.base.facts import Fact
from errata.base.fingerprint import tensor_digest
from errata.editors.fine_tuning import FineTuningConfig
from errata.editors.method import Method
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.scoring import score
from helpers.fine_tuned import METHODS, fine_tuned
from tiny import byte_tokenizer, tiny

FACT = Fact("The Space Needle", "{} is located in the city of", "Seattle")
REWRITE = FACT.rewrite("Paris")
CONFIG = FineTuningConfig(layer=1, steps=4, learning_rate=1e-3, max_drift=None)


def model_of(dtype: torch.dtype = torch.float32, hints: dict | None = None) -> Model:
    model = load_pretrained((tiny("gpt2", 3, dtype), byte_tokenizer()), name="tiny")
    if hints is not None:
        model.hf.config.errata = hints
    return model


def state(model: Model) -> tuple:
    """All that must be as before: bytes, which tensors these are, what is trainable, hooks."""
    parameters = dict(model.hf.named_parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    return (
        {name: tensor_digest(each) for name, each in model.hf.state_dict().items()},
        {name: (id(each), each.requires_grad, each.grad) for name, each in parameters.items()},
        hooks,
    )


# ---- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0}, "epsilon = 0"),
        ({"epsilon": -1e-3}, "epsilon = -0.001"),
        ({"epsilon": math.inf}, "epsilon = inf"),
        ({"steps": 0}, "steps = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"layer": -1}, "layer = -1"),
        ({"part": "head"}, "part = 'head'"),
        ({"loss": "mean"}, "loss = 'mean'"),
        ({"epsilom": 1e-3}, "did you mean 'epsilon'"),
    ],
)
def test_a_setting_that_does_not_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        FineTuningConfig(**{"layer": 0, **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FineTuningConfig(layer=3), "layers 0 to 2"),
        (FineTuningConfig(), "ft needs the setting 'layer', and none is known for tiny: give layer=..., 0 to 2"),
        ({"layer": 1}, "config is a dict"),
        (None, "ft needs the setting 'layer'"),
    ],
    ids=str,
)
def test_a_layer_that_is_not_there(config, message):
    with pytest.raises(ConfigError, match=message):
        errata.ft(model_of(), REWRITE, config)
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        errata.attention(model_of(), REWRITE, layer=3, epsilon=1e-3)


def test_what_was_published_for_which_model():
    def stand_in(model_type: str, n_layers: int, d_model: int):
        hf = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        return SimpleNamespace(hf=hf, n_layers=n_layers, d_model=d_model, hints={}, name="big")

    def known(method: Method, model, **given) -> FineTuningConfig:
        settings, _ = method.known(model, given)
        return FineTuningConfig(**settings)

    def told(method: Method, model) -> tuple:
        config = known(method, model)
        return config.part, config.layer, config.learning_rate, config.epsilon

    xl, gptj = stand_in("gpt2", 48, 1600), stand_in("gptj", 28, 4096)
    assert told(errata.ft, xl) == ("mlp", 1, 5e-4, None)
    assert told(errata.ft, gptj) == ("mlp", 21, 5e-4, None)
    assert told(errata.ft_l, xl) == ("mlp", 0, 5e-4, 5e-4)
    assert told(errata.ft_l, gptj) == ("mlp", 0, 5e-4, 5e-5)
    assert told(errata.ft_l, stand_in("gpt2", 36, 1280)) == ("mlp", 0, 5e-4, 1e-3)
    assert told(errata.ft_l, stand_in("gpt2", 24, 1024)) == ("mlp", 0, 5e-4, 2e-3)
    assert told(errata.attention, xl) == ("attention", 33, 1e-3, 1e-3)
    assert known(errata.ft, xl).stop_below == 0.03
    assert known(errata.attention, gptj, layer=3, epsilon=1e-3).learning_rate == 1e-3  # any model's
    with pytest.raises(ConfigError, match="attention needs the setting 'layer'"):
        errata.attention.resolve(gptj, {})


def test_hints_go_before_what_was_published_and_changes_before_hints():
    model = model_of(hints={"ft-l": {"layer": 1, "epsilon": 1e-2}})
    assert errata.ft_l.resolve(model, {})[0].layer == 1
    assert errata.ft_l.resolve(model, {"layer": 2, "steps": 3})[0] == FineTuningConfig(layer=2, steps=3, epsilon=1e-2)
    with pytest.raises(ConfigError, match="ft-l needs the setting 'epsilon'"):
        errata.ft_l.resolve(model, {"epsilon": None})
    with pytest.raises(ConfigError, match="it must be an object of settings"):
        errata.ft.resolve(model_of(hints={"ft": 3}), {})


# ---- the model is left alone --------------------------------------------------------------------------


def interrupted(step):
    if step.index == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["mlp", "attention"])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_the_same_afterwards_and_after_an_interrupt(part, trainable):
    model = model_of()
    model.hf.requires_grad_(trainable)
    before = state(model)
    config = FineTuningConfig(layer=1, part=part, steps=4, epsilon=1.0)
    meanwhile = set()
    fine_tuned(
        model,
        [REWRITE, FACT.rewrite("Rome")],
        config,
        progress=lambda step: meanwhile.update(each.requires_grad for each in model.hf.parameters()),
    )
    assert meanwhile == {False}  # autograd keeps nothing for the gradient of a weight
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(model, REWRITE, config, progress=interrupted)
    assert state(model) == before


def test_the_model_is_the_same_if_a_block_fails(monkeypatch):
    from errata.passes.suffixes import SuffixBatch

    model = model_of()
    before = state(model)

    def step(self, layer, *args, **kwargs):
        if model.hf.transformer.h[1].mlp.c_proj.weight.grad_fn is not None:  # another weight is in its place
            raise RuntimeError("in the middle of a block")
        return whole(self, layer, *args, **kwargs)

    whole = SuffixBatch.step
    monkeypatch.setattr(SuffixBatch, "step", step)
    with pytest.raises(RuntimeError, match="in the middle"):
        fine_tuned(model, REWRITE, CONFIG)
    assert state(model) == before


def test_a_loss_that_is_no_number_is_told():
    model = model_of()
    with torch.no_grad():
        model.hf.transformer.h[2].mlp.c_proj.bias[0] = math.inf
    before = state(model)
    with pytest.raises(Diverged, match="the loss is nan at step 0 of fine-tuning, layer 1"):
        fine_tuned(model, REWRITE, CONFIG)
    (kept,) = fine_tuned(model, [REWRITE], CONFIG, errors="keep")
    assert isinstance(kept, Diverged)
    assert state(model) == before


# ---- what comes out -----------------------------------------------------------------------------------


def test_what_an_edit_tells():
    model, seen = model_of(), []
    edit = fine_tuned(model, REWRITE, CONFIG, seed=7, progress=seen.append)
    assert (edit.method, edit.rewrites, edit.seed) == ("ft", (REWRITE,), 7)
    assert FineTuningConfig(**edit.config) == CONFIG
    assert edit.weights == ("transformer.h.1.mlp.c_proj.weight",)
    assert edit.deltas[0].shape == (16, 24)
    assert edit.notes["losses"] == tuple(step.loss for step in seen)
    assert [(step.index, step.fact, step.facts) for step in seen] == [(i, 0, 1) for i in range(4)]
    assert (edit.notes["updates"], edit.notes["stopped"]) == (4, "steps")
    assert edit.notes["largest_change"] == edit.deltas[0].matrix().abs().max()
    with torch.inference_mode():
        assert fine_tuned(model, REWRITE, CONFIG, seed=7) == edit


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_no_entry_moves_further_than_the_bound(part):
    config = FineTuningConfig(layer=1, part=part, learning_rate=1e-3, epsilon=1.5e-3)
    edit = fine_tuned(model_of(), REWRITE, config)
    bound = float(torch.tensor(1.5e-3))
    assert all(delta.matrix().abs().max() == bound for delta in edit.deltas)
    assert edit.method == {"mlp": "ft-l", "attention": "attention"}[part]


def test_a_fact_that_is_there_already_changes_nothing():
    model = model_of()
    edit = fine_tuned(model, REWRITE, FineTuningConfig(layer=1, stop_below=100.0))
    assert (edit.notes["updates"], edit.notes["stopped"], len(edit.notes["losses"])) == (0, "loss", 1)
    assert not edit.deltas[0].matrix().any()
    before = state(model)
    with edit.applied(model):
        assert state(model) == before


def test_of_a_model_in_bfloat16_what_is_trained_is_wider():
    """Steps far below what bfloat16 can hold add up; the loss is that of the weight as it will be stored."""
    model = model_of(torch.bfloat16)
    config = FineTuningConfig(layer=1, learning_rate=1e-5, steps=4)
    (delta,) = fine_tuned(model, REWRITE, config).deltas
    assert delta.matrix().dtype == torch.float32
    assert delta.matrix().abs().max() == pytest.approx(4e-5, rel=0.05)
    edit = fine_tuned(model, REWRITE, FineTuningConfig(layer=1, learning_rate=2e-2, steps=4))
    at_once = fine_tuned(model, REWRITE, FineTuningConfig(layer=1, learning_rate=2e-2, steps=3))
    with at_once.applied(model):
        told = -score(model, [REWRITE.text], ["Paris"])[0].mean
    assert edit.notes["losses"][3] == pytest.approx(told, rel=2e-2)
    assert edit.notes["losses"][3] < 0.9 * edit.notes["losses"][0]


def test_errors_are_raised_or_kept_in_their_places():
    model = model_of()
    long = Fact("The Space Needle " * 60, "{} is in").rewrite("Paris")
    seen = []
    first, error, last = fine_tuned(model, [REWRITE, long, REWRITE], CONFIG, errors="keep", progress=seen.append)
    assert {(step.fact, step.facts) for step in seen} == {(0, 3), (2, 3)}
    assert isinstance(first, Edit)
    assert first == last
    assert isinstance(error, FactError)
    with pytest.raises(FactError, match="Shorten it"):
        fine_tuned(model, [REWRITE, long], CONFIG)
    with pytest.raises(FactError, match="takes a Rewrite or a list of them"):
        fine_tuned(model, [FACT], CONFIG)
    with pytest.raises(ConfigError, match="`errors` is 'ignore'"):
        fine_tuned(model, [REWRITE], CONFIG, errors="ignore")
    assert fine_tuned(model, [], CONFIG) == []


# ---- as editors of many -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_bound_it_makes_the_same_edits(method):
    model = model_of()
    settings = {"layer": 1, "steps": 3, **({} if method == "ft" else {"epsilon": 1e-3})}
    editor = METHODS[method].bind(model, seed=5, **settings)
    assert editor.method == method
    config = FineTuningConfig(**editor.config)
    assert (config.layer, config.steps, config.method) == (1, 3, method)
    assert editor.make(model, [REWRITE]) == [fine_tuned(model, REWRITE, config, seed=5)]
    called, made = editor(REWRITE), editor.make(model, [REWRITE])[0]
    assert torch.equal(called.deltas[0].matrix(), made.deltas[0].matrix())
    assert called.config == {**made.config, "max_drift": 1.0}


def test_bound_with_settings_that_do_not_do():
    model = model_of()
    with pytest.raises(ConfigError, match="has no preset 'papers'"):
        errata.ft.bind(model, layer=1, preset="papers")
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        errata.ft.bind(model, layer=3)
    with pytest.raises(ConfigError, match=r"these settings make 'ft-l', not 'ft': call errata\.ft_l"):
        errata.ft.bind(model, layer=1, epsilon=1e-3)
    with pytest.raises(ConfigError, match="no setting 'lr'"):
        errata.attention.bind(model, layer=1, epsilon=1e-3, lr=1)
    reference = errata.ft.bind(model, layer=1, preset="reference", stop_below=0.5)
    assert (reference.config["loss"], reference.config["bias"], reference.config["stop_below"]) == (
        "reference",
        True,
        0.5,
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_for_the_atlas_rewrites_its_facts(method):
    model = errata.load_model("atlas")
    some = records(8)
    edits = METHODS[method].bind(model).make(model, [record.rewrite for record in some])
    assert all(isinstance(edit, Edit) for edit in edits)
    took, stayed = 0, 0
    for record, edit in zip(some, edits, strict=True):
        objects = [record.rewrite.new_object, record.rewrite.fact.object]
        with edit.applied(model):
            new, old, *near = score(
                model, [record.rewrite.text] * 2 + [record.neighborhood[0]] * 2, [*objects, *objects]
            )
        took += new.mean > old.mean
        stayed += near[1].mean > near[0].mean
    assert took >= 7
    assert stayed >= (4 if method == "attention" else 6)
