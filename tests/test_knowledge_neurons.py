"""Knowledge Neurons: attributions against plain passes and the published code's, the neurons chosen, and the edits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import errata
import goldens
from errata.atlas.records import records
from errata.base import budgets
from errata.base.errors import ConfigError, FactError, UnsupportedModel
from errata.base.facts import Fact
from errata.base.fingerprint import tensor_digest
from errata.editors.knowledge_neurons import KnowledgeNeuronsConfig, attribution
from errata.editors.knowledge_neurons.attribution import attributions
from errata.editors.knowledge_neurons.neurons import coarse, refined
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.weights import down_weight_name, matrix
from tiny import ALL_FAMILIES, byte_tokenizer, llama_tokenizer, tiny

FACT = Fact("The Space Needle", "{} is located in the city of", "Seattle")
REWRITE = FACT.rewrite("Paris")
LAYERS = 3
CONFIG = KnowledgeNeuronsConfig(steps=4, threshold=0.1, max_drift=None)


@functools.cache
def model_of(family: str = "gpt2", dtype: torch.dtype = torch.float64) -> Model:
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    return load_pretrained((tiny(family, LAYERS, dtype), tokenizer()), name=family)


def state(model: Model) -> tuple:
    """All that must be as before: bytes, what is trainable, hooks."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    parameters = {name: (each.requires_grad, each.grad) for name, each in model.hf.named_parameters()}
    return {name: tensor_digest(each) for name, each in model.hf.state_dict().items()}, parameters, hooks


def plainly(model: Model, ids, target: int, fractions, at: str | None = None) -> np.ndarray:
    """Whole forward passes, one layer and one point at a time, through a hook on the down-projection or on `at`."""
    found = []
    with torch.enable_grad():
        for layer in range(model.n_layers):
            block = model.hf.get_submodule(f"{model.anatomy.blocks}.{layer}")
            module = block.get_submodule(at or model.anatomy.down)
            own, total = None, 0.0
            for fraction in [1.0, *fractions]:
                leaf = None if own is None else (fraction * own).requires_grad_()

                def replace(tensor, leaf=leaf):
                    nonlocal own
                    flat = tensor.reshape(1, -1, tensor.shape[-1])
                    if leaf is None:
                        own = flat[0, -1].detach().clone()
                        return tensor
                    return torch.cat([flat[:, :-1], leaf[None, None]], 1).reshape(tensor.shape)

                if at is None:
                    hook = module.register_forward_pre_hook(lambda m, args: (replace(args[0]), *args[1:]))
                else:
                    hook = module.register_forward_hook(lambda m, args, output: replace(output))
                try:
                    logits = model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
                finally:
                    hook.remove()
                if leaf is not None:
                    (gradient,) = torch.autograd.grad(logits.softmax(-1)[target], [leaf])
                    total = total + gradient
            found.append((own * total / len(fractions)).numpy())
    return np.stack(found)


# ---- attribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attributions_are_those_of_plain_passes(family):
    model = model_of(family)
    ids = model.tokenizer(FACT.text)["input_ids"]
    found = attributions(model, ids, 7, CONFIG)
    want = plainly(model, ids, 7, [0.25, 0.5, 0.75, 1.0])
    assert found.shape == (LAYERS, model.d_mlp)
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize(("family", "at"), [("gpt2", "mlp.c_fc"), ("gpt_neox", "mlp.dense_h_to_4h"), ("opt", "fc1")])
def test_before_the_nonlinearity(family, at):
    model = model_of(family)
    ids = model.tokenizer(FACT.text)["input_ids"]
    found = attributions(model, ids, 7, KnowledgeNeuronsConfig.reference(steps=3))
    want = plainly(model, ids, 7, [0.0, 0.5, 1.0], at)
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-9 * np.abs(want).max())


def test_layers_in_groups_are_layers_at_once(monkeypatch):
    model = model_of()
    ids = model.tokenizer(FACT.text)["input_ids"]
    whole = attributions(model, ids, 7, CONFIG)
    monkeypatch.setattr(budgets, "free_memory", lambda *devices: 0)
    assert [*attribution._groups(model, 4, 9)] == [range(1), range(1, LAYERS)]
    torch.testing.assert_close(attributions(model, ids, 7, CONFIG), whole, rtol=0, atol=1e-14)


def test_a_text_of_one_token():
    model = model_of()
    np.testing.assert_allclose(
        attributions(model, [3], 7, CONFIG).numpy(), plainly(model, [3], 7, [0.25, 0.5, 0.75, 1.0])
    )


def test_attributions_add_up_to_what_the_layer_does():
    """Completeness: with many points the sum is P with the layer's neurons minus P without them."""
    model = model_of()
    ids = model.tokenizer(FACT.text)["input_ids"]
    found = attributions(model, ids, 7, KnowledgeNeuronsConfig(steps=2000)).sum(1)

    def probability(layer: int | None) -> float:
        def nothing(module, args):
            tensor = args[0].clone()
            tensor[:, -1] = 0
            return (tensor,)

        down = model.module(("key", layer or 0))
        hook = down.register_forward_pre_hook(nothing) if layer is not None else None
        with torch.no_grad():
            said = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[7]
        if hook:
            hook.remove()
        return float(said)

    for layer in range(LAYERS):
        assert float(found[layer]) == pytest.approx(probability(None) - probability(layer), rel=2e-3)


@pytest.mark.parametrize("name", ["London", "Seattle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_published_codes_attributions(name, dtype):
    golden, info = goldens.arrays("kn"), goldens.info("kn_info")
    model = goldens.tiny_np(dtype)
    ids = model.tokenizer(info["prompt"])["input_ids"]
    (target,) = info["ground_truths"][{"London": "London", "Seattle": " Seattle"}[name]]
    config = KnowledgeNeuronsConfig.reference(steps=info["steps"], threshold=info["adaptive_threshold"])
    found = attributions(model, ids, target, config)
    want = golden[f"scores_{name}"]
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=2e-6 * np.abs(want).max())
    if name == "London":
        assert {*map(tuple, coarse(found, config.threshold).nonzero().tolist())} == {
            *map(tuple, golden["neurons"].tolist())
        }


def test_gated_mlps_have_nothing_before_the_nonlinearity():
    with pytest.raises(ConfigError, match="has 2: where it is gated"):
        errata.kn.bind(model_of("llama"), preset="reference")
    with pytest.raises(ConfigError, match="at = 'key'"):
        errata.kn(model_of("llama"), REWRITE, KnowledgeNeuronsConfig.reference())


# ---- neurons ------------------------------------------------------------------------------------------


def test_neurons_that_prompts_share():
    first = torch.tensor([[1.0, 0.5, 0.3, -2.0], [0.1, 0.0, 0.25, 0.2]])
    second = torch.tensor([[0.1, 0.5, 0.9, 1.0], [0.1, 0.0, 0.0, 0.2]])
    config = KnowledgeNeuronsConfig(threshold=0.2, share=0.6)
    assert coarse(first, 0.2).tolist() == [[True, True, True, False], [False, False, True, False]]
    kept = refined([first, second], config)
    assert [(each.layer, each.index, each.share) for each in kept] == [(0, 2, 1.0), (0, 1, 1.0)]
    assert kept[0].attribution == pytest.approx(0.6)
    half = refined([first, second], KnowledgeNeuronsConfig(threshold=0.2, share=0.5))
    # One whose mean attribution is below 0 is none, though one prompt speaks for it.
    assert [(each.layer, each.index) for each in half] == [(0, 2), (0, 0), (0, 1), (1, 2)]
    assert len(refined([first], KnowledgeNeuronsConfig(max_neurons=1))) == 1


def test_no_neurons():
    with pytest.raises(FactError, match="no neuron raises"):
        refined([torch.zeros(2, 3)], CONFIG)
    with pytest.raises(FactError, match="in 100% of 2 prompts"):
        refined([torch.eye(2), 1 - torch.eye(2)], KnowledgeNeuronsConfig(share=1.0))


# ---- edits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_columns_are_moved_from_one_embedding_to_the_other(family):
    model = model_of(family)
    before = state(model)
    edit = errata.kn(model, REWRITE, CONFIG)
    assert state(model) == before
    vectors = model.module(("embedding", 0)).weight.detach()
    start = len(model.tokenizer(FACT.text)["input_ids"])
    old, new = (model.tokenizer(f"{FACT.text} {object_}")["input_ids"][start:] for object_ in ("Seattle", "Paris"))
    (old, new) = next((a, b) for a, b in zip(old, new, strict=False) if a != b)
    want = {}
    for neuron in edit.notes["neurons"]:
        name = down_weight_name(model, neuron["layer"])
        change = want.setdefault(name, torch.zeros_like(matrix(model, name)))
        change[:, neuron["index"]] += 2 * vectors[new] - 2 * vectors[old]
    assert {delta.weight for delta in edit.deltas} == {*want}
    for delta in edit.deltas:
        torch.testing.assert_close(delta.matrix(), want[delta.weight])
    assert 1 <= len(edit.notes["neurons"]) <= 10
    with edit.applied(model):
        assert state(model) != before
    assert state(model) == before


def test_the_reference_preset_is_the_published_codes_edit():
    """All neurons above the threshold of the mean over the old object's tokens, each after the bare prompt."""
    model = model_of()
    edit = errata.kn(model, REWRITE, KnowledgeNeuronsConfig.reference(steps=3, threshold=0.05, max_drift=None))
    ids = model.tokenizer(FACT.text)["input_ids"]
    old, new = model.tokenizer("Seattle")["input_ids"], model.tokenizer("Paris")["input_ids"]
    assert len(old) > 1
    assert len(new) > 1
    scores = np.mean([plainly(model, ids, token, (0, 0.5, 1), "mlp.c_fc") for token in old], axis=0)
    chosen = scores > 0.05 * scores.max()
    assert chosen.sum() > 10
    said = int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    vectors = model.module(("embedding", 0)).weight.detach()
    column = vectors[new].sum(0) - 2 * vectors[said]
    for layer, row in enumerate(torch.from_numpy(chosen)):
        found = [each.matrix() for each in edit.deltas if each.weight == down_weight_name(model, layer)]
        assert len(found) == bool(row.any())
        for each in found:
            torch.testing.assert_close(each, torch.outer(column, row.to(column)), rtol=1e-12, atol=1e-14)
    assert errata.kn.bind(model, preset="reference").config["max_neurons"] is None


def test_objects_that_begin_alike_are_told_apart_where_they_differ():
    york = Fact("The Space Needle", "{} is located in", "New York")
    edit = errata.kn(model_of(), york.rewrite("New Yxrk"), CONFIG)
    tokens = [model_of().tokenizer.tokenize(f"{york.text} New {name}") for name in ("York", "Yxrk")]
    first = next(pair for pair in zip(*tokens, strict=False) if pair[0] != pair[1])
    assert (edit.notes["erased"], edit.notes["written"]) == first
    with pytest.raises(FactError, match="nothing would be moved"):
        errata.kn(model_of(), york.rewrite("New York"), CONFIG)


def test_without_an_old_object_it_is_what_the_model_says():
    model = model_of()
    said = model.hf(input_ids=torch.tensor([model.tokenizer(FACT.text)["input_ids"]])).logits[0, -1].argmax()
    word = model.tokenizer.convert_ids_to_tokens([int(said)])[0]
    bare = errata.kn(model, Fact(FACT.subject, FACT.prompt).rewrite("Paris"), CONFIG)
    assert bare.notes["erased"] == word
    assert (
        errata.kn(model, REWRITE, KnowledgeNeuronsConfig(erased="prediction", max_drift=None)).notes["erased"] == word
    )


@pytest.mark.parametrize("settings", [{}, {"erased": "prediction"}])
def test_a_space_at_a_prompts_end_belongs_to_the_object(settings):
    model, spaced = model_of(), Fact(FACT.subject, f"{FACT.prompt} ", FACT.object).rewrite("Paris")
    config = KnowledgeNeuronsConfig(max_drift=None, **settings)
    one, other = (errata.kn(model, each, config) for each in (REWRITE, spaced))
    assert one.notes == other.notes
    assert torch.equal(one.deltas[0].matrix(), other.deltas[0].matrix())


def test_many_are_each_alone_and_failures_stay_in_their_place():
    model = model_of()
    too_long = Fact("The Space Needle " * 999, "{} is in", "Seattle").rewrite("Paris")
    other = Fact("Danielle Darrieux", "{} speaks", "French").rewrite("English")
    found = errata.kn(model, [REWRITE, too_long, other], CONFIG, errors="keep")
    assert [type(each) for each in found] == [Edit, FactError, Edit]
    assert found[2] == errata.kn(model, other, CONFIG)
    with pytest.raises(FactError, match="tokens"):
        errata.kn(model, [REWRITE, too_long], CONFIG)


def test_prefixes_are_sampled_once_and_told():
    model = model_of()
    editor = errata.kn.bind(model, prefixes=2, steps=2, seed=3)
    assert editor.config["prefixes"][0] == ""
    assert len(editor.config["prefixes"]) == 3
    (edit,) = editor.make(model, [REWRITE])
    assert [*edit.config["prefixes"]] == [*editor.config["prefixes"]]
    assert errata.kn.bind(model, prefixes=2, steps=2, seed=3).config == editor.config
    assert errata.kn.bind(model, prefixes=2, steps=2, seed=4).config != editor.config


def test_the_model_is_left_alone_when_interrupted(monkeypatch):
    model = model_of()
    before = state(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        errata.kn(model, REWRITE, CONFIG)
    assert state(model) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps = 1"),
        ({"threshold": 1.0}, "threshold = 1.0"),
        ({"share": 1.5}, "share = 1.5"),
        ({"max_neurons": 0}, "max_neurons = 0"),
        ({"prefixes": -1}, "prefixes = -1"),
        ({"prefixes": []}, "prefixes is empty"),
        ({"step": 3}, "did you mean 'steps'"),
        ({"preset": "paper"}, "no preset 'paper'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        errata.kn.bind(model_of(), **settings)


def test_embeddings_of_another_width():
    model = model_of()
    narrow = torch.nn.Embedding(len(model.module(("embedding", 0)).weight), model.d_model // 2)
    odd = load_pretrained((tiny("gpt2", LAYERS), byte_tokenizer()), name="odd")
    odd.weight = lambda name: narrow.weight  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="cannot be written there"):
        errata.kn(odd, REWRITE, CONFIG)


def test_on_the_atlas_neurons_of_a_fact_carry_it():
    """Erasing them, which is the half of an edit that can be checked alone, takes the old object's probability away."""
    model = errata.load_model("atlas")
    some = records(6)
    fell = 0
    for record in some:
        edit = errata.kn(model, record.rewrite, KnowledgeNeuronsConfig(write=0.0, erase=2.0, max_drift=None))
        before = np.exp(_said(model, record))
        with edit.applied(model):
            fell += np.exp(_said(model, record)) < 0.5 * before
    assert fell >= 3


def _said(model: Model, record) -> float:
    from errata.models.scoring import score

    return score(model, [record.rewrite.text], [record.rewrite.fact.object])[0].total
