"""Integrated gradients against plain forward passes with hooks of their own, differentiated by torch."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from errata.base import budgets
from errata.base.errors import ConfigError, Diverged, FactError, ResultFileError
from errata.base.facts import Fact
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.tracing import gradients
from errata.tracing.gradients import IntegratedGradients, integrated_gradients
from errata.tracing.result import CausalTrace
from errata.tracing.trace import trace
from tiny import byte_tokenizer, tiny

FACT = Fact("The Needle", "Where {} is", "Rome")
LAYERS = 3

# Paths of a block's list, its attention and MLP: by hand, not from the anatomy under test.
PATHS = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "gemma3": ("model.layers", "self_attn", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
}
# Gauss and Legendre's three points on [0, 1], by hand.
NODES = [0.5 - 0.6**0.5 / 2, 0.5, 0.5 + 0.6**0.5 / 2]
WEIGHTS = [5 / 18, 8 / 18, 5 / 18]


@functools.cache  # no test leaves a model otherwise than it found it
def make(family: str = "gpt2", dtype: torch.dtype = torch.float64, **changes):
    return load_pretrained((tiny(family, LAYERS, dtype, **changes), byte_tokenizer()), name=family)


class _Whole(TorchFunctionMode):
    """RMSNorms compute in float32 whatever the model is in: here numbers of 64 bits stay as they are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        narrows = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args[1:])
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def whole_numbers():
    with _Whole():
        yield


def scaled_runs(model, part, layer, token, alphas, answer=None):
    """Plain passes with one activation replaced by αx: x `[d]`, the αx `[n, d]`, and P_αx[o] `[n]`."""
    blocks, attention, mlp = PATHS[model.name]
    inside = {"state": "", "attention": f".{attention}", "mlp": f".{mlp}"}[part]
    module = model.hf.get_submodule(f"{blocks}.{layer}{inside}")
    ids = torch.tensor([model.tokenizer(FACT.text)["input_ids"]])
    found = {}

    def keep(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        found["x"] = tensor.detach().reshape(*ids.shape, -1)[0, token].clone()

    def put(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        new = tensor.reshape(len(alphas), ids.shape[1], -1).clone()
        new[:, token] = found["scaled"]
        new = new.reshape(tensor.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def run(hook, rows):
        handle = module.register_forward_hook(hook)
        try:
            return model.hf(ids.repeat(rows, 1)).logits[:, -1].softmax(-1)
        finally:
            handle.remove()

    with torch.no_grad():
        clean = run(keep, 1)[0]
    scaled = found["scaled"] = (torch.tensor(alphas, dtype=torch.float64)[:, None] * found["x"]).requires_grad_()
    return found["x"], scaled, run(put, len(alphas))[:, clean.argmax() if answer is None else answer]


def plain(model, part, layer, token, answer=None):
    """I `[d]` of one site."""
    x, scaled, found = scaled_runs(model, part, layer, token, NODES, answer)
    (gradient,) = torch.autograd.grad(found.sum(), [scaled])
    return x * (torch.tensor(WEIGHTS, dtype=torch.float64) @ gradient)


def same(one, other, **tolerance):
    for name in ("norms", "sums"):
        mine, its = getattr(one, name), getattr(other, name)
        assert list(mine) == list(its)
        for part in mine:
            np.testing.assert_allclose(mine[part], its[part], **tolerance)


# ---- the numbers ----


@pytest.mark.parametrize("family", list(PATHS))
def test_every_site_is_what_plain_passes_give(family, whole_numbers):
    model = make(family)
    found = integrated_gradients(model, FACT, points=3)
    tokens = len(model.tokenizer(FACT.text)["input_ids"])
    assert len(found.tokens) == tokens > 8  # more than a sliding window holds
    for part in ("state", "mlp", "attention"):
        assert found.norms[part].shape == found.sums[part].shape == (tokens, LAYERS)
        for token in range(tokens):
            for layer in range(LAYERS):
                want = plain(model, part, layer, token)
                norm = float(want.norm())
                assert found.norms[part][token, layer] == pytest.approx(norm, rel=1e-9)
                assert found.sums[part][token, layer] == pytest.approx(float(want.sum()), abs=1e-9 * norm)


# Where a norm reads αx alone, its ε decides how smooth P is near α = 0: a large one for what 50 points can integrate.
@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"layer_norm_epsilon": 0.3}), ("gpt_neox", {"layer_norm_eps": 0.3}), ("llama", {"rms_norm_eps": 1.0})],
)
def test_components_add_up_to_what_the_activation_is_worth(family, changes):
    model = make(family, **changes)
    found = integrated_gradients(model, FACT)
    assert found.settings["points"] == 50
    last = len(found.tokens) - 1
    for part, values in found.sums.items():
        for token in (0, *found.subject, last):
            for layer in range(LAYERS):
                whole, none = scaled_runs(model, part, layer, token, [1.0, 0.0])[2].tolist()
                assert whole == pytest.approx(found.probability, rel=1e-9)
                assert values[token, layer] == pytest.approx(whole - none, abs=1e-6 * found.probability)
        assert np.abs(values).max() > 1e-3 * found.probability


def test_what_the_last_block_writes_before_the_last_token_is_worth_exactly_nothing():
    found = integrated_gradients(make(), FACT, points=2)
    for values in (*found.norms.values(), *found.sums.values()):
        assert np.all(values[:-1, -1] == 0)
        assert np.all(values[:, :-1] != 0)
        assert values[-1, -1] != 0


def test_a_model_of_one_block():
    model = load_pretrained((tiny("gpt2", 1, torch.float64), byte_tokenizer()), name="gpt2")
    found = integrated_gradients(model, FACT, points=3)
    assert found.norms["state"][-1, 0] == pytest.approx(float(plain(model, "state", 0, len(found.tokens) - 1).norm()))
    assert np.all(found.norms["state"][:-1] == 0)


def test_the_answer_is_the_models_or_the_object():
    model = make()
    own, given = (integrated_gradients(model, FACT, parts=["mlp"], points=3, answer=a) for a in ("model", "object"))
    ids = torch.tensor([model.tokenizer(FACT.text)["input_ids"]])
    said = model.hf(ids).logits[0, -1].softmax(-1).detach()
    first = model.tokenizer(" " + FACT.object)["input_ids"][0]
    assert own.answer == model.tokenizer.decode([int(said.argmax())])
    assert own.probability == pytest.approx(float(said.max()), rel=1e-12)
    assert given.answer == model.tokenizer.decode([first]) != own.answer
    assert given.probability == pytest.approx(float(said[first]), rel=1e-12)
    assert given.norms["mlp"][2, 1] == pytest.approx(float(plain(model, "mlp", 1, 2, first).norm()), rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_small_memory_changes_nothing(family, monkeypatch, whole_numbers):
    model = make(family)
    whole = integrated_gradients(model, FACT, points=3)
    monkeypatch.setitem(budgets.TOKENS["forward"], "cpu", 1)
    same(whole, integrated_gradients(model, FACT, points=3, memory=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_autograd_keeps_stays_within_half_the_memory(family, monkeypatch):
    memory = 2**22
    model = load_pretrained((tiny(family, 6, torch.float64), byte_tokenizer()), name=family)
    plain_gradients, most = gradients._Runs._gradients, []

    def watched(self, token, fractions):
        kept = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = plain_gradients(self, token, fractions)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.hf.parameters()}
        most.append(sum(storage.nbytes() for address, storage in kept.items() if address not in weights))
        return found

    monkeypatch.setattr(gradients._Runs, "_gradients", watched)
    integrated_gradients(model, FACT, parts=["state"], points=8, memory=memory)
    assert memory / 4 < max(most) <= memory / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_narrow_numbers(dtype, tolerance):
    changes = {"layer_norm_epsilon": 0.3}
    want = integrated_gradients(make(**changes), FACT, points=5, answer="object")
    found = integrated_gradients(make(dtype=dtype, **changes), FACT, points=5, answer="object")
    assert found.settings["dtype"] == str(dtype).removeprefix("torch.")
    for part, norms in want.norms.items():
        assert found.norms[part].dtype == np.float64
        assert np.abs(found.norms[part] - norms).max() < tolerance * norms.max()


def test_a_probability_that_is_no_number_is_told():
    model = make.__wrapped__()
    with torch.no_grad():
        model.hf.lm_head.weight[7] = torch.inf
    with pytest.raises(Diverged, match="float32"):
        integrated_gradients(model, FACT, points=2)


# ---- the model stays as it was ----


def test_nothing_of_the_model_changes_even_if_it_is_cut_short():
    model = make.__wrapped__("llama")
    parameters = dict(model.hf.named_parameters())
    frozen = next(iter(parameters.values()))
    frozen.requires_grad_(False)
    marked = list(parameters.values())[-1]
    marked.grad = torch.ones_like(marked)
    before = weights_digest(model.hf)
    calls = []

    def interrupted(done, of):
        calls.append((done, of))
        if done == 5:
            raise KeyboardInterrupt

    integrated_gradients(model, FACT, points=2)
    with pytest.raises(KeyboardInterrupt):
        integrated_gradients(model, FACT, points=2, memory=1, progress=interrupted)
    assert [done for done, _ in calls] == [1, 2, 3, 4, 5]
    assert weights_digest(model.hf) == before
    for parameter in parameters.values():
        assert parameter.requires_grad == (parameter is not frozen)
        assert (parameter.grad is None) == (parameter is not marked)
    assert bool((marked.grad == 1).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(context):
    model = make()
    want = integrated_gradients(model, FACT, points=2)
    with context():
        same(want, integrated_gradients(model, FACT, points=2), rtol=0)


def test_progress_counts_the_sites_that_are_run():
    calls = []
    found = integrated_gradients(make(), FACT, points=2, progress=lambda done, of: calls.append((done, of)))
    sites = 3 * ((len(found.tokens) - 1) * (LAYERS - 1) + LAYERS)
    assert calls == [(done, sites) for done in range(1, sites + 1)]


# ---- a value ----


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    found = integrated_gradients(make(), FACT, points=3, parts=["attention", "state", "state"])
    assert list(found.norms) == list(found.sums) == ["attention", "state"]
    path = tmp_path / "g.jsonl"
    found.save(path)
    again = IntegratedGradients.load(path)
    assert len(path.read_text().splitlines()) == 2
    for each in dataclasses.fields(found):
        if each.name not in ("norms", "sums"):
            assert getattr(again, each.name) == getattr(found, each.name), each.name
    for name in ("norms", "sums"):
        mine, its = getattr(found, name), getattr(again, name)
        assert {part: values.tobytes() for part, values in mine.items()} == {
            part: values.tobytes() for part, values in its.items()
        }
    assert again.fingerprint
    assert again.settings == {
        "parts": ["attention", "state"],
        "points": 3,
        "answer": "model",
        "dtype": "float64",
    }


def value(**changes):
    maps = {"state": np.full((2, 3), 0.5)}
    fields = {"norms": maps, "sums": maps, "settings": {}, "model": "m", "probability": 0.5}
    return IntegratedGradients(FACT, "x", ("a", "b"), (0, 1), **{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": {"state": np.zeros((2, 2))}},
        {"norms": {"state": np.zeros(2)}, "sums": {"state": np.zeros(2)}},
        {"norms": {"state": np.zeros((3, 3))}, "sums": {"state": np.zeros((3, 3))}},
        {"sums": {"mlp": np.zeros((2, 3))}},
        {"norms": {}, "sums": {}},
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, changes):
    value(**changes).save(tmp_path / "g.jsonl")
    with pytest.raises(ResultFileError, match=r"do not fit together|should be a valid list"):
        IntegratedGradients.load(tmp_path / "g.jsonl")


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "g.jsonl"
    value().save(path)
    header, line = path.read_text().splitlines()

    def refused(content, message):
        path.write_text(content)
        with pytest.raises(ResultFileError, match=message):
            IntegratedGradients.load(path)

    refused(f"{header}\n{line[:-5]}", "holds 0 whole records")
    refused(f"{header}\n{line}\n{line}\n", "holds 2 whole records")
    for change, message in (
        ({"norms": None}, "broken"),
        ({"fact": ["one"]}, "broken"),
        ({"subject": [0, 2]}, "do not fit"),
        ({"norms": {"state": [[None] * 3] * 2}}, "should be a valid number"),
    ):
        refused(f"{header}\n{json.dumps({**json.loads(line), **change})}\n", message)
    CausalTrace(FACT, "x", ("a",), (0, 0), 1, 0, {"state": np.zeros((1, 1))}, {}, "m").save(path)
    with pytest.raises(ResultFileError, match="causal traces"):
        IntegratedGradients.load(path)
    with pytest.raises(ResultFileError, match="no file"):
        IntegratedGradients.load(tmp_path / "none")


def test_it_is_drawn_below_a_trace(tmp_path):
    model = make()
    traced = trace(model, FACT, samples=1, noise=0.7)
    found = integrated_gradients(model, FACT, points=2)
    axes = [axis for axis in found.figure(traced).axes if axis.get_images() or axis.collections]
    assert len(axes) >= 6
    path = tmp_path / "g.png"
    found.plot(traced, path)
    assert path.stat().st_size > 1000
    for change, message in (
        ({"fact": Fact("The Needle", "When {} is")}, "another prompt"),
        ({"answer": "other"}, "another answer"),
        ({"fingerprint": "other"}, "another model"),
    ):
        with pytest.raises(ConfigError, match=message):
            found.figure(dataclasses.replace(traced, **change))
    with pytest.raises(ConfigError, match="'mlp' was not traced"):
        found.figure(dataclasses.replace(traced, restored={"state": traced.restored["state"]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["head"]}, "parts = 'head' is not valid"),
        ({"parts": ["severed_mlp"]}, "parts"),
        ({"parts": []}, "parts"),
        ({"parts": 3}, "parts"),
        ({"points": 0}, "points = 0"),
        ({"answer": "mine"}, "answer = 'mine'"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        integrated_gradients(make(), FACT, **settings)


def test_facts_that_do_not_do_are_refused():
    model = make()
    with pytest.raises(FactError, match="names no object"):
        integrated_gradients(model, Fact("Rome", "{} is in"), answer="object")
    with pytest.raises(FactError, match="reads at most 96"):
        integrated_gradients(model, Fact("Rome " * 200, "{} is in"))
