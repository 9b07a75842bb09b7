"""Suffixes of recorded texts in one batch, against one whole forward pass a row with hooks of the test's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig

from errata.base.errors import UnsupportedModel
from errata.models.model import Model
from errata.passes import suffixes, token_batch
from errata.passes.replay import Recording, record
from errata.passes.suffixes import SuffixBatch, Suffixes, collate, slice_recording
from errata.passes.token_batch import Mismatch
from helpers.blocks import cache_in, failing, plainly, with_a_memory, without_cache
from helpers.models import difference, narrow_model
from helpers.softmax import softmax_in_its_own_dtype  # noqa: F401, a fixture
from tiny import ALL_FAMILIES, VERSION, VOCAB, attentions, byte_tokenizer, randomised, short_windows, tiny

LAYERS, FIRST = 4, 1
KINDS = [(family, attention) for family in ALL_FAMILIES for attention in attentions(family)]
# They add to a score by the distance of the key; Falcon as one of its two ways.
ALIBI = {
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=LAYERS, n_head=2),
    "falcon": FalconConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, alibi=True
    ),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=16, n_layers=LAYERS, n_heads=2, max_seq_len=96),
}
KINDS += [(family, "eager") for family in ALIBI if family != "mpt" or VERSION > (5, 0)]  # in float64 it has run since


@functools.cache
def model_of(family: str, attention: str = "eager", dtype: torch.dtype = torch.float64) -> Model:
    if family in ALIBI:
        with torch.random.fork_rng(devices=[]):
            hf = AutoModelForCausalLM.from_config(ALIBI[family], attn_implementation=attention)
        return Model(randomised(hf.to(dtype)), byte_tokenizer(), family)
    return narrow_model(family, attention, dtype, LAYERS)


def bound(family: str, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the largest feature of a token."""
    if family in ("gptj", "mpt"):  # scores are float32 in float64 models too
        return 1e-5
    if dtype == torch.float64:
        return 1e-10
    return 1e-4 if family in ("gemma2", "gemma3") else 1e-5  # norms behind the branches enlarge rounding


# ---- rows of texts that differ in everything, and what whole passes make of them -----------------------


@dataclass(frozen=True)
class Row:
    """Tokens of one text from `token` on, where other states `[n, d_model]` enter block `FIRST`."""

    ids: tuple[int, ...]
    token: int
    states: Tensor

    def whole(self, model: Model) -> list[Tensor]:
        """What enters block `FIRST` and leaves it and those above, each `[n, d_model]`, by a plain pass."""
        blocks = next(m for m in model.hf.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
        seen: list[Tensor] = []

        def enter(module, args, kwargs):
            (state, *others) = args or (kwargs["hidden_states"],)
            changed = torch.cat([state[:, : self.token], self.states[None], state[:, self.token :][:, self.n :]], 1)
            return ((changed, *others), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        def leave(module, args, output):
            state = output[0] if isinstance(output, tuple) else output
            seen.append(state[0, self.token : self.token + self.n])

        handles = [blocks[FIRST].register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [block.register_forward_hook(leave) for block in blocks[FIRST:]]
        try:
            model.hf(torch.tensor([self.ids]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [self.states, *seen]

    @property
    def n(self) -> int:
        return len(self.states)


# Of which text, rows, tokens: whole texts and parts, a single token, an end that is not the text's, a past of none.
TEXTS = (11, 4, 17, 9)
SLICES = ((0, (2, 0), (5, 11)), (0, (1,), (7, 9)), (1, (0,), (0, 4)), (2, (1, 0), (16, 17)), (3, (2, 1), (3, 9)))


def recordings(model: Model, seed: int = 0) -> list[tuple[Tensor, Recording]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCAB, (3, length), generator=generator) for length in TEXTS]
    # The recorded last state is a witness: all blocks can be run in.
    return [(some, record(model, model.batch(some.tolist()), first=FIRST, check=False)) for some in ids]


class Collated:
    """All slices collated, other states for each of their tokens, and the rows as the plain passes take them."""

    def __init__(self, model: Model, layers: tuple[int, int] = (FIRST, LAYERS), seed: int = 0):
        runs, made, self.rows = recordings(model, seed), [], {}
        generator = torch.Generator().manual_seed(seed + 1)
        for text, rows, (token, end) in SLICES:
            ids, recording = runs[text]
            labels = {len(self.rows) + i: row for i, row in enumerate(rows)}
            made.append(slice_recording(recording, labels, (token, end), layers))
            for label, row in labels.items():
                recorded = recording.states[FIRST][row, token:end]
                states = recorded + torch.randn(recorded.shape, generator=generator).to(recorded)
                self.rows[label] = Row(tuple(ids[row].tolist()), token, states)
        self.model, self.slices = model, made
        self.suffixes: Suffixes = collate(model, made)

    def entering(self, batch: SuffixBatch) -> Tensor:
        """The rows' states at the end of what the batch has in front of them."""
        return torch.stack(
            [
                torch.cat([recorded[: -self.rows[label].n], self.rows[label].states])
                for label, recorded in zip(batch.labels, batch.states, strict=True)
            ]
        )

    def found(self, tokens_at_once: int = 1000, wanted: Sequence[int] | None = None) -> dict[int, list[Tensor]]:
        """As `Row.whole`, by label."""
        found = {}
        for batch in self.suffixes.micro_batches(self.rows if wanted is None else wanted, tokens_at_once):
            passed = [self.entering(batch)]
            for layer in range(FIRST, LAYERS):
                passed.append(batch.step(layer, passed[-1]))
            assert batch.counts.tolist() == [self.rows[label].n for label in batch.labels]
            for i, label in enumerate(batch.labels):
                found[label] = [states[i, -self.rows[label].n :] for states in passed]
        return found


def require_same(model: Model, collated: Collated, found: dict[int, list[Tensor]]) -> None:
    most = bound(model.name, model.dtype)
    for label, states in found.items():
        for one, other in zip(states, collated.rows[label].whole(model), strict=True):
            assert difference(one, other) <= most


# ---- states -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_collated_rows_are_what_whole_passes_give(family, attention, dtype):
    model = model_of(family, attention, dtype)
    collated = Collated(model)
    # MPT's blocks count distances on their own, from the last token that they are given.
    assert len(collated.suffixes.batches) == (1 if family != "mpt" else len(SLICES))
    found = collated.found()
    assert list(found) == list(collated.rows)
    require_same(model, collated, found)


@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_with_few_kept_the_last_of_them_are_the_same(family, attention):
    model = model_of(family, attention)
    collated = Collated(model)
    wanted = {label: row.whole(model)[-1] for label, row in collated.rows.items()}
    for batch in collated.suffixes.micro_batches(collated.rows, 1000):
        for keep in (1, 2, 5, 6, 7):
            out = batch.resume(FIRST, collated.entering(batch), LAYERS, keep)
            assert out.shape[1] == min(keep, batch.states.shape[1])
            for i, label in enumerate(batch.labels):
                n = min(keep, collated.rows[label].n)
                assert difference(out[i, -n:], wanted[label][-n:]) <= bound(family, torch.float64)


@torch.no_grad()
def test_where_no_block_is_run_the_last_states_are_kept():
    collated = Collated(model_of("gpt2"), layers=(FIRST, FIRST))
    (batch,) = collated.suffixes.micro_batches(collated.rows, 1000)
    states = collated.entering(batch)
    assert torch.equal(batch.resume(FIRST, states, FIRST, keep=2), states[:, -2:])


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gptj", "bloom"])
@torch.no_grad()
def test_how_many_run_at_once_changes_nothing(family):
    model = model_of(family)
    collated = Collated(model)
    whole, labels = collated.found(), [5, 0, 3]
    for tokens in (1, 13, 30):
        batches = list(collated.suffixes.micro_batches(collated.rows, tokens))
        assert max(len(batch.labels) for batch in batches) == max(1, tokens // 6)
        for label, states in collated.found(tokens).items():
            assert difference(states[-1], whole[label][-1]) <= bound(family, torch.float64)
    some = collated.found(wanted=labels)  # rows that do not stand side by side
    assert sorted(some) == sorted(labels)
    for label, states in some.items():
        assert difference(states[-1], whole[label][-1]) <= bound(family, torch.float64)


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
@torch.no_grad()
def test_windows_of_attention_matter_here(family):
    model = model_of(family)
    collated = Collated(model)
    changes = short_windows(family, LAYERS) | {"sliding_window": 64, "attn_implementation": "eager"}
    wide = Model(tiny(family, LAYERS, torch.float64, **changes), byte_tokenizer(), family)
    row = collated.rows[0]
    assert difference(row.whole(model)[-1], row.whole(wide)[-1]) > 1e-3


# ---- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_gradients_are_those_of_whole_passes(family, attention):
    model = model_of(family, attention)
    collated = Collated(model)
    generator = torch.Generator().manual_seed(2)
    weights, sources = {}, []
    for label, row in collated.rows.items():
        sources.append(row.states.requires_grad_())
        weights[label] = torch.randn(row.states.shape, generator=generator, dtype=row.states.dtype)

    def weighed(states: Tensor, label: int, keep: int) -> Tensor:
        n = min(keep, collated.rows[label].n)
        return (states[-n:] * weights[label][-n:]).sum()

    for tokens_at_once, keep in ((1000, 1000), (13, 1000), (1000, 3), (20, 1)):
        loss = torch.zeros(())
        for batch in collated.suffixes.micro_batches(collated.rows, tokens_at_once):
            out = batch.resume(FIRST, collated.entering(batch), LAYERS, keep)
            loss = loss + sum(weighed(out[i], label, keep) for i, label in enumerate(batch.labels))
        plain = sum(weighed(row.whole(model)[-1], label, keep) for label, row in collated.rows.items())
        found, wanted = torch.autograd.grad(loss, sources), torch.autograd.grad(plain, sources)
        for one, other in zip(found, wanted, strict=True):
            most = 1e-8 if family not in ("gptj", "mpt") else 1e-4  # see `bound`
            assert float(other.abs().max()) > 1e-3
            assert float((one - other).abs().max() / other.abs().max()) <= most


def test_patches_see_the_rows_and_gradients_flow_through_them():
    model = model_of("llama")
    collated = Collated(model)
    (batch,) = collated.suffixes.micro_batches(collated.rows, 1000)
    delta = torch.zeros(len(batch.labels), model.d_model, dtype=torch.float64, requires_grad=True)

    def patch(tensor):
        assert tensor.shape == batch.states.shape
        return torch.cat([tensor[:, :-1], tensor[:, -1:] + delta[:, None]], 1)

    out = batch.step(FIRST, collated.entering(batch), patches={"mlp": patch})
    (gradient,) = torch.autograd.grad(out[:, -1].sum(), delta)
    assert torch.equal(gradient, torch.ones_like(delta))  # what an MLP writes is added to the state


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom"])
@torch.no_grad()
def test_rows_of_as_many_tokens_go_together_once_they_fill_a_batch(family, monkeypatch):
    monkeypatch.setattr(suffixes, "_FULL", 1)
    model = model_of(family)
    collated = Collated(model)
    widths = [
        {row.n for label, row in collated.rows.items() if label in batch.labels} for batch in collated.suffixes.batches
    ]
    assert all(len(each) == 1 for each in widths)
    assert len(widths) == len({row.n for row in collated.rows.values()}) > 1
    found = collated.found()
    assert sorted(found) == sorted(collated.rows)
    require_same(model, collated, found)


# ---- blocks that do not take collated rows, or cannot be resumed -----------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "bloom"])
@torch.no_grad()
def test_rows_that_do_not_go_together_run_one_batch_a_slice(family, monkeypatch):
    model = model_of(family)
    plain = suffixes._mismatch
    wrong = Mismatch(FIRST, "it comes out otherwise")
    monkeypatch.setattr(suffixes, "_mismatch", lambda batch, slices: wrong if len(slices) > 1 else plain(batch, slices))
    collated = Collated(model)
    assert [batch.labels for batch in collated.suffixes.batches] == [(0, 1), (2,), (3,), (4, 5), (6, 7)]
    require_same(model, collated, collated.found())
    require_same(model, collated, collated.found(1))


def altered(forward) -> Model:
    """A llama of which one block runs a function of its own, which verification does not mind."""
    hf = tiny("llama", LAYERS, torch.float64, attn_implementation="eager")
    hf.model.layers[2].forward = MethodType(forward, hf.model.layers[2])
    return Model(hf, byte_tokenizer(), "altered")


def with_a_mask_of_its_own(block, states, attention_mask=None, **kwargs):
    """It knows causality itself, and looks at no mask that says more."""
    past = cache_in(kwargs)
    before = past.get_seq_length(block.self_attn.layer_idx) if past is not None else 0
    length = states.shape[1]
    mask = torch.full((length, before + length), float("-inf"), dtype=states.dtype).triu(before + 1)
    return plainly(block, states, attention_mask=mask[None, None], **kwargs)


@torch.no_grad()
def test_a_block_that_looks_at_no_mask_of_others_gets_one_batch_a_slice():
    model = altered(with_a_mask_of_its_own)
    collated = Collated(model)
    assert len(collated.suffixes.batches) == len(SLICES)
    require_same(model, collated, collated.found())


@pytest.mark.parametrize("forward", [without_cache, failing(RuntimeError), with_a_memory])
@torch.no_grad()
def test_a_model_that_cannot_be_resumed_is_run_on_whole_texts(forward):
    model = altered(forward)
    collated = Collated(model)
    assert len(collated.suffixes.batches) == len(SLICES)
    require_same(model, collated, collated.found())
    require_same(model, collated, collated.found(1))


def test_gradients_of_whole_texts_are_those_of_whole_passes(monkeypatch):
    model = altered(with_a_memory)
    monkeypatch.setitem(globals(), "model_of", lambda family, attention: model)
    test_gradients_are_those_of_whole_passes("altered", "eager")


def test_a_model_that_can_be_resumed_no_longer_is_refused_in_one_sentence():
    model = altered(plainly)
    Collated(model)
    model.blocks[2].forward = MethodType(failing(RuntimeError), model.blocks[2])
    with pytest.raises(UnsupportedModel, match="altered cannot be replayed") as caught:
        Collated(model)
    assert str(caught.value).startswith("model.layers.2: resumed in the middle of a text, it fails with RuntimeError")
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def wrong_in_several_rows(block, states, **kwargs):
    past = cache_in(kwargs)
    resumed = past is not None and past.get_seq_length(block.self_attn.layer_idx) > 0
    return plainly(block, states, **kwargs) * (1.1 if resumed and len(states) > 1 else 1.0)


@pytest.mark.parametrize("rows", [(0,), (0, 1)])
def test_a_slice_alone_is_checked_with_several_rows_if_it_has_them(rows):
    model = altered(plainly)
    Collated(model)  # the model is known to be replayed
    model.blocks[2].forward = MethodType(wrong_in_several_rows, model.blocks[2])
    recording = record(model, model.batch([list(range(9))] * 2), first=FIRST, check=False)
    own = slice_recording(recording, dict(enumerate(rows)), (4, 9), (FIRST, LAYERS))
    if len(rows) == 1:
        assert [batch.labels for batch in collate(model, [own]).batches] == [(0,)]
        return
    with pytest.raises(UnsupportedModel, match=r"^model\.layers\.2: .* it comes out otherwise"):
        collate(model, [own])


def test_memory_that_runs_out_is_no_refusal(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(token_batch, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        Collated(model_of("gpt2"))
