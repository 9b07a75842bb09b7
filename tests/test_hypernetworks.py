"""Trained editors: factors, changes and gradients against what is written out; files; training, killed and not."""

from __future__ import annotations

import copy
import functools
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

import errata
from errata.base.errors import ConfigError, Diverged, EditMismatch, ErrataError, FactError, ResultFileError
from errata.base.facts import Fact, Rewrite, fact_key
from errata.base.fingerprint import tensor_digest
from errata.editors.hypernetworks import editor, training
from errata.editors.hypernetworks.editor import trained_edits
from errata.editors.hypernetworks.factors import Factors, edited_maps, gradient_factors
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.network import condition
from errata.editors.hypernetworks.objective import EncodedExample, Place, backward, changes_of, words_of
from errata.editors.hypernetworks.training import EDITOR, STATE, TrainingConfig, curve_of, train
from errata.editors.hypernetworks.training_examples import TrainingExample, keys, text_examples
from errata.editors.texts import text_of
from errata.edits.edit import Edit
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.scoring import score
from errata.models.weights import matrix
from tiny import ALL_FAMILIES, HYBRIDS, OTHER_FAMILIES, byte_tokenizer, llama_tokenizer, tiny

LAYERS = 4
TRAINED_FAMILIES = ("gpt2", "gpt_neox", "llama", "opt", "gptj", "phi3")
FACTS = [
    Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite("Paris"),
    Fact("Danielle Darrieux", "The mother tongue of {} is", "French").rewrite("English now"),
    Fact("Roy", "{} plays", "trumpet").rewrite("harp"),
]
EXAMPLES = [
    TrainingExample(
        each, (each.text, f"Of late. {each.text}"), (("Berlin lies in", "Germany"), ("A cat is an", "animal too"))
    )
    for each in FACTS
]
NETWORKS = {"mend": {"blocks": 2, "rank": 5, "edit_lr": 0.01}, "ke": {"blocks": 2, "hidden": 4}}
CONFIG = TrainingConfig(
    steps=6, learning_rate=1e-2, batch=2, validate_every=2, validation=1, patience=50, max_minutes=None
)


@functools.cache
def model_of(family: str = "gpt2", dtype: torch.dtype = torch.float64) -> Model:
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    return load_pretrained((tiny(family, LAYERS, dtype), tokenizer()), name=family)


def state(model: Model) -> tuple:
    """All that must be as before: bytes, what is trainable, gradients, hooks."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    parameters = {name: (each.requires_grad, each.grad) for name, each in model.hf.named_parameters()}
    return {name: tensor_digest(each) for name, each in model.hf.state_dict().items()}, parameters, hooks


def network_of(model: Model, method: str, seed: int = 0):
    """One whose weights are all random, so that nothing of it is the identity."""
    place = Place.of(model, 2)
    torch.manual_seed(seed)
    network = new_network(method, place.shapes(model), model.d_model, NETWORKS[method]).to(model.dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network, place


def plain_loss(hf, tokenizer, prompt: str, target: str) -> torch.Tensor:
    """Mean over the target's tokens of −log P, from one whole forward pass."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {target}")["input_ids"]
    logits = hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return -torch.stack([logits[at - 1, ids[at]] for at in range(start, len(ids))]).mean()


# ---- factors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ALL_FAMILIES, *OTHER_FAMILIES, *HYBRIDS])
def test_factors_are_the_gradient_of_the_weights(family):
    # In float64 some of them do not run.
    model = model_of(family) if family in ALL_FAMILIES else model_of(family, torch.float32)
    before = state(model)
    place = Place.of(model, 2)
    texts = [text_of(model, each.text, each.new_object) for each in FACTS]
    found = gradient_factors(model, texts, place.maps, place.first)
    assert state(model) == before
    weights = [model.weight(f"{name}.weight") for name in place.maps]
    for number, rewrite in enumerate(FACTS):
        loss = plain_loss(model.hf, model.tokenizer, rewrite.text, rewrite.new_object)
        for name, weight, gradient in zip(place.maps, weights, torch.autograd.grad(loss, weights), strict=True):
            write, read = found[name].of(number)
            shown = gradient if matrix(model, f"{name}.weight").stride() == weight.stride() else gradient.T
            close = 1e-5 * float(gradient.abs().max())  # norms in float32 inside some families
            torch.testing.assert_close(write @ read, shown, rtol=1e-5, atol=close)


def test_the_maps_are_those_of_the_highest_mlps():
    assert edited_maps(model_of("gpt2"), 1) == ("transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj")
    assert [name.rpartition(".")[2] for name in edited_maps(model_of("llama"), 1)] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert edited_maps(model_of("opt"), 1) == ("model.decoder.layers.3.fc1", "model.decoder.layers.3.fc2")
    bloom, mpt = "transformer.h.3.mlp.dense", "transformer.blocks.3.ffn"  # they add the state themselves
    assert edited_maps(model_of("bloom", torch.float32), 1) == (f"{bloom}_h_to_4h", f"{bloom}_4h_to_h")
    assert edited_maps(model_of("mpt", torch.float32), 1) == (f"{mpt}.up_proj", f"{mpt}.down_proj")
    with pytest.raises(ConfigError, match="blocks = 5, and gpt2 has 4"):
        edited_maps(model_of("gpt2"), 5)


# ---- formulas, written out ----------------------------------------------------------------------------


def given(model: Model, place: Place):
    """Factors of the first fact, as numpy has them."""
    texts = [text_of(model, FACTS[0].text, FACTS[0].new_object)]
    factors = gradient_factors(model, texts, place.maps, place.first)
    return factors, {name: (each.entering.numpy(), each.leaving.numpy()) for name, each in factors.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mends_update_written_out(family):
    model = model_of(family)
    network, place = network_of(model, "mend")
    factors, plain = given(model, place)
    rng = np.random.default_rng(1)
    for moments, (entering, leaving) in zip(network.moments, plain.values(), strict=True):
        width = entering.shape[1] + leaving.shape[1]
        moments.count.fill_(10.0)
        moments.mean.copy_(torch.from_numpy(rng.normal(size=width)))
        moments.squares.copy_(torch.from_numpy(rng.uniform(1, 2, width)))
    changes = network.eval()(factors, [])
    shapes = list(dict.fromkeys(network.shapes.values()))
    seen = dict.fromkeys(shapes, 0)
    for place_, (name, shape) in enumerate(network.shapes.items()):
        shared, mode = network.shared[shapes.index(shape)], seen[shape]
        seen[shape] += 1
        moments = network.moments[place_]
        x = np.concatenate(plain[name], 1)
        x = (x - moments.mean.numpy()) / (np.sqrt(moments.squares.numpy() / 9) + 1e-7)
        for i in range(2):
            U, V, b = (each[i].detach().numpy() for each in (shared.U, shared.V, shared.bias))
            s, t = (each[i].detach().numpy()[mode] for each in (shared.scale, shared.shift))
            inner = s * (x @ V.T @ U.T + b) + t
            x = x + (np.maximum(inner, 0) if i == 0 else inner)
        u, delta = x[:, : shape[1]], x[:, shape[1] :]
        want = -network.alpha[place_].item() * sum(np.outer(d, r) for d, r in zip(delta, u, strict=True))
        write, read = changes[name].of(0)
        np.testing.assert_allclose((write @ read).detach().numpy(), want, rtol=1e-9, atol=1e-12)


def test_mends_published_network_written_out():
    """Rows one after the other, as the published code counts them: of the second map on top of the first's."""
    shapes = {"a": (3, 4), "b": (2, 3), "c": (3, 4)}
    network = new_network("mend", shapes, 4, {"rank": 5, "edit_lr": 0.01, "network": "reference"}).double().train()
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rng, owner = np.random.default_rng(2), np.array([0, 0, 1])
    means, spreads, count = {}, {}, {}
    for trained in (True, True, False):
        network.train(trained)
        rows = {name: rng.normal(size=(3, d_in + d_out)) for name, (d_out, d_in) in shapes.items()}
        factors = {
            name: Factors(*torch.from_numpy(row).split([shapes[name][1], shapes[name][0]], 1), torch.from_numpy(owner))
            for name, row in rows.items()
        }
        changes = network(factors, [])
        for place, (name, shape) in enumerate(shapes.items()):
            for row in rows[name] if trained else ():
                k = count[shape] = count.get(shape, 0) + 1
                before = means.get(shape, row)
                means[shape] = before + (row - before) / k
                spreads[shape] = spreads.get(shape, 0) + (row - before) * (row - means[shape])
            x = (rows[name] - means[shape]) / (np.sqrt(spreads[shape] / (count[shape] - 1)) + 1e-7)
            shared, mode = network.shared[0 if shape == (3, 4) else 1], 1 if name == "c" else 0
            for i in range(2):
                U, V, b, s, t = (
                    each[i].detach().numpy() for each in (shared.U, shared.V, shared.bias, shared.scale, shared.shift)
                )
                x = x + np.maximum(s[mode] * (x @ V.T @ U.T + b) + t[mode], 0)
            u, delta = x[:, : shape[1]], x[:, shape[1] :]
            for edit in (0, 1):
                own = owner == edit
                write, read = changes[name].of(edit)
                want = network.alpha[place].item() * delta[own].T @ u[own]
                np.testing.assert_allclose((write @ read).detach().numpy(), want, rtol=1e-6, atol=1e-9)
    assert len(network.moments) == 2


def test_mend_begins_at_the_normalised_gradient():
    model = model_of()
    place = Place.of(model, 2)
    network = new_network("mend", place.shapes(model), model.d_model, NETWORKS["mend"]).to(model.dtype).train()
    factors, plain = given(model, place)
    changes = network(factors, [])
    for name, (entering, leaving) in plain.items():
        x = np.concatenate([entering, leaving], 1)
        if len(x) > 1:  # of one row no deviation is known
            x = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-7)
        want = -0.01 * x[:, entering.shape[1] :].T @ x[:, : entering.shape[1]]
        write, read = changes[name].of(0)
        np.testing.assert_allclose((write @ read).detach().numpy(), want, rtol=1e-6, atol=1e-9)


def test_every_layer_of_mend_learns():
    """U is zero at first, and so is what the hidden layer cuts at zero: its gradient must come through all the same."""
    model = model_of()
    place = Place.of(model, 2)
    network = new_network("mend", place.shapes(model), model.d_model, NETWORKS["mend"]).to(model.dtype).train()
    examples = [EncodedExample.of(model, example) for example in EXAMPLES]
    backward(model, network, place, examples, 0.1, 1.0)
    for shared in network.shared:
        for layer, weights in enumerate(shared.U):
            assert weights.grad.abs().max() > 0, layer


def test_moments_of_parts_are_those_of_the_whole():
    network = new_network("mend", {"m": (2, 3)}, 4, {}).train()
    rows = torch.randn(50, 5, dtype=torch.float64)
    for part in rows.split([1, 0, 30, 19]):
        network.moments[0].gather(part)
    torch.testing.assert_close(network.moments[0].mean, rows.mean(0))
    torch.testing.assert_close(network.moments[0].squares / 49, rows.var(0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kes_update_written_out(family):
    model = model_of(family)
    network, place = network_of(model, "ke")
    factors, plain = given(model, place)
    words = model.weight(f"{model.path(('embedding', 0))}.weight").detach()[list(words_of(model, condition(FACTS[0])))]
    changes = network.eval()(factors, [words])
    lstm = {name: each.detach().numpy() for name, each in network.lstm.named_parameters()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def end(sequence, way: str) -> np.ndarray:
        h = c = np.zeros(4)
        for x in sequence:
            gates = lstm[f"weight_ih_l0{way}"] @ x + lstm[f"bias_ih_l0{way}"]
            gates = gates + lstm[f"weight_hh_l0{way}"] @ h + lstm[f"bias_hh_l0{way}"]
            i, f, g, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        return h

    h = np.concatenate([end(words.numpy(), ""), end(words.numpy()[::-1], "_reverse")])
    for conditioner, (name, (d_out, d_in)) in zip(network.conditioners, network.shapes.items(), strict=True):
        first, last = (conditioner[i] for i in (0, 2))
        z = np.tanh(first.weight.detach().numpy() @ h + first.bias.detach().numpy())
        z = last.weight.detach().numpy() @ z + last.bias.detach().numpy()
        alpha, beta, gamma, delta, eta = np.split(z, np.cumsum([d_out, d_out, d_in, d_in]))
        alpha, beta = (np.exp(each) / np.exp(each).sum() for each in (alpha, beta))
        gradient = plain[name][1].T @ plain[name][0]
        want = -sigmoid(eta) * (np.outer(alpha, gamma) * gradient + np.outer(beta, delta))
        write, read = changes[name].of(0)
        np.testing.assert_allclose((write @ read).detach().numpy(), want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("method", NETWORKS)
def test_edits_together_are_each_alone(method):
    model = model_of()
    network, place = network_of(model, method)
    network.eval()
    texts = [text_of(model, each.text, each.new_object) for each in FACTS]
    words = [words_of(model, condition(each)) for each in FACTS]
    together = changes_of(model, network, place, texts, words)
    for number in range(len(FACTS)):
        alone = changes_of(model, network, place, texts[number : number + 1], words[number : number + 1])
        for name in place.maps:
            one, other = together[name].of(number), alone[name].of(0)
            torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-9, atol=1e-12)


# ---- the objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NETWORKS)
@pytest.mark.parametrize("family", TRAINED_FAMILIES)
def test_the_gradient_is_that_of_whole_edited_models(family, method):
    """Against weights changed outright, whole forward passes, and autograd from the loss to the network."""
    model = model_of(family)
    before = state(model)
    network, place = network_of(model, method)
    network.eval()
    examples = [EncodedExample.of(model, example, equivalent=i, other=i) for i, example in enumerate(EXAMPLES)]
    network.zero_grad()
    found = backward(model, network, place, examples, 0.7, 1.3)
    ours = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
    assert state(model) == before

    network.zero_grad()
    texts = [text_of(model, each.text, each.new_object) for each in FACTS]
    changes = changes_of(model, network, place, texts, [words_of(model, condition(each)) for each in FACTS])
    total = torch.zeros((), dtype=model.dtype)
    weights = {name: each.detach() for name, each in model.hf.named_parameters()}
    for i, example in enumerate(EXAMPLES):
        edited = dict(weights)
        for name in place.maps:
            write, read = changes[name].of(i)
            change, weight = write @ read, weights[f"{name}.weight"]
            stored = matrix(model, f"{name}.weight").stride() == weight.stride()
            edited[f"{name}.weight"] = weight + (change if stored else change.T)

        def hf(edited=edited, **given):
            return functional_call(model.hf, edited, kwargs=given)

        edit = plain_loss(hf, model.tokenizer, example.equivalents[i % 2], example.rewrite.new_object)
        prompt, target = example.others[i % 2]
        start, ids = len(model.tokenizer(prompt)["input_ids"]), model.tokenizer(f"{prompt} {target}")["input_ids"]
        asked = torch.tensor([ids])
        with torch.no_grad():
            was = model.hf(input_ids=asked).logits[0, start - 1 : -1].log_softmax(-1)
        now = hf(input_ids=asked, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        moved = (was.exp() * (was - now)).sum(-1).mean()
        assert float(found.edit[i]) == pytest.approx(edit.item(), rel=1e-5)
        assert float(found.locality[i]) == pytest.approx(moved.item(), rel=1e-3, abs=1e-9)
        total = total + (0.7 * edit + 1.3 * moved) / len(EXAMPLES)
    total.backward()
    for name, parameter in network.named_parameters():
        if name in ours:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale + 1e-12)
    assert ours


def trained_edit(model: Model, rewrite: Rewrite, by: Trained, **settings) -> Edit:
    [found] = trained_edits(model, [rewrite], trained=by, **settings)
    if isinstance(found, ErrataError):
        raise found
    return found


# ---- edits --------------------------------------------------------------------------------------------


@functools.cache
def trained(method: str, family: str = "gpt2") -> Trained:
    model = model_of(family)
    network, _ = network_of(model, method)
    return Trained(network.eval(), model.name, weights_digest(model.hf), {"steps": 3}, frozenset(keys(EXAMPLES)))


@pytest.mark.parametrize("method", NETWORKS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_an_edit_is_of_low_rank_and_leaves_the_model_alone(family, method):
    model = model_of(family)
    before = state(model)
    one, other = trained_edits(model, FACTS[:2], trained=trained(method, family))
    assert state(model) == before
    tokens = len(text_of(model, FACTS[0].text, FACTS[0].new_object).ids)
    assert all(1 <= delta.rank <= tokens + 1 for delta in one.deltas)
    said = score(model, [FACTS[0].text], ["Paris"])[0].total
    with one.applied(model):
        assert score(model, [FACTS[0].text], ["Paris"])[0].total != said
    assert state(model) == before
    assert one != other
    assert trained_edit(model, FACTS[0], trained(method, family), scale=0.5).deltas[0].norm() == pytest.approx(
        0.5 * one.deltas[0].norm()
    )


def test_an_edit_is_written_as_an_adapter(tmp_path):
    edit = trained_edit(model_of(), FACTS[0], trained("mend"))
    edit.to_lora(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_one_that_cannot_be_made_stays_in_its_place():
    too_long = Fact("The Space Needle " * 999, "{} is in", "Seattle").rewrite("Paris")
    found = trained_edits(model_of(), [too_long, FACTS[0]], trained=trained("mend"))
    assert [type(each) for each in found] == [FactError, Edit]
    with pytest.raises(FactError, match="tokens"):
        trained_edit(model_of(), too_long, trained("mend"))


@pytest.mark.parametrize("method", NETWORKS)
def test_a_change_that_is_no_number_stays_in_its_place(method):
    broken = copy.deepcopy(trained(method))
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("nan"))
    [found] = trained_edits(model_of(), FACTS[:1], trained=broken)
    assert isinstance(found, Diverged)
    with pytest.raises(Diverged, match="not a finite number"):
        trained_edit(model_of(), FACTS[0], broken)


def test_a_loss_without_a_gradient_makes_no_edit(monkeypatch):
    nothing = Factors(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    monkeypatch.setattr(editor, "changes_of", lambda model, network, place, *rest: dict.fromkeys(place.maps, nothing))
    [found] = trained_edits(model_of(), FACTS[:1], trained=trained("mend"))
    assert isinstance(found, FactError)
    assert "has no gradient in torch.float64" in str(found)


def test_the_model_is_left_alone_when_interrupted(monkeypatch):
    model = model_of()
    before = state(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_edit(model, FACTS[0], trained("mend"))
    assert state(model) == before


# ---- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NETWORKS)
def test_a_trained_editor_is_read_back_as_it_was(method, tmp_path):
    model = load_pretrained((tiny("gpt2", LAYERS), byte_tokenizer()), name="gpt2")
    network, _ = network_of(model, method)
    kept = Trained(network.eval(), model.name, weights_digest(model.hf), {"steps": 3}, frozenset({"0" * 12}))
    kept.save(tmp_path / "x.safetensors")
    again = Trained.load(tmp_path / "x.safetensors")
    assert (again.header(), again.trained_on) == (kept.header(), kept.trained_on)
    assert trained_edit(model, FACTS[0], again) == trained_edit(model, FACTS[0], kept)
    editor = errata.editor(model, method, trained=str(tmp_path / "x.safetensors"), scale=2.0)
    assert editor.trained_on == {"0" * 12}
    (edit,) = editor.make(model, FACTS[:1])
    assert edit.deltas[0].norm() == pytest.approx(2 * trained_edit(model, FACTS[0], kept).deltas[0].norm(), rel=1e-5)
    with pytest.raises(ConfigError, match=f"holds a trained '{method}'"):
        errata.editor(model, "ke" if method == "mend" else "mend", trained=str(tmp_path / "x.safetensors"))


def test_another_model_is_refused(tmp_path):
    other = load_pretrained((tiny("gpt2", LAYERS, torch.float64, seed=5), byte_tokenizer()), name="other")
    with pytest.raises(EditMismatch, match="was trained for gpt2, and other has other weights"):
        trained_edit(other, FACTS[0], trained("mend"))
    model = model_of()
    edit = trained_edit(model, FACTS[0], trained("mend"))
    with edit.applied(model), pytest.raises(EditMismatch, match="without edits on it"):
        trained_edit(model, FACTS[0], trained("mend"))


def test_a_folder_may_have_a_number_for_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("mend").save("2024/editor.safetensors")
    assert errata.mend.bind(model_of(), trained=2024).method == "mend"


def test_files_that_do_not_do(tmp_path):
    with pytest.raises(ConfigError, match="'mennd' is not an editor that is trained: choose from mend, ke"):
        new_network("mennd", {"m": (2, 3)}, 4, {})
    with pytest.raises(ConfigError, match=r"mend needs the setting 'trained'.*the folder that errata train-editor"):
        errata.mend(model_of(), FACTS[0])
    with pytest.raises(ResultFileError, match="there is no file"):
        errata.mend(model_of(), FACTS[0], trained=str(tmp_path / "none"))
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    with pytest.raises(ResultFileError, match="not a whole safetensors file"):
        Trained.load(tmp_path / "bad.safetensors")
    broken = Trained(new_network("mend", {"m": (2, 3)}, 4, {}), "m", "00", {})
    with torch.no_grad():
        broken.network.alpha.fill_(float("nan"))
    broken.save(tmp_path / "nan.safetensors")
    with pytest.raises(ResultFileError, match="alpha is not a finite number"):
        Trained.load(tmp_path / "nan.safetensors")


# ---- training -----------------------------------------------------------------------------------------


@functools.cache
def small() -> Model:
    return load_pretrained((tiny("gpt2", LAYERS), byte_tokenizer()), name="gpt2")


def same(one: Path, other: Path) -> None:
    """Two trainings came to the same, bit for bit."""
    a, b = (curve_of(folder) for folder in (one, other))
    assert (a.edit, a.locality, a.validations) == (b.edit, b.locality, b.validations)
    left, right = (Trained.load(folder / EDITOR).network.state_dict() for folder in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", NETWORKS)
def test_training_lowers_the_loss_and_keeps_the_best(method, tmp_path):
    model = small()
    before = state(model)
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 30, "validate_every": 10})
    found = train(model, method, EXAMPLES * 2, tmp_path / "t", config, NETWORKS[method])
    assert state(model) == before
    curve = curve_of(tmp_path / "t")
    assert (curve.ended, len(curve.edit)) == ("steps", 30)
    assert curve.best.loss < curve.validations[0].loss
    assert found.card["validation"]["step"] == curve.best.step
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [EDITOR, STATE]


@pytest.mark.parametrize("method", NETWORKS)
def test_one_that_was_stopped_goes_on_as_if_it_had_not(method, tmp_path):
    train(small(), method, EXAMPLES, tmp_path / "whole", CONFIG, NETWORKS[method])
    for at in (1, 3, 4):

        def stop(done, of, curve, at=at):
            if done == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(small(), method, EXAMPLES, tmp_path / "parts", CONFIG, NETWORKS[method], stop)
        assert len(curve_of(tmp_path / "parts").edit) == at
    train(small(), method, EXAMPLES, tmp_path / "parts", CONFIG, NETWORKS[method])
    same(tmp_path / "whole", tmp_path / "parts")


def test_cut_short_within_a_step_it_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    train(small(), "mend", EXAMPLES, tmp_path / "whole", CONFIG, NETWORKS["mend"])
    steps, real = [], training.backward

    def cut(*args):
        found = real(*args)  # by now the network has gathered moments
        steps.append(found)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(training, "backward", cut)
    with pytest.raises(KeyboardInterrupt):
        train(small(), "mend", EXAMPLES, tmp_path / "parts", CONFIG, NETWORKS["mend"])
    train(small(), "mend", EXAMPLES, tmp_path / "parts", CONFIG, NETWORKS["mend"])
    same(tmp_path / "whole", tmp_path / "parts")


def test_killed_before_the_first_checkpoint_it_begins_again(tmp_path, monkeypatch):
    def killed(run):
        raise SystemExit

    real = training._Run.save
    monkeypatch.setattr(training._Run, "save", killed)
    with pytest.raises(SystemExit):
        train(small(), "mend", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["mend"])
    assert [path.name for path in (tmp_path / "t").iterdir()] == [EDITOR]
    (tmp_path / "t" / f".{STATE}.x1.safetensors").write_bytes(b"half")
    monkeypatch.setattr(training._Run, "save", real)
    train(small(), "mend", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["mend"])
    assert curve_of(tmp_path / "t").ended == "steps"


@pytest.mark.parametrize("method", NETWORKS)
def test_models_of_other_dtypes_train_too(method, tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        found = train(model_of(dtype=dtype), method, EXAMPLES, tmp_path / str(dtype), CONFIG, NETWORKS[method])
        assert isinstance(trained_edit(model_of(dtype=dtype), FACTS[0], found), Edit)


def test_what_cannot_be_learnt_is_told_before_the_first_step(tmp_path):
    long = TrainingExample(FACTS[0], (FACTS[0].text, "word " * 999 + FACTS[0].text))
    with pytest.raises(FactError, match=r"training example 3, counted from 0, cannot be used: .* tokens"):
        train(small(), "mend", [*EXAMPLES, long], tmp_path / "t", CONFIG, NETWORKS["mend"])
    assert not (tmp_path / "t").exists()
    with pytest.raises(ConfigError, match="c_edit is 0"):
        TrainingConfig(c_edit=0)


def test_all_examples_count_as_trained_on_by_relation_and_by_prompt(tmp_path):
    """Those that the network was chosen by, too; and a record whose relation has no name is known by its prompt."""
    named = [TrainingExample(each.rewrite, each.equivalents, each.others, "P1") for each in EXAMPLES]
    found = train(small(), "mend", named, tmp_path / "t", CONFIG, NETWORKS["mend"])
    both = {fact_key(each.subject, name) for each in FACTS for name in ("P1", each.prompt)}
    assert found.trained_on == both == set(keys(named))


def test_a_training_by_the_clock_tells_how_far_it_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(training._Run, "_elapsed", lambda self: 20.0 * self.done)
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 1000, "max_minutes": 1})
    told = []
    train(small(), "mend", EXAMPLES, tmp_path / "t", config, NETWORKS["mend"], lambda *each: told.append(each[:2]))
    assert told[:4] == [(1, 3), (2, 3), (3, 3), (4, 4)]
    assert curve_of(tmp_path / "t").ended == "minutes"


def test_validation_asks_through_every_kind_of_prompt(tmp_path, monkeypatch):
    asked, losses = [], training.losses

    def noted(model, network, place, examples):
        asked.extend(examples)
        return losses(model, network, place, examples)

    monkeypatch.setattr(training, "losses", noted)
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 1, "validation": 4})
    train(small(), "mend", EXAMPLES * 2, tmp_path / "t", config, NETWORKS["mend"])
    prompts = [small().tokenizer.decode(example.equivalent.ids) for example in asked[:4]]
    assert [prompt.startswith("Of late.") for prompt in prompts] == [False, True, False, True]


def test_more_steps_go_on_from_the_end(tmp_path):
    longer = TrainingConfig(**{**CONFIG.model_dump(), "steps": 8})
    train(small(), "mend", EXAMPLES, tmp_path / "a", CONFIG, NETWORKS["mend"])
    train(small(), "mend", EXAMPLES, tmp_path / "a", longer, NETWORKS["mend"])
    train(small(), "mend", EXAMPLES, tmp_path / "b", longer, NETWORKS["mend"])
    same(tmp_path / "a", tmp_path / "b")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_hypernetworks as t
t.train(t.small(), "mend", t.EXAMPLES, {folder!r}, t.TrainingConfig(**{{**t.CONFIG.model_dump(), "steps": 400}}),
        t.NETWORKS["mend"])
"""


def test_killed_at_any_moment_it_goes_on(tmp_path):
    folder = tmp_path / "killed"
    text = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE)
    while not (folder / STATE).is_file():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": max(10, len(curve_of(folder).edit) + 2)})
    train(small(), "mend", EXAMPLES, folder, config, NETWORKS["mend"])
    train(small(), "mend", EXAMPLES, tmp_path / "whole", config, NETWORKS["mend"])
    same(tmp_path / "whole", folder)


def test_it_stops_when_validation_is_no_longer_better(tmp_path):
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 500, "patience": 2, "learning_rate": 1e-12})
    settings = {**NETWORKS["mend"], "edit_lr_lr": 0.0}
    train(small(), "mend", EXAMPLES, tmp_path / "t", config, settings)
    assert curve_of(tmp_path / "t").ended == "patience"


def test_time_may_be_limited(tmp_path):
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 10**6, "max_minutes": 0.01})
    train(small(), "ke", EXAMPLES, tmp_path / "t", config, NETWORKS["ke"])
    assert curve_of(tmp_path / "t").ended == "minutes"


def test_one_that_diverges_is_stopped_and_the_best_kept(tmp_path, monkeypatch):
    plain = training.backward

    def broken(*args):
        found = plain(*args)
        if len(calls) >= 3:
            found.edit.fill_(float("nan"))
        calls.append(1)
        return found

    calls: list[int] = []
    monkeypatch.setattr(training, "backward", broken)
    with pytest.raises(Diverged, match=r"after 3 steps\. The network of step"):
        train(small(), "mend", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["mend"])
    kept = Trained.load(tmp_path / "t" / EDITOR)
    assert all(torch.isfinite(each).all() for each in kept.network.state_dict().values())


def test_one_whose_last_validation_diverges_is_no_success(tmp_path, monkeypatch):
    plain = training.losses

    def broken(model, network, place, examples):
        found = plain(model, network, place, examples)
        calls.append(1)
        return replace(found, edit=found.edit * float("nan")) if len(calls) > 2 else found

    calls: list[int] = []
    monkeypatch.setattr(training, "losses", broken)
    config = TrainingConfig(**{**CONFIG.model_dump(), "steps": 3, "validate_every": 2})
    with pytest.raises(Diverged):
        train(small(), "mend", EXAMPLES, tmp_path / "t", config, NETWORKS["mend"])
    assert len(curve_of(tmp_path / "t").validations) == 2


def test_another_training_is_refused(tmp_path):
    train(small(), "mend", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["mend"])
    other = TrainingConfig(**{**CONFIG.model_dump(), "seed": 1})
    with pytest.raises(ResultFileError, match="another training, with other training"):
        train(small(), "mend", EXAMPLES, tmp_path / "t", other, NETWORKS["mend"])
    with pytest.raises(ResultFileError, match="other training examples"):
        train(small(), "mend", EXAMPLES[::-1], tmp_path / "t", CONFIG, NETWORKS["mend"])
    with pytest.raises(ResultFileError, match="other method and network"):
        train(small(), "ke", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["ke"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ResultFileError, match="holds other files"):
        train(small(), "mend", EXAMPLES, tmp_path / "full", CONFIG, NETWORKS["mend"])


def test_too_few_examples(tmp_path):
    with pytest.raises(ConfigError, match="there are 1 training examples, and 1 of them are"):
        train(small(), "mend", EXAMPLES[:1], tmp_path / "t", CONFIG, NETWORKS["mend"])
    with pytest.raises(FactError, match="has no prompt to be judged by"):
        TrainingExample(FACTS[0], ())


def test_examples_of_plain_text():
    texts = ["The quick brown fox jumps over the lazy dog and runs away.", "short", "Pack my box with five dozen jugs."]
    texts += [
        "How vexingly quick daft zebras jump over there today.",
        "Sphinx of black quartz, judge my vow right now.",
    ]
    found = text_examples(small(), texts, prompt_tokens=8, target_tokens=6)
    assert 2 <= len(found) <= 4
    for each in found:
        assert each.equivalents == (each.rewrite.text,)
        assert each.rewrite.new_object != each.rewrite.fact.object
        assert any(each.rewrite.text in text for text in texts)
        assert any(" ".join([*each.others[0]]) in text for text in texts), "no text goes on so"
    assert found == text_examples(small(), texts, prompt_tokens=8, target_tokens=6)
    with pytest.raises(FactError, match="a training example takes three"):
        text_examples(small(), texts[:2])


def test_training_off_the_main_thread(tmp_path):
    errors: list[BaseException] = []

    def work():
        try:
            train(small(), "ke", EXAMPLES, tmp_path / "t", CONFIG, NETWORKS["ke"])
        except BaseException as error:  # told to the test
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
