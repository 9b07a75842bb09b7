"""Texts that share their beginnings, run block by block, against one whole pass a text with hooks of its own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from errata.base.errors import FactError, UnsupportedModel
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes import strands
from errata.passes.rowwise import row_changes
from errata.passes.strands import Flow, Passes, Strand, StrandBatch
from tiny import ALL_FAMILIES, POSITIONS, VOCAB, attentions, byte_tokenizer, short_windows, tiny

LAYERS = 4
KINDS = [(family, attention) for family in ALL_FAMILIES for attention in attentions(family)]


@functools.cache
def model_of(family: str, attention: str = "eager", dtype: torch.dtype = torch.float64) -> Model:
    changes = short_windows(family, LAYERS) | {"attn_implementation": attention}
    return Model(tiny(family, LAYERS, dtype, **changes), byte_tokenizer(), family)


@pytest.fixture(autouse=True)
def softmax_in_its_own_dtype(monkeypatch):
    """Attention in eager mode computes its softmax in float32, whatever the model's dtype; here in float64 too."""
    plain = nn.functional.softmax

    def softmax(scores, dim=-1, dtype=None, **kwargs):
        return plain(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", softmax)


def bound(family: str, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the largest feature of a token."""
    if family == "gptj":  # scores are float32 in float64 models too
        return 1e-5
    if dtype == torch.float64:
        return 1e-10
    return 1e-4 if family in ("gemma2", "gemma3") else 1e-5  # norms behind the branches enlarge rounding


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())


# Of each strand, tokens of the trunk, and of each branch where it leaves it and tokens of its own: none; behind the
# first token; at the end; several, of one length and of others, some longer than the trunk and than any window.
SHAPES = (
    (9, ((1, 3), (9, 2), (4, 5), (4, 5), (4, 1))),
    (1, ((1, 6), (1, 1))),
    (17, ()),
    (9, ((4, 5), (8, 13), (1, 3))),
    (3, ((3, 2),)),
)


def made(seed: int = 0) -> list[Strand]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    return [Strand(drawn(trunk), tuple((at, drawn(own)) for at, own in some)) for trunk, some in SHAPES]


@torch.no_grad()
def whole(model: Model, ids: tuple[int, ...]) -> list[Tensor]:
    """What enters the first block and leaves each, `[n, d_model]`, by a plain pass."""
    blocks = next(m for m in model.hf.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    seen: list[Tensor] = []

    def enter(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def leave(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        model.hf(torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == LAYERS + 1
    return seen


def worst(batch: StrandBatch, flow: Flow, layer: int, wanted: dict) -> float:
    """The largest difference of any trunk or branch of a batch behind `layer` blocks."""
    found = []
    for row, strand in enumerate(batch.rows):
        own = wanted[strand][None][layer]
        found.append(difference(flow.trunk[row, : len(own) - flow.begin], own[flow.begin :]))
    for group, states in zip(batch.groups, flow.branches, strict=True):
        for (row, branch), own in zip(group.owners, states, strict=True):
            found.append(difference(own, wanted[batch.rows[row]][branch][layer]))
    assert len(found) == sum(len(wanted[strand]) for strand in batch.rows)
    return max(found)


def expected(model: Model, some: list[Strand]) -> dict:
    """States behind so many blocks, by strand and branch (None: the trunk)."""
    return {
        i: {None: whole(model, strand.trunk)}
        | {
            branch: [states[at:] for states in whole(model, strand.trunk[:at] + own)]
            for branch, (at, own) in enumerate(strand.branches)
        }
        for i, strand in enumerate(some)
    }


@pytest.mark.parametrize(("family", "attention"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trunks_and_branches_are_what_whole_passes_give(family, attention, dtype):
    model, some = model_of(family, attention, dtype), made()
    passes, wanted, seen = Passes(model, some), expected(model, some), []
    for batch in passes.batches():
        flow = passes.enter(batch)
        assert worst(batch, flow, 0, wanted) < bound(family, dtype)
        for layer in range(LAYERS):
            flow = passes.step(batch, layer, flow)
            assert worst(batch, flow, layer + 1, wanted) < bound(family, dtype)
        seen += batch.rows
    assert sorted(seen) == list(range(len(some)))


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
def test_a_window_matters_here(family):
    """The same weights without the window say something else of these texts."""
    model, ids = model_of(family), made()[2].trunk
    free = Model(tiny(family, LAYERS, torch.float64, sliding_window=64), byte_tokenizer(), family)
    assert difference(whole(model, ids)[-1], whole(free, ids)[-1]) > 1e-3


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_row_with_changes_of_its_own(family):
    """Trunks and their branches, each with another change of one of two blocks, against weights that hold it."""
    model, some = model_of(family, attentions(family)[-1]), made()
    generator = torch.Generator().manual_seed(1)

    def factors(layer: int) -> dict:
        write, read = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (model.d_model, model.d_mlp))
        return {down_weight_name(model, layer): (write[:, None] / 4, read[None] / 4)}

    each = [factors(1), {}, factors(2), factors(2), factors(1)]
    wanted = {}
    for i, own in enumerate(each):
        kept = {name: model.weight(name).detach().clone() for name in own}
        with torch.no_grad():
            for name, (write, read) in own.items():
                change = write @ read
                model.weight(name).add_(change.T if family == "gpt2" else change)
            wanted[i] = expected(model, [some[i]])[0]
            for name, weight in kept.items():
                model.weight(name).copy_(weight)
    passes, changes = Passes(model, some), row_changes(model, each)
    for batch in passes.batches():
        flow = passes.enter(batch)
        for layer in range(LAYERS):
            flow = passes.step(batch, layer, flow, changes.of(torch.tensor(batch.rows)))
            assert worst(batch, flow, layer + 1, wanted) < bound(family, torch.float64)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_behind_the_last_block_only_wanted_tokens_are_there(family, monkeypatch):
    """Those of the trunk alone; branches that leave it earlier are whole."""
    monkeypatch.setattr(strands, "_NEW_BATCH", 1000)
    model, some = model_of(family, attentions(family)[-1]), made()
    some = [Strand(each.trunk, each.branches, 2) for i, each in enumerate(some) if i != 1]
    some[1] = Strand(some[1].trunk, some[1].branches, 6)
    passes, wanted = Passes(model, some), expected(model, some)
    [batch] = passes.batches()
    flow = passes.enter(batch)
    for layer in range(LAYERS):
        flow = passes.step(batch, layer, flow)
        assert flow.begin == (2 if layer == LAYERS - 1 else 0)
        assert worst(batch, flow, layer + 1, wanted) < bound(family, torch.float64)
    row = batch.rows.index(0)
    for branch, at, own in ((None, 5, wanted[0][None]), (2, 3, wanted[0][2])):
        assert difference(batch.state(flow, row, branch, at), own[LAYERS][at]) < bound(family, torch.float64)
    with pytest.raises(KeyError):
        batch.state(flow, batch.rows.index(1), 0, 0)
    passes.verify(batch, flow)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("layer", [1, LAYERS - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_down_projection_is_added_to_what_a_block_made_without(family, layer, dtype):
    model = model_of(family, attentions(family)[-1], dtype)
    some = [Strand(each.trunk, each.branches, len(each.trunk) - 1) for each in made()]
    generator = torch.Generator().manual_seed(2)

    def factors(rank: int) -> dict:
        write = torch.randn(model.d_model, rank, generator=generator, dtype=torch.float64)
        return {down_weight_name(model, layer): (write / 4, torch.randn(rank, model.d_mlp, generator=generator) / 4)}

    passes, changes = Passes(model, some), row_changes(model, [factors(1), factors(2), {}, factors(1), factors(3)])
    for batch in passes.batches():
        flow = passes.enter(batch)
        for below in range(layer):
            flow = passes.step(batch, below, flow)
        own = changes.of(torch.tensor(batch.rows))
        left, mlp = passes.watched(batch, layer, flow)
        plain, found, wanted = (
            passes.step(batch, layer, flow),
            passes.moved(batch, layer, left, mlp, own),
            passes.step(batch, layer, flow, own),
        )
        assert left.begin == found.begin == wanted.begin
        for got, unmoved, one, other in zip(
            *([f.trunk, *f.branches] for f in (left, plain, found, wanted)), strict=True
        ):
            assert torch.equal(got, unmoved)
            assert difference(one, other) < bound(family, dtype)
        if batch.rows != (2,):
            assert difference(found.trunk, plain.trunk) > 1e-3


def test_blocks_that_come_out_otherwise_are_told():
    model = model_of("gpt2")
    passes = Passes(model, made()[2:3])
    [batch] = passes.batches()
    flow = passes.enter(batch)
    for layer in range(LAYERS):
        flow = passes.step(batch, layer, flow)
    passes.verify(batch, flow)
    with pytest.raises(UnsupportedModel, match="come out otherwise"):
        passes.verify(batch, Flow(flow.trunk * 1.01, flow.branches))


# ---- batches ------------------------------------------------------------------------------------------------


def test_batches_hold_every_strand_once_and_no_more_tokens_than_fit(monkeypatch):
    model, some = model_of("gpt2"), made()
    passes = Passes(model, some)
    monkeypatch.setattr(strands, "_NEW_BATCH", 1000)
    assert [batch.rows for batch in passes.batches()] == [(1, 4, 0, 3, 2)]  # by length
    monkeypatch.setattr(strands, "_TOKENS_AT_ONCE", {"cpu": 18})
    batches = list(passes.batches())
    assert [batch.rows for batch in batches] == [(1, 4), (0, 3), (2,)]
    wanted = expected(model, some)
    for batch in batches:
        flow = passes.enter(batch)
        for layer in range(LAYERS):
            flow = passes.step(batch, layer, flow)
        assert worst(batch, flow, LAYERS, wanted) < 1e-10
    apart = [set(batch.rows) for batch in passes.batches(["a", "b", "a", "b", "a"])]
    assert all(rows <= {0, 2, 4} or rows <= {1, 3} for rows in apart)
    assert sorted(row for rows in apart for row in rows) == [0, 1, 2, 3, 4]


def test_branches_of_one_length_at_one_token_are_a_group(monkeypatch):
    monkeypatch.setattr(strands, "_NEW_BATCH", 1000)
    [batch] = Passes(model_of("gpt2"), made()).batches()
    place = {strand: row for row, strand in enumerate(batch.rows)}
    owners = {(group.at, len(group.owners)): set(group.owners) for group in batch.groups}
    assert owners[4, 3] == {(place[0], 2), (place[0], 3), (place[3], 0)}
    assert owners[1, 2] == {(place[0], 0), (place[3], 2)}
    assert sum(len(group.owners) for group in batch.groups) == 11


@pytest.mark.parametrize("limit", [1, 7, 30, 512])
def test_no_way_to_part_rows_costs_less(limit):
    """Against all ways to part them, of widths times rows, and what a batch more costs."""

    def cost(cuts: list[tuple[int, int]], lengths: list[int]) -> int:
        return sum((end - begin) * lengths[end - 1] + strands._NEW_BATCH for begin, end in cuts)

    generator = torch.Generator().manual_seed(limit)
    for count in (1, 2, 5, 8):
        lengths = sorted(torch.randint(1, 40, (count,), generator=generator).tolist())
        ways = []
        for bits in range(2 ** (count - 1)):
            ends = [i for i in range(1, count) if bits >> (i - 1) & 1] + [count]
            cuts = list(zip([0, *ends[:-1]], ends, strict=True))
            if all(end - begin == 1 or (end - begin) * lengths[end - 1] <= limit for begin, end in cuts):
                ways.append(cuts)
        found = strands._cuts(lengths, limit)
        assert found in ways
        assert cost(found, lengths) == min(cost(way, lengths) for way in ways)


def test_texts_of_a_strand():
    assert Strand((1, 2, 3), ((1, (4, 5)), (3, (6,)))).texts == [(1, 2, 3), (1, 4, 5), (1, 2, 3, 6)]


def test_a_branch_that_is_too_long_is_told():
    model = model_of("gpt2")
    fits = Strand((1,) * 40, ((40, (2,) * (POSITIONS - 40)),))
    Passes(model, [fits])
    with pytest.raises(FactError, match=f"reads at most {POSITIONS}"):
        Passes(model, [fits, Strand((1,) * 40, ((40, (2,) * (POSITIONS - 39)),))])


def test_nothing_is_left_on_the_model():
    model, some = model_of("llama"), made()
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    passes = Passes(model, some)
    for batch in passes.batches():
        passes.step(batch, 0, passes.enter(batch))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
