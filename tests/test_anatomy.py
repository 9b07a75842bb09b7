"""Where a decoder's parts are: found in every family, and refused by name where something does not fit."""

from __future__ import annotations

import dataclasses
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Model,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from errata.base.errors import ConfigError, EditMismatch, UnsupportedModel
from errata.models.anatomy import Anatomy, find_anatomy, verify
from errata.models.model import Model
from errata.models.modules import linear_matrix
from errata.models.weights import add_, down_weight_name, matrix
from tiny import FAMILIES, VERSION, byte_tokenizer, config_of, randomised, tiny

GATED = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
LLAMA_LIKE = Anatomy(
    embedding="model.embed_tokens",
    blocks="model.layers",
    attention="self_attn",
    mlp="mlp",
    down="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
    parallel=False,
)
POST_NORMED = dataclasses.replace(
    LLAMA_LIKE, attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"
)
GPT2_LIKE = Anatomy(
    embedding="transformer.wte",
    blocks="transformer.h",
    attention="attn",
    mlp="mlp",
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head",
    parallel=False,
)
WANTED = {
    "gpt2": GPT2_LIKE,
    "gptj": dataclasses.replace(GPT2_LIKE, down="mlp.fc_out", parallel=True),
    "gpt_neox": Anatomy(
        embedding="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        attention="attention",
        mlp="mlp",
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head" if VERSION > (5, 0) else "embed_out",
        parallel=True,
    ),
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "gemma2": dataclasses.replace(POST_NORMED, softcap=3.0),
    "gemma3": POST_NORMED,
    "olmo2": POST_NORMED,
    "opt": Anatomy(
        embedding="model.decoder.embed_tokens",
        blocks="model.decoder.layers",
        attention="self_attn",
        mlp="fc2",
        down="fc2",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        parallel=False,
    ),
}


def refusal(hf) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(UnsupportedModel) as caught:
        Model(hf, byte_tokenizer())
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WANTED)
def test_anatomy_of_every_family_is_found_and_verified(family):
    hf = tiny(family)
    anatomy = find_anatomy(hf)
    assert anatomy == WANTED[family]
    verify(hf, anatomy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_does_not_depend_on_the_dtype(family, dtype):
    hf = tiny(family, dtype=dtype)
    anatomy = find_anatomy(hf)
    assert anatomy == WANTED[family]
    verify(hf, anatomy)


def test_gpt_neox_can_be_serial():
    assert not find_anatomy(tiny("gpt_neox", use_parallel_residual=False)).parallel


def test_one_block_is_enough():
    assert find_anatomy(tiny("gpt2", layers=1)) == GPT2_LIKE


def test_scaled_residuals_and_logits_are_measured():
    granite = GraniteForCausalLM(GraniteConfig(**GATED, residual_multiplier=0.22, logits_scaling=4.0))
    anatomy = Model(randomised(granite), byte_tokenizer()).anatomy
    assert anatomy.residual_scale == pytest.approx(0.22, rel=1e-6)
    assert anatomy.logit_scale == pytest.approx(0.25, rel=1e-6)
    cohere = CohereForCausalLM(CohereConfig(**GATED, logit_scale=0.3))
    anatomy = Model(randomised(cohere), byte_tokenizer()).anatomy
    assert anatomy.parallel
    assert anatomy.logit_scale == pytest.approx(0.3, rel=1e-6)


def test_modules_that_add_the_residual_themselves_are_looked_into():
    bloom = randomised(BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=2, n_head=2)))
    anatomy = Model(bloom, byte_tokenizer()).anatomy
    assert (anatomy.attention, anatomy.mlp) == ("self_attention.dense", "mlp.dense_4h_to_h")


def test_names_of_classes_and_modules_play_no_part():
    hf = tiny("llama")
    hf.config.model_type = "unheard-of"
    hf.__class__ = type("Strange", (type(hf),), {})
    for block in hf.model.layers:
        block.add_module("thing", block.mlp)
        block.mlp.add_module("bottom", block.mlp.down_proj)
        del block._modules["mlp"]
        del block.thing._modules["down_proj"]
        block.forward = MethodType(_renamed_block, block)
        block.thing.forward = MethodType(_renamed_mlp, block.thing)
    anatomy = find_anatomy(hf)
    verify(hf, anatomy)
    assert (anatomy.mlp, anatomy.down) == ("thing", "thing.bottom")


def _renamed_block(block, hidden_states, **kwargs):
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
    middle = hidden_states + attended
    return middle + block.thing(block.post_attention_layernorm(middle))


def _renamed_mlp(mlp, x):
    return mlp.bottom(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def test_measuring_leaves_the_model_as_it_was():
    hf = tiny("gpt2").train()
    hf.transformer.h[1].eval()
    before = {name: module.training for name, module in hf.named_modules()}
    state = torch.random.get_rng_state()
    verify(hf, find_anatomy(hf))
    assert {name: module.training for name, module in hf.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert all(parameter.grad is None for parameter in hf.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- refused ------------------------------------------------------------------------------------------


def test_an_encoder_is_refused():
    bert = BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    message = refusal(randomised(BertForMaskedLM(bert)))
    assert "bert.encoder.layer" in message
    assert "a later token changes the logits before it" in message


def test_an_encoder_with_a_decoder_is_refused():
    t5 = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    message = refusal(T5ForConditionalGeneration(t5).eval())
    assert message.startswith("encoder: T5ForConditionalGeneration")


def test_a_mixture_of_experts_is_refused():
    mixtral = MixtralForCausalLM(MixtralConfig(**GATED, num_local_experts=4))
    message = refusal(randomised(mixtral))
    assert message.startswith("model.layers.0.mlp: ")
    assert "mixture of experts" in message


def test_a_model_without_a_head_is_refused():
    assert "no head" in refusal(GPT2Model(config_of("gpt2")).eval())


def test_something_else_than_a_model_is_refused():
    assert "not a Hugging Face model" in refusal(nn.Linear(2, 2))


def test_blocks_of_different_classes_may_do_the_same():
    hf = tiny("gpt2")
    wanted = find_anatomy(hf)
    hf.transformer.h[1].__class__ = type("OtherBlock", (type(hf.transformer.h[1]),), {})
    assert find_anatomy(hf) == wanted


def test_blocks_may_differ_in_their_attention_alone():
    hf = tiny("lfm2", layers=4)
    found = find_anatomy(hf)
    assert found.mixers == ("conv", "self_attn", "conv", "self_attn")
    assert [found.attention_of(layer) for layer in range(4)] == list(found.mixers)
    verify(hf, found)
    block = hf.model.layers[1]
    block.other = block.feed_forward
    del block.feed_forward
    block.forward = MethodType(lambda block, states, **kwargs: forward_of_lfm2(block, states, **kwargs), block)
    assert "its mlp is 'other', that of model.layers.0 is 'feed_forward'" in refusal(hf)


def forward_of_lfm2(block, states, **kwargs):
    attention, _ = block.self_attn(block.operator_norm(states), **kwargs)
    states = states + attention
    return states + block.other(block.ffn_norm(states))


class Noisy(nn.Module):
    """An MLP and something more."""

    def __init__(self, mlp, more):
        super().__init__()
        self.inner, self.more = mlp, more

    def forward(self, x):
        out = self.inner(x)
        return out + self.more(out)


def test_an_mlp_with_noise_is_refused():
    hf = tiny("gpt2")
    for block in hf.transformer.h:
        block.mlp = Noisy(block.mlp, lambda out: 0.01 * torch.randn_like(out))
    message = refusal(hf)
    assert message.startswith("transformer.h.0.mlp: ")
    assert "another output for the same input" in message


def test_an_mlp_that_adds_to_its_down_projection_is_refused():
    hf = tiny("gpt2")
    for block in hf.transformer.h:
        block.mlp = Noisy(block.mlp, lambda out: 0.01 * out.sin())
    message = refusal(hf)
    assert message.startswith("transformer.h.0.mlp: ")
    assert "mlp.inner.c_proj" in message


def test_one_odd_layer_is_refused_by_its_name():
    hf = tiny("llama")
    hf.model.layers[2].mlp.forward = MethodType(lambda mlp, x: 1.1 * type(mlp).forward(mlp, x), hf.model.layers[2].mlp)
    assert refusal(hf).startswith("model.layers.2.mlp: its output is not what its down-projection")


def test_a_layer_with_other_modules_is_refused_by_its_name():
    hf = tiny("llama")
    mlp = hf.model.layers[1].mlp
    mlp.other = mlp.down_proj
    del mlp.down_proj
    mlp.forward = MethodType(lambda m, x: m.other(m.act_fn(m.gate_proj(x)) * m.up_proj(x)), mlp)
    assert refusal(hf).startswith("model.layers.1.mlp.down_proj: there is no such module")


def test_a_residual_that_does_not_add_up_is_refused():
    hf = tiny("llama")
    block = hf.model.layers[1]
    block.forward = MethodType(lambda b, x, **kw: type(b).forward(b, x, **kw) * 1.001, block)
    assert refusal(hf).startswith("model.layers.1: its output is not its input plus")


def test_a_down_projection_that_is_not_its_weight_is_refused():
    hf = tiny("llama")
    down = hf.model.layers[2].mlp.down_proj
    adapter = torch.randn(16, 24) * 0.1
    down.forward = MethodType(lambda m, x: nn.functional.linear(x, m.weight + adapter), down)
    assert refusal(hf).startswith("model.layers.2.mlp.down_proj: its weight times its input")


def test_logits_that_are_not_the_heads_are_refused():
    hf = tiny("gpt2")
    forward = hf.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    hf.forward = other
    assert refusal(hf).startswith("lm_head: the logits are not its output")


def test_broken_weights_are_refused():
    hf = tiny("gpt2")
    with torch.no_grad():
        hf.transformer.h[0].ln_1.weight[0] = float("nan")
    assert "not finite" in refusal(hf)


def test_a_forward_pass_that_fails_is_refused_in_one_line():
    hf = tiny("gpt2")

    def fails(*args, **kwargs):
        raise RuntimeError("several\nlines")

    hf.transformer.h[1].forward = fails
    assert "RuntimeError: several lines" in refusal(hf)
    assert not any(module._forward_hooks for module in hf.modules())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"down": "mlp.c_fc"}, "transformer.h.0.mlp"),
        ({"mlp": "attn"}, "transformer.h.0.attn"),
        ({"attention": "ln_1"}, "transformer.h.0"),
        ({"final_norm": "transformer.drop"}, "lm_head"),
        ({"attention": "nothing"}, "transformer.h.0.nothing"),
        ({"residual_scale": 0.5}, "transformer.h.0"),
        ({"softcap": 5.0}, "lm_head"),
    ],
)
def test_verify_measures_what_anatomy_claims(change, named):
    with pytest.raises(UnsupportedModel, match=f"^{named}: "):
        verify(tiny("gpt2"), dataclasses.replace(GPT2_LIKE, **change))


# ---- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_down_weights_are_seen_as_out_by_in(family):
    model = Model(tiny(family), byte_tokenizer())
    name = down_weight_name(model, 1)
    weight = matrix(model, name)
    assert weight.shape == (model.d_model, model.d_mlp)
    down = model.module(("key", 1))
    key = torch.randn(model.d_mlp)
    assert torch.allclose(down(key[None])[0] - down(0 * key[None])[0], weight @ key, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_to_a_weight_changes_what_the_module_writes(family):
    model = Model(tiny(family), byte_tokenizer())
    down, key = model.module(("key", 2)), torch.randn(model.d_mlp)
    before = down(key[None])[0]
    delta = torch.outer(torch.randn(model.d_model), torch.randn(model.d_mlp))
    add_(model, down_weight_name(model, 2), delta)
    assert torch.allclose(down(key[None])[0] - before, delta @ key, atol=1e-4)


def test_a_square_weight_is_turned_the_way_its_module_uses_it():
    conv, linear = Conv1D(8, 8), nn.Linear(8, 8)
    for module in (conv, linear):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias, std=1000.0)  # larger than what the weight does
        x = torch.randn(8)
        view = linear_matrix(module)
        assert torch.allclose(view @ x, module(x[None])[0] - module.bias, atol=1e-2)
        assert view.data_ptr() == module.weight.data_ptr()
    square = Model(tiny("gpt2", n_inner=16), byte_tokenizer())
    name = down_weight_name(square, 0)
    assert torch.equal(matrix(square, name), square.weight(name).T)


def test_only_linear_maps_have_a_matrix():
    assert linear_matrix(nn.Embedding(8, 8)) is None
    assert linear_matrix(nn.LayerNorm(8)) is None
    model = Model(tiny("gpt2"), byte_tokenizer())
    with pytest.raises(UnsupportedModel, match="not the weight of a linear map"):
        matrix(model, "transformer.wte.weight")
    with pytest.raises(ConfigError, match="no weight named"):
        matrix(model, "transformer.h.9.mlp.c_proj.weight")
    with pytest.raises(EditMismatch, match="the change is"):
        add_(model, down_weight_name(model, 0), torch.zeros(24, 16))


def test_a_small_change_to_a_half_precision_weight_is_rounded_once():
    model = Model(tiny("llama", dtype=torch.bfloat16), byte_tokenizer())
    name = down_weight_name(model, 0)
    before = matrix(model, name).detach().clone()
    delta = torch.full(before.shape, 0.004, dtype=torch.float64)
    add_(model, name, delta)
    assert torch.equal(matrix(model, name), (before.double() + delta).bfloat16())
