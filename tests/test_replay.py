"""Recorded runs resumed at any block and token, against one plain forward pass with hooks of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MethodType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.base.errors import UnsupportedModel
from errata.models.model import Model
from errata.passes.hooks import Patch
from errata.passes.replay import Recording, RowPatch, record
from helpers.blocks import cache_in, failing, plainly, with_a_memory, without_cache
from helpers.budget import examples
from helpers.models import difference, hooks_of, narrow_model
from plain_trace import Stream, plain_run
from tiny import ALL_FAMILIES, VOCAB, attentions, byte_tokenizer, short_windows, tiny

KINDS = [(family, attention) for family in ALL_FAMILIES for attention in attentions(family)]
PATCHED = ("mlp", "attention", "value", "key")
LENGTH = 11


def bound(family: str, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the largest feature of a token."""
    if family == "gptj":
        # Its attention computes scores in float32 whatever the model's dtype, and products of other shapes are summed
        # in another order: up to 6e-7.
        return 1e-5
    if dtype == torch.float64:
        return 1e-10
    # Norms behind attention and MLP enlarge rounding, here up to 2e-5. A whole pass in float32 is further than that
    # from one in float64, up to 5e-5; in other families up to 8e-6, and resumed rows are within 3e-6 of whole passes.
    return 1e-4 if family in ("gemma2", "gemma3") else 1e-5


def resume(
    recording: Recording,
    layer: int,
    states: Tensor,
    token: int,
    rows: Tensor,
    patches: Mapping[Stream, RowPatch] | None = None,
    keep: int | None = None,
) -> Tensor:
    """The last block's states if `states` enter block `layer`, step by step."""
    last = recording.model.n_layers - 1
    for index in range(layer, last + 1):
        here = {part: patch for (part, its_layer), patch in (patches or {}).items() if its_layer == index}
        states = recording.step(index, states, token, rows, here, keep if index == last else None)
    return states


class Replayed:
    """Random rows resumed from a random recording, and the same rows run whole.

    Three texts are recorded, with noise on two tokens of the second and third. Each resumed row varies one of them:
    other states enter a block from a token on, and at that token each patched stream goes through a function.
    """

    def __init__(
        self,
        model: Model,
        length: int = LENGTH,
        layer: int = 0,
        token: int = 0,
        rows: Sequence[int] = (2, 0, 1, 2),
        patched: Sequence[Stream] = (),
        tokens_at_once: int | None = None,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.layer, self.token, self.rows = model, layer, token, torch.tensor(rows)
        self.ids = torch.randint(VOCAB, (3, length), generator=generator)
        self.noise = torch.zeros(3, length, embedding_width(model))
        self.noise[1:, :2] = torch.randn(self.noise[1:, :2].shape, generator=generator)
        self.recording = record(
            model,
            model.batch(self.ids.tolist()),
            {("embedding", 0): lambda tensor: tensor + self.noise.to(tensor)},
            tokens_at_once=tokens_at_once,
        )
        recorded = self.recording.states[layer][self.rows, token:]
        self.states = recorded + torch.randn(recorded.shape, generator=generator).to(recorded)
        self.deltas = {}
        for stream in patched:
            width = model.d_mlp if stream[0] == "key" else model.d_model
            self.deltas[stream] = torch.randn(len(rows), width, generator=generator).to(recorded)

    def resumed(self, keep: int | None = None, patched: bool = True) -> Tensor:
        patches = {stream: functools.partial(self._changed, delta) for stream, delta in self.deltas.items()}
        return resume(self.recording, self.layer, self.states, self.token, self.rows, patches if patched else {}, keep)

    @staticmethod
    def _changed(delta: Tensor, tensor: Tensor, chosen: slice, at: int = 0) -> Tensor:
        tensor = tensor.clone()
        tensor[:, at] = tensor[:, at].tanh() + delta[chosen]
        return tensor

    def plain(self) -> tuple[Tensor, Tensor]:
        """The last states `[r, n, d]` from the token on, and logits at the last one `[r, v]`, of whole passes."""
        last: list[Tensor] = []

        def enter(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, : self.token], self.states], 1)

        def patch(delta: Tensor) -> Patch:
            return lambda tensor: self._changed(delta, tensor, slice(None), self.token)

        changes: Mapping[Stream, Patch] = {
            ("embedding", 0): lambda tensor: tensor + self.noise[self.rows].to(tensor),
            ("entering", self.layer): enter,
            **{stream: patch(delta) for stream, delta in self.deltas.items()},
            ("state", self.model.n_layers - 1): last.append,
        }
        logits = plain_run(self.model.hf, self.model.name, self.ids[self.rows], changes)
        return last[0][:, self.token :], logits[:, -1]


def embedding_width(model: Model) -> int:
    return model.hf.get_input_embeddings().weight.shape[1]


# ---- against plain passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_resumed_rows_are_what_whole_passes_give(family, attention, dtype):
    model = narrow_model(family, attention, dtype, layers=3)
    for layer, token in ((0, 0), (1, 5), (2, LENGTH - 1), (0, 7)):
        patched = [(part, one) for part in PATCHED for one in range(layer, 3)]
        run = Replayed(model, layer=layer, token=token, patched=patched, seed=10 * layer + token)
        found, (wanted, logits) = run.resumed(), run.plain()
        assert difference(found, wanted) <= bound(family, dtype)
        assert difference(model.unembed(found)[:, -1], logits) <= bound(family, dtype)
        assert difference(run.resumed(patched=False), wanted) > 1e-3
        assert difference(run.recording.states[3][run.rows, token:], wanted) > 1e-3


@pytest.mark.parametrize(("family", "attention"), KINDS)
@pytest.mark.parametrize("part", PATCHED)
@torch.no_grad()
def test_each_stream_is_patched_in_its_own_place(family, attention, part):
    run = Replayed(narrow_model(family, attention, layers=3), layer=1, token=4, patched=[(part, 1)])
    wanted, _ = run.plain()
    assert difference(run.resumed(), wanted) <= bound(family, torch.float64)
    assert difference(run.resumed(patched=False), wanted) > 1e-3


@st.composite
def replayed(draw) -> tuple[Replayed, int]:
    family, attention = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    layers, length = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    layer, token = draw(st.integers(0, layers - 1)), draw(st.integers(0, length - 1))
    keep = draw(st.integers(1, length - token))
    # Where not all tokens are kept, patches of the last block do not see the first one.
    last = layers if keep == length - token else layers - 1
    streams = [(part, one) for part in PATCHED for one in range(layer, last)]
    run = Replayed(
        narrow_model(family, attention, dtype, layers),
        length,
        layer,
        token,
        rows=draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)),
        patched=draw(st.lists(st.sampled_from(streams), unique=True, max_size=3)) if streams else (),
        tokens_at_once=draw(st.sampled_from([None, 1, 7, 40])),
        seed=draw(st.integers(0, 99)),
    )
    return run, keep


@settings(max_examples=examples(100), deadline=None)
@given(replayed())
@torch.no_grad()
def test_any_block_token_and_number_of_rows(drawn):
    run, keep = drawn
    wanted, logits = run.plain()
    found = run.resumed(keep)
    most = bound(run.model.name, found.dtype)
    assert difference(found, wanted[:, -keep:]) <= most
    assert difference(run.model.unembed(found)[:, -1], logits) <= most
    assert difference(run.resumed(), wanted) <= most


@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_a_step_that_keeps_few_gives_the_last_of_them(family, attention):
    run = Replayed(narrow_model(family, attention, layers=3), layer=1, token=3)
    arguments = (1, run.states, 3, run.rows)
    whole = run.recording.step(*arguments)
    for keep in range(1, whole.shape[1] + 1):
        assert difference(run.recording.step(*arguments, keep=keep), whole[:, -keep:]) <= bound(family, torch.float64)


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
@torch.no_grad()
def test_windows_of_attention_are_shorter_than_these_texts(family):
    """Otherwise nothing here would tell whether a replay minds them."""
    narrow = narrow_model(family, layers=3)
    changes = short_windows(family, 3) | {"sliding_window": 64, "attn_implementation": "eager"}
    wide = tiny(family, 3, torch.float64, **changes)
    ids = torch.arange(LENGTH)[None]
    assert difference(narrow.hf(ids).logits[:, :4], wide(ids).logits[:, :4]) < 1e-10
    assert difference(narrow.hf(ids).logits[:, 4:], wide(ids).logits[:, 4:]) > 1e-3


@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_a_recording_holds_the_run(family, attention):
    model = narrow_model(family, attention, layers=3)
    ids = torch.arange(3 * LENGTH).reshape(3, LENGTH)
    parts = [(part, layer) for part in ("mlp", "attention", "key", "value") for layer in range(3)]
    recording = record(model, model.batch(ids.tolist()), keep=parts)
    seen: dict[Stream, Tensor] = {}
    streams = [*parts, *((part, layer) for part in ("entering", "state") for layer in range(3))]
    keepers = {stream: lambda tensor, stream=stream: seen.update({stream: tensor.clone()}) for stream in streams}
    plain_run(model.hf, family, ids, keepers)
    assert recording.length == LENGTH
    for stream in parts:
        assert difference(recording.kept[stream], seen[stream]) <= bound(family, torch.float64)
    for layer in range(3):
        assert difference(recording.states[layer], seen["entering", layer]) <= bound(family, torch.float64)
        assert difference(recording.states[layer + 1], seen["state", layer]) <= bound(family, torch.float64)


# ---- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_gradients_are_those_of_whole_passes(family, attention):
    model = narrow_model(family, attention, layers=3)
    # From here on each token is seen by the last one, through the shortest windows too.
    run = Replayed(model, layer=1, token=LENGTH - 3, rows=(1, 0, 1), patched=[("mlp", 1), ("attention", 1)])
    sources = [run.states.requires_grad_(), *(delta.requires_grad_() for delta in run.deltas.values())]
    _, logits = run.plain()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    wanted = torch.autograd.grad((logits * weights).sum(), sources)
    for keep, tokens_at_once in ((None, None), (1, None), (None, 1), (2, 1)):
        run.recording.tokens_at_once = tokens_at_once or 512
        logits = model.unembed(run.resumed(keep))[:, -1]
        found = torch.autograd.grad((logits * weights).sum(), sources)
        for one, other in zip(found, wanted, strict=True):
            assert float(other.abs().max()) > 1e-3
            most = 1e-8 if family != "gptj" else 1e-4  # see `bound`
            assert float((one - other).abs().max() / other.abs().max()) <= most


def test_a_recording_asks_for_no_gradients():
    model = narrow_model("llama", layers=3)
    recording = record(model, model.batch([list(range(5))]), keep=[("mlp", 0)])
    assert not any(states.requires_grad for states in (*recording.states.values(), *recording.kept.values()))


# ---- what a recording leaves alone, and what it minds --------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "gemma3"])
def test_no_hook_stays_behind(family):
    model = narrow_model(family, layers=3)
    run = Replayed(model, layer=0, token=2)
    before = hooks_of(model)

    def fails(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.recording.step(0, run.states, 2, run.rows, {"mlp": fails, "attention": lambda tensor, rows: tensor})
    with pytest.raises(ZeroDivisionError):
        resume(run.recording, 0, run.states, 2, run.rows, {("key", 1): fails})
    with pytest.raises(ZeroDivisionError):
        record(model, model.batch([[1, 2, 3]]), {("mlp", 1): fails})
    with pytest.raises(ValueError, match="returned shape"):
        run.recording.step(0, run.states, 2, run.rows, {"mlp": lambda tensor, rows: tensor[:, :1]})
    run.resumed(keep=1)
    assert hooks_of(model) == before


@torch.no_grad()
def test_a_recording_minds_nothing_that_is_done_to_other_tensors():
    model = narrow_model("llama", layers=3)
    run = Replayed(model, layer=1, token=3)
    states, wanted = run.states.clone(), run.resumed()
    batch = model.batch(run.ids.tolist())
    noise = run.noise.to(wanted)
    given = []

    def disturb(tensor: Tensor) -> Tensor:
        given.append(tensor + noise)
        return given[0]

    recording = record(model, batch, {("embedding", 0): disturb}, keep=[("mlp", 1)])
    kept = recording.kept["mlp", 1].clone()
    for tensor in (batch.input_ids, batch.attention_mask, given[0]):
        tensor.zero_()
    model.hf(torch.arange(90)[None])
    found = resume(recording, 1, states, 3, run.rows)
    assert torch.equal(found, wanted)
    found.zero_()
    recording.step(1, states, 3, run.rows, {"mlp": lambda tensor, rows: tensor.zero_()})
    assert torch.equal(states, run.states)
    assert torch.equal(recording.kept["mlp", 1], kept)
    assert torch.equal(resume(recording, 1, states, 3, run.rows), wanted)


@torch.no_grad()
def test_blocks_that_add_in_place_spoil_nothing():
    run = Replayed(altered(adding_in_place, range(3)), layer=1, token=LENGTH // 2, rows=(0, 0, 2))
    usual = Replayed(narrow_model("llama", layers=3), layer=1, token=LENGTH // 2, rows=(0, 0, 2))
    for states, wanted in zip(run.recording.states.values(), usual.recording.states.values(), strict=True):
        assert difference(states, wanted) <= 1e-10
    wanted, entering = usual.resumed(), run.states.clone()
    assert difference(run.resumed(), wanted) <= 1e-10
    assert torch.equal(run.states, entering)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_texts_of_different_lengths_are_refused(family):
    model = narrow_model(family, layers=3)
    with pytest.raises(ValueError, match="one length"):
        record(model, model.batch([[1, 2, 3], [4, 5]]))


# ---- blocks that cannot be resumed --------------------------------------------------------------------


def altered(forward, layers: Sequence[int] = (1,)) -> Model:
    """A llama in which some blocks run a function of their own, which verification does not mind."""
    hf = tiny("llama", 3, torch.float64, attn_implementation="eager")
    for layer in layers:
        block = hf.model.layers[layer]
        block.forward = MethodType(forward, block)
    return Model(hf, byte_tokenizer(), "altered")


def adding_in_place(block, states, **kwargs):
    return states.add_(plainly(block, states, **kwargs) - states)


def without_it(kwargs: dict) -> dict:
    return {name: None if value is cache_in(kwargs) else value for name, value in kwargs.items()}


def with_a_cache_of_no_use(block, states, attention_mask=None, **kwargs):
    """Its keys and values are remembered, but not looked at."""
    if cache_in(kwargs) is not None:
        plainly(block, states, attention_mask=attention_mask, **kwargs)
    kwargs = without_it(kwargs)
    length = states.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=states.dtype).triu(1)
    return plainly(block, states, attention_mask=mask[None, None], **kwargs)


def without_positions(block, states, position_embeddings=None, **kwargs):
    """It counts from 0 on, whatever it is told."""
    angles = torch.arange(states.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
    rotary = tuple(part(angles)[None].to(states) for part in (torch.cos, torch.sin))
    return plainly(block, states, position_embeddings=rotary, **kwargs)


def refusing_a_cache(block, states, **kwargs):
    if cache_in(kwargs) is not None:
        raise IndexError("list index out of range")
    return plainly(block, states, **kwargs)


ERRORS = (TypeError, RuntimeError, IndexError, ValueError, AttributeError, KeyError)


@pytest.mark.parametrize(
    "forward",
    [
        *(without_cache, with_a_cache_of_no_use, without_positions, with_a_memory, refusing_a_cache),
        *map(failing, ERRORS),
    ],
)
@torch.no_grad()
def test_blocks_that_cannot_be_resumed_are_run_on_whole_texts(forward):
    model = altered(forward)
    before = hooks_of(model)
    for layer, token in ((0, 0), (1, 5), (2, LENGTH - 1), (0, 7)):
        patched = [(part, one) for part in PATCHED for one in range(layer, 3)]
        run = Replayed(model, layer=layer, token=token, patched=patched, seed=10 * layer + token)
        assert run.recording.engine == "plain"
        found, (wanted, logits) = run.resumed(), run.plain()
        assert difference(found, wanted) <= 1e-10
        assert difference(model.unembed(found)[:, -1], logits) <= 1e-10
        assert difference(run.resumed(patched=False), wanted) > 1e-3
    run = Replayed(model, layer=1, token=3, patched=[("mlp", 1)], tokens_at_once=15)
    wanted, _ = run.plain()
    for keep in range(1, LENGTH - 2):
        assert difference(run.resumed(keep), wanted[:, -keep:]) <= 1e-10
    assert hooks_of(model) == before


def test_a_model_that_can_be_resumed_no_longer_is_run_on_whole_texts():
    model = altered(plainly)
    batch = model.batch([list(range(9))])
    assert record(model, batch).engine == "replay"
    model.blocks[1].forward = MethodType(with_a_memory, model.blocks[1])
    assert record(model, batch).engine == "plain"


def by_number_of_rows(block, states, **kwargs):
    return plainly(block, states, **kwargs) * len(states)


def test_blocks_that_are_otherwise_called_on_their_own_are_refused_by_name():
    model = altered(by_number_of_rows)
    with pytest.raises(UnsupportedModel, match=r"^model\.layers\.1: called on its own, it comes out") as caught:
        record(model, model.batch([list(range(9)), list(range(9))]))
    assert "altered cannot be replayed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_recording_passes_its_own_check():
    for family, attention in KINDS:
        model = narrow_model(family, attention, layers=3)
        for length in (1, 2, LENGTH):
            recording = record(model, model.batch([list(range(length))]))
            assert isinstance(recording, Recording)
            recording.check()
