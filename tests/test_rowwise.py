"""A batch with another edit in every row, against full forward passes of models whose weights hold one edit each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.models.generation import generate
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes.rowwise import Factors, RowChanges, can_be_rowwise, row_changes, rowwise
from helpers.softmax import softmax_in_its_own_dtype  # noqa: F401, a fixture
from tiny import ALL_FAMILIES, byte_tokenizer, tiny

LAYERS = 3
TEXTS = (
    "Rome",
    "The Space Needle is located in the city of Seattle.",
    "Where is the Louvre?",
    "He",
    "Steve Jobs was the founder of Apple, and",
)
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-10}


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64, end: int | None = 0) -> Model:
    tokenizer = byte_tokenizer()
    if end is None:
        tokenizer.eos_token = None
    return Model(tiny(family, LAYERS, dtype, eos_token_id=end, bos_token_id=end), tokenizer, family)


def bound(family: str, dtype: torch.dtype) -> float:
    """The largest difference of logits that rounding explains, relative to the largest one."""
    if family == "gptj":  # scores are float32 in float64 models too
        return 1e-5
    return DTYPES[dtype] * (10 if dtype == torch.float32 and family.startswith("gemma") else 1)


# ---- changes, and a model that holds one of them ------------------------------------------------------------


def maps(model: Model, layer: int, kind: str) -> list[str]:
    """Names of weights of a block's linear maps: of its attention, its MLP, or the last of these alone."""
    if kind == "down":
        return [down_weight_name(model, layer)]
    head = f"{model.anatomy.blocks}.{layer}."
    found = [n for n, m in model.hf.named_modules() if n.startswith(head) and isinstance(m, (nn.Linear, Conv1D))]
    inside = [name.removeprefix(head).startswith(f"{model.anatomy.attention}.") for name in found]
    return [f"{name}.weight" for name, own in zip(found, inside, strict=True) if own is (kind == "attention")]


def matrix(model: Model, name: str) -> Tensor:
    """A linear map's weight as `[d_out, d_in]`, a view."""
    weight = model.hf.get_parameter(name)
    return weight.T if isinstance(model.hf.get_submodule(name.removesuffix(".weight")), Conv1D) else weight


def change(model: Model, names: list[str], rank: int, seed: int) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        d_out, d_in = matrix(model, name).shape
        write = torch.randn(d_out, rank, generator=generator, dtype=model.dtype)
        found[name] = write / 4, torch.randn(rank, d_in, generator=generator, dtype=model.dtype) / 4
    return found


def rows_of(model: Model, kind: str) -> list[Mapping[str, Factors]]:
    """One change a row: none, of rank one, of rank three, in two blocks, and one that an earlier row has too."""
    one, three = (change(model, maps(model, layer, kind), rank, rank) for layer, rank in ((1, 1), (0, 3)))
    two = change(model, maps(model, 2, kind), 2, 4) | change(model, maps(model, 1, kind), 1, 5)
    return [{}, one, three, two, one]


@contextlib.contextmanager
def holding(model: Model, factors: Mapping[str, Factors]) -> Iterator[None]:
    """The model with a change added into its weights, by hand."""
    kept = {name: model.hf.get_parameter(name).detach().clone() for name in factors}
    try:
        with torch.no_grad():
            for name, (write, read) in factors.items():
                matrix(model, name).add_(write @ read)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.hf.get_parameter(name).copy_(weight)


@torch.no_grad()
def plain(model: Model, text: str) -> Tensor:
    return model.hf(torch.tensor([model.tokenizer(text)["input_ids"]])).logits[0]


def by_rows(model: Model, texts: tuple[str, ...], changes: RowChanges) -> list[Tensor]:
    batch = model.encode(texts)
    with torch.no_grad(), rowwise(model, changes):
        logits = model.forward(batch)
    return [row[: last + 1] for row, last in zip(logits, batch.last.tolist(), strict=True)]


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---- passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("down", torch.float32), ("down", torch.float64), ("attention", torch.float64), ("mlp", torch.float64)],
)
def test_each_row_is_a_pass_of_the_model_that_holds_its_change(family, kind, dtype):
    model = model_of(family, dtype)
    rows = rows_of(model, kind)
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    found = by_rows(model, TEXTS, row_changes(model, rows))
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
    for row, factors in enumerate(rows):
        with holding(model, factors):
            wanted = plain(model, TEXTS[row])
        assert difference(found[row], wanted) < bound(family, dtype)
        if factors:
            assert difference(plain(model, TEXTS[row]), wanted) > 1e-3


def test_the_maps_are_those_that_a_family_has():
    """What is changed above: one map for queries, keys and values, or three; a gate, or none."""
    inside = {"attention": {}, "mlp": {}}
    for kind, found in inside.items():
        for family in ALL_FAMILIES:
            found[family] = [name.split(".")[-2] for name in maps(model_of(family), 1, kind)]
    assert inside["attention"]["gpt2"] == ["c_attn", "c_proj"]
    assert inside["attention"]["phi3"] == ["o_proj", "qkv_proj"]
    assert inside["attention"]["llama"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert inside["mlp"]["llama"] == ["gate_proj", "up_proj", "down_proj"]
    assert inside["mlp"]["opt"] == ["fc1", "fc2"]
    assert all(2 <= len(names) <= 4 for found in inside.values() for names in found.values())


def test_rows_that_a_block_flattens_are_told_apart():
    """OPT hands `[rows * tokens, d]` to its MLP."""
    model, seen = model_of("opt"), []
    down = model.hf.get_submodule(down_weight_name(model, 1).removesuffix(".weight"))
    handle = down.register_forward_hook(lambda module, args, output: seen.append(args[0].dim()))
    try:
        by_rows(model, TEXTS, row_changes(model, rows_of(model, "down")))
    finally:
        handle.remove()
    assert seen == [2]


# ---- generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_texts_that_are_written_together_are_those_of_each_model_alone(family):
    """With a cache and padding on the left, against a loop of whole passes without either."""
    model = model_of(family, torch.float32, end=None)
    chosen = [0, 2, 4]  # of lengths that differ
    rows = [rows_of(model, "mlp")[i] for i in (1, 2, 3)]
    prompts, changes = [TEXTS[i] for i in chosen], row_changes(model, rows)

    def around(batch):
        return rowwise(model, changes.of(torch.tensor(batch)))

    found = generate(model, prompts, 6, greedy=True, around=around)
    for prompt, factors, text in zip(prompts, rows, found, strict=True):
        ids = list(model.tokenizer(prompt)["input_ids"])
        with holding(model, factors):
            for _ in range(6):
                with torch.no_grad():
                    ids.append(int(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert text == model.tokenizer.decode(ids, skip_special_tokens=True)
    assert any(one != other for one, other in zip(found, generate(model, prompts, 6, greedy=True), strict=True))


# ---- changes by rows ----------------------------------------------------------------------------------------


def test_some_rows_in_any_order():
    model = model_of("gpt2")
    changes = row_changes(model, rows_of(model, "down"))
    whole = by_rows(model, TEXTS, changes)
    order = [3, 1, 3]
    found = by_rows(model, tuple(TEXTS[i] for i in order), changes.of(torch.tensor(order)))
    for row, i in zip(found, order, strict=True):
        assert difference(row, whole[i]) < 1e-12
    for row, i in zip(by_rows(model, TEXTS[2:4], changes.of(slice(2, 4))), (2, 3), strict=True):
        assert difference(row, whole[i]) < 1e-12


def test_each_token_with_a_change_of_its_own():
    """Of some changes, as many tokens as may be, none too, and in any order."""
    model = model_of("llama")
    name = down_weight_name(model, 1)
    each = [change(model, [name], rank, rank) for rank in (1, 3, 2)] + [{}]
    changes = row_changes(model, each).of(torch.tensor([[0, 3, 1, 1], [1, 0, 1, 3]]))
    entering = torch.randn(2, 4, model.d_mlp, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = changes.adder(name)(entering)
    for row, owners in enumerate(changes.rows.tolist()):
        for token, owner in enumerate(owners):
            write, read = each[owner].get(name, (torch.zeros(model.d_model, 1), torch.zeros(1, model.d_mlp)))
            wanted = write.double() @ (read.double() @ entering[row, token])
            torch.testing.assert_close(found[row, token], wanted)
    assert torch.equal(changes.adder(name)(entering.flatten(0, 1)), found.flatten(0, 1))
    nobodys = RowChanges(changes.factors, torch.tensor([-1, -1]))
    assert torch.equal(nobodys.adder(name)(entering), torch.zeros(2, 4, model.d_model, dtype=torch.float64))


def test_a_change_that_is_no_number_leaves_other_rows_alone():
    model = model_of("llama")
    name = down_weight_name(model, 1)
    broken, fine = (change(model, [name], 1, seed) for seed in (0, 1))
    broken[name][0].fill_(torch.inf)
    found = by_rows(model, TEXTS[:3], row_changes(model, [broken, fine, broken]))
    assert not found[0].isfinite().all()
    assert torch.equal(found[1], by_rows(model, TEXTS[:3], row_changes(model, [{}, fine, {}]))[1])


def test_rows_that_share_a_change_share_its_memory():
    model = model_of("llama")
    name = down_weight_name(model, 1)
    one, other = (change(model, [name], 1, seed) for seed in (0, 1))
    changes = row_changes(model, [one, other, one, one]).of(torch.tensor([3, 1, 0]))
    assert changes.factors[name][0].shape[0] == 2
    assert changes.rows.tolist() == [0, 1, 0]


def test_what_is_within_a_block():
    model = model_of("llama")
    changes = row_changes(model, rows_of(model, "attention"))
    assert set(changes.factors) == {name for layer in range(LAYERS) for name in maps(model, layer, "attention")}
    assert set(changes.within("model.layers.1.").factors) == set(maps(model, 1, "attention"))
    assert changes.within("model.layers.7.").factors == {}


def test_rows_of_lower_rank_are_filled_with_zeros():
    model = model_of("llama")
    name = down_weight_name(model, 1)
    one, three = (change(model, [name], rank, rank) for rank in (1, 3))
    changes = row_changes(model, [one, {}, three])
    write, read = changes.factors[name]
    assert write.shape == (2, *one[name][0].shape[:1], 3)
    assert read.shape == (2, 3, *one[name][1].shape[1:])
    torch.testing.assert_close(write[0] @ read[0], one[name][0] @ one[name][1])
    torch.testing.assert_close(write[1] @ read[1], three[name][0] @ three[name][1])
    assert changes.rows.tolist() == [0, -1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_is_rounded_once(dtype):
    model = model_of("llama", dtype)
    name = down_weight_name(model, 1)
    factors = {name: tuple(part.float() for part in change(model_of("llama"), [name], 2, 0)[name])}
    changes = row_changes(model, [factors, {}])
    assert {part.dtype for part in changes.factors[name]} == {torch.float32}
    module = model.hf.get_submodule(name.removesuffix(".weight"))
    entering = torch.randn(2, 5, model.d_mlp, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        without = module(entering)
        with rowwise(model, changes):
            found = module(entering)
    write, read = factors[name]
    exact = without[0].double() + entering[0].double() @ read.double().T @ write.double().T
    assert found.dtype == dtype
    assert torch.equal(found[1], without[1])
    assert (found[0].double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2
    assert not torch.equal(found[0], without[0])


def test_nothing_is_left_on_the_model():
    model = model_of("gpt2")
    wanted = plain(model, TEXTS[0])
    with pytest.raises(KeyboardInterrupt), rowwise(model, row_changes(model, rows_of(model, "mlp"))):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.hf.modules())
    assert torch.equal(plain(model, TEXTS[0]), wanted)


# ---- which weights can be changed so ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_linear_maps_of_blocks_can_and_nothing_else(family):
    model = model_of(family)
    linear = {name for layer in range(LAYERS) for kind in ("attention", "mlp") for name in maps(model, layer, kind)}
    names = [name for name, _ in model.hf.named_parameters() if name.startswith(f"{model.anatomy.blocks}.")]
    assert {name for name in names if can_be_rowwise(model, name)} == linear
    assert len(names) > len(linear)  # norms, biases
    embedding = f"{model.anatomy.embedding}.weight"
    assert not can_be_rowwise(model, embedding)


def test_a_head_of_its_own_can_and_one_tied_to_the_embedding_cannot():
    for tied in (True, False):
        hf = tiny("llama", tie_word_embeddings=tied)
        model = Model(hf, byte_tokenizer(), "llama")
        assert (hf.lm_head.weight is hf.model.embed_tokens.weight) is tied
        assert can_be_rowwise(model, "lm_head.weight") is not tied
        assert not can_be_rowwise(model, "model.embed_tokens.weight")


def test_a_weight_of_two_maps_cannot():
    hf = tiny("llama")
    hf.model.layers[1].mlp.down_proj.weight = hf.model.layers[2].mlp.down_proj.weight
    model = Model(hf, byte_tokenizer(), "llama")
    assert not can_be_rowwise(model, "model.layers.1.mlp.down_proj.weight")
    assert not can_be_rowwise(model, "model.layers.2.mlp.down_proj.weight")
    assert can_be_rowwise(model, "model.layers.0.mlp.down_proj.weight")
