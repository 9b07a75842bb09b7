"""Streams read and replaced, against Hugging Face's own hidden states and a GPT-2 written out by hand."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from errata.base.errors import ConfigError
from errata.models.loading import load_pretrained
from errata.models.weights import matrix
from errata.passes.hooks import hooked
from errata.passes.reading import read
from helpers.models import hooks_of, shared_model
from tiny import FAMILIES, llama_tokenizer, tiny

TEXTS = ["The Space Needle is located in the city of", "Where is the Louvre?", "Rome"]
LAYERS = 3
ALL = [(part, layer) for part in ("state", "attention", "mlp", "key", "value") for layer in range(LAYERS)]


def run(model, batch, patches=None) -> torch.Tensor:
    """Logits `[b, t, v]` of a forward pass with patches."""
    with hooked(model, patches or {}):
        return model.forward(batch)


@pytest.fixture(autouse=True)
def no_hook_stays_behind():
    """Hugging Face's own permanent hooks for hidden states come with their first use, so have it first."""
    batch = shared_model("gpt2").encode(TEXTS)
    for family in FAMILIES:
        shared_model(family).hf(batch.input_ids, output_hidden_states=True)
    before = [hooks_of(shared_model(family)) for family in FAMILIES]
    yield
    assert [hooks_of(shared_model(family)) for family in FAMILIES] == before


# ---- against Hugging Face -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_hugging_faces_hidden_states(family):
    model = shared_model(family)
    batch = model.encode(TEXTS)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        theirs = model.hf(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
        )
    states = read(model, batch, [("state", layer) for layer in range(LAYERS)])
    for layer in range(LAYERS - 1):
        assert torch.allclose(states["state", layer][mask], theirs.hidden_states[layer + 1][mask], atol=1e-5)
    norm = model.hf.get_submodule(model.anatomy.final_norm)
    assert torch.allclose(norm(states["state", LAYERS - 1])[mask], theirs.hidden_states[-1][mask], atol=1e-5)
    assert torch.allclose(model.unembed(states["state", LAYERS - 1])[mask], theirs.logits[mask], atol=1e-4)
    assert torch.allclose(run(model, batch)[mask], theirs.logits[mask], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_of_one_block_fit_together(family):
    model = shared_model(family)
    batch = model.encode(TEXTS)
    found = read(model, batch, ALL)
    anatomy = model.anatomy
    for layer in range(LAYERS):
        down = model.module(("key", layer))
        weight = matrix(model, f"{model.path(('key', layer))}.weight").detach()
        value = nn.functional.linear(found["key", layer], weight, getattr(down, "bias", None))
        assert torch.allclose(value, found["value", layer], atol=1e-5)
        assert torch.equal(found["value", layer], found["mlp", layer])
        if layer:
            block = model.blocks[layer]
            branches = [
                block.get_submodule(norm)(found[part, layer]) if norm else found[part, layer]
                for part, norm in (("attention", anatomy.attention_norm), ("mlp", anatomy.mlp_norm))
            ]
            expected = found["state", layer - 1] + sum(branches)
            assert torch.allclose(found["state", layer], expected, atol=1e-5)


# ---- against GPT-2 written out ------------------------------------------------------------------------


def written_out(weights: dict, ids: torch.Tensor, heads: int, replaced: dict | None = None) -> dict:
    """GPT-2's forward pass on one text `[t]`, from its state dict alone. `replaced` streams stand in."""
    replaced = replaced or {}
    streams: dict = {}

    def pass_on(stream, tensor):
        streams[stream] = replaced.get(stream, tensor)
        return streams[stream]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    t = len(ids)
    embedded = pass_on(("embedding", 0), weights["transformer.wte.weight"][ids])
    state = embedded + weights["transformer.wpe.weight"][:t]
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        q, k, v = linear(norm(state, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
        mixed = []
        for head in range(heads):
            d = q.shape[-1] // heads
            part = slice(head * d, (head + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            mixed.append(scores.softmax(-1) @ v[:, part])
        attention = pass_on(("attention", layer), linear(torch.cat(mixed, -1), f"{name}.attn.c_proj"))
        state = state + attention
        inner = linear(norm(state, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        key = pass_on(("key", layer), gelu)
        mlp = pass_on(("mlp", layer), pass_on(("value", layer), linear(key, f"{name}.mlp.c_proj")))
        state = pass_on(("state", layer), state + mlp)
    streams["logits"] = norm(state, "transformer.ln_f") @ weights["transformer.wte.weight"].T
    return streams


@pytest.fixture(scope="module")
def gpt2():
    model = shared_model("gpt2", torch.float64)
    weights = {name: value.detach() for name, value in model.hf.state_dict().items()}
    return model, weights, functools.partial(written_out, weights, heads=2)


def test_every_stream_of_gpt2_is_what_the_written_out_pass_has(gpt2):
    model, _, by_hand = gpt2
    batch = model.encode(TEXTS)
    streams = [("embedding", 0), *ALL]
    found = read(model, batch, streams)
    logits = run(model, batch)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        wanted = by_hand(ids)
        for stream in streams:
            assert torch.allclose(found[stream][row, : len(ids)], wanted[stream], atol=1e-12, rtol=1e-10), stream
        assert torch.allclose(logits[row, : len(ids)], wanted["logits"], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("stream", [("embedding", 0), *ALL])
def test_replacing_any_stream_of_gpt2_does_what_the_written_out_pass_does(gpt2, stream):
    model, _, by_hand = gpt2
    batch = model.encode(TEXTS[:1])
    plain = read(model, batch, [stream])[stream]
    new = torch.randn(plain.shape, dtype=plain.dtype, generator=torch.Generator().manual_seed(1))
    new[:, :2] = plain[:, :2]
    wanted = by_hand(batch.input_ids[0], replaced={stream: new[0]})["logits"]
    seen = []
    found = run(model, batch, {stream: lambda tensor: seen.append(tensor) or new})
    assert torch.allclose(found[0], wanted, atol=1e-12, rtol=1e-10)
    assert torch.equal(seen[0], plain)
    assert not torch.allclose(found, run(model, batch))


def test_patches_of_one_pass_see_each_other(gpt2):
    model, _, by_hand = gpt2
    batch = model.encode(TEXTS[:1])
    zeros = {("mlp", 0): 0.0, ("value", 0): 7.0, ("key", 1): 0.0, ("attention", 2): 0.0}
    patches = {s: functools.partial(torch.full_like, fill_value=x) for s, x in zeros.items()}
    plain = read(model, batch, zeros)
    replaced = {s: torch.full_like(plain[s][0], x) for s, x in zeros.items()}
    assert torch.allclose(run(model, batch, patches)[0], by_hand(batch.input_ids[0], replaced=replaced)["logits"])


# ---- behaviour ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_a_batch_equals_its_texts_one_by_one(family, dtype):
    model = shared_model(family, dtype)
    # GPT-J computes its attention in float32 whatever the dtype
    tolerance = 1e-5 if dtype == torch.float32 or family == "gptj" else 1e-13
    together = read(model, model.encode(TEXTS), ALL)
    for row, text in enumerate(TEXTS):
        alone = read(model, model.encode([text]), ALL)
        for stream in ALL:
            mine, wanted = together[stream][row, : alone[stream].shape[1]], alone[stream][0]
            assert (mine - wanted).abs().max() <= tolerance * wanted.abs().max(), stream


def test_gemma_2_reads_padded_batches_in_float64():
    model = shared_model("gemma2", torch.float64)
    assert read(model, model.encode(TEXTS), ALL)["state", 2].isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3"])
def test_patches_of_every_stream_see_batch_tokens_features(family):
    model = shared_model(family)
    batch = model.encode(TEXTS)
    shapes = {}
    patches = {stream: functools.partial(lambda s, x: shapes.update({s: tuple(x.shape)}), stream) for stream in ALL}
    logits = run(model, batch, patches)
    b, t = batch.input_ids.shape
    for stream in ALL:
        assert shapes[stream] == (b, t, model.d_mlp if stream[0] == "key" else model.d_model)
    assert torch.equal(logits, run(model, batch))
    rows = torch.zeros(b, 1, 1)
    rows[1] = 1.0
    changed = run(model, batch, {("value", 1): lambda x: x + rows})
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])
    assert not torch.allclose(changed[1], logits[1])


def test_reading_stops_behind_the_last_stream_needed():
    model = shared_model("gpt2")
    batch = model.encode(TEXTS)
    calls = []
    handles = [
        model.hf.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: calls.append(path))
        for path in ("transformer.h.0", "transformer.h.1.attn", "transformer.h.1", "lm_head")
    ]
    try:
        read(model, batch, [("key", 1), ("state", 0)])
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["transformer.h.0", "transformer.h.1.attn"]


def test_reading_gives_streams_in_the_order_asked_for_without_gradients():
    model = shared_model("llama")
    streams = [("state", 2), ("key", 0), ("state", 2)]
    found = read(model, model.encode(TEXTS), streams)
    assert list(found) == [("state", 2), ("key", 0)]
    assert not any(tensor.requires_grad for tensor in found.values())
    assert read(model, model.encode(TEXTS), []) == {}


def test_gradients_flow_through_patches():
    model = shared_model("qwen3")
    batch = model.encode(TEXTS[:1])
    delta = torch.zeros(model.d_model, requires_grad=True)

    def add(x):
        changed = x.clone()
        changed[:, 3] += delta
        return changed

    run(model, batch, {("mlp", 1): add})[0, -1].log_softmax(-1)[7].backward()
    assert delta.grad.abs().sum() > 0
    model.hf.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_a_patch_comes_out_and_leaves_no_hook(family):
    model = shared_model(family)
    batch = model.encode(TEXTS)

    def fails(tensor):
        raise KeyError("mine")

    for action in (
        lambda: run(model, batch, {("state", 0): lambda x: x, ("key", 1): fails}),
        lambda: run(model, batch, {("mlp", 1): fails}),
    ):
        with pytest.raises(KeyError, match="mine"):
            action()
    with pytest.raises(KeyError), hooked(model, {("attention", 0): lambda x: x}):
        raise KeyError


def test_a_patch_of_another_shape_is_refused():
    model = shared_model("gpt2")
    with pytest.raises(ValueError, match=r"patch of \('mlp', 1\) returned shape"):
        run(model, model.encode(TEXTS), {("mlp", 1): lambda x: x[:1]})


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (("hidden", 0), "not a part of a model: choose one of embedding, state"),
        (("mlp", 3), "layers 0 to 2, so there is no layer 3"),
        (("mlp", -1), "no layer -1"),
        (("mlp", 1.5), "no layer 1.5"),
        (("embedding", 1), "belongs to no layer"),
        ("mlp", "not a stream"),
        (("mlp",), "not a stream"),
    ],
)
def test_a_stream_that_is_none_is_refused(stream, message):
    model = shared_model("gpt2")
    with pytest.raises(ConfigError, match=message):
        read(model, model.encode(TEXTS), [("state", 0), stream])
    with pytest.raises(ConfigError, match=message):
        run(model, model.encode(TEXTS), {("state", 0): lambda x: x, stream: lambda x: x})


def test_other_tokenizers_bring_their_own_start_token():
    model = load_pretrained((tiny("llama"), llama_tokenizer()))
    batch = model.encode(["Rome", "Rome is the capital"])
    assert batch.input_ids[:, 0].tolist() == [0, 0]
    assert batch.last.tolist() == (batch.attention_mask.sum(1) - 1).tolist()
    assert batch.attention_mask[0].sum() < batch.attention_mask[1].sum()
