"""Texts that share their beginnings, run block by block, against one whole pass a text with hooks of its own."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from errata.base.errors import FactError, UnsupportedModel
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes import packing, strands
from errata.passes.packing import Pack, Strand
from errata.passes.rowwise import row_changes
from errata.passes.strands import Flow, Passes
from tiny import ALL_FAMILIES, POSITIONS, VOCAB, attentions, byte_tokenizer, randomised, short_windows, tiny

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


def worst(pack: Pack, flow: Flow, layer: int, wanted: dict) -> float:
    """The largest difference of any token that is asked for behind `layer` blocks."""
    found = []
    for place, strand in enumerate(pack.members):
        for branch, states in wanted[strand].items():
            first = wanted[strand]["wanted"] if branch is None else 0
            if branch != "wanted":
                tokens = [(place, branch, i) for i in range(first, len(states[layer]))]
                found.append(difference(flow.of(pack, tokens), states[layer][first:]))
    assert len(found) == sum(len(wanted[strand]) - 1 for strand in pack.members)
    assert all(math.isfinite(each) for each in found)
    return max(found)


def expected(model: Model, some: list[Strand]) -> dict:
    """States behind so many blocks, by strand and branch (None: the trunk), and the first that is wanted of it."""
    return {
        i: {"wanted": strand.wanted, None: whole(model, strand.trunk)}
        | {
            branch: [states[at:] for states in whole(model, strand.trunk[:at] + own)]
            for branch, (at, own) in enumerate(strand.branches)
        }
        for i, strand in enumerate(some)
    }


def through(passes: Passes, pack: Pack, wanted: dict, bound: float, changes=None) -> Flow:
    """All blocks, with a look behind each."""
    flow = passes.enter(pack)
    assert worst(pack, flow, 0, wanted) < bound
    for layer in range(LAYERS):
        flow = passes.step(pack, layer, flow, changes)
        assert worst(pack, flow, layer + 1, wanted) < bound
    return flow


@pytest.mark.parametrize(("family", "attention"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("apart", [False, True])
def test_trunks_and_branches_are_what_whole_passes_give(family, attention, dtype, apart):
    """Beside each other in rows, and each in a row of its own."""
    model, some = model_of(family, attention, dtype), made()
    passes, wanted = Passes(model, some), expected(model, some)
    [pack] = passes.apart(range(len(some))) if apart else passes.packs()
    assert pack.in_order is apart  # every family here will have it
    assert len(pack.slots) == (16 if apart else 2)
    through(passes, pack, wanted, bound(family, dtype))


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
    for pack in (*passes.packs(), *passes.apart([3, 0])):
        own = changes.of(torch.tensor(pack.members))
        through(passes, pack, wanted, bound(family, torch.float64), own)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("apart", [False, True])
def test_behind_the_last_block_only_wanted_tokens_are_there(family, apart):
    model, some = model_of(family, attentions(family)[-1]), made()
    some = [Strand(each.trunk, each.branches, len(each.trunk) - 1) for each in some if len(each.trunk) > 1]
    passes = Passes(model, some)
    [pack] = passes.apart(range(len(some))) if apart else passes.packs()
    flow = through(passes, pack, expected(model, some), bound(family, torch.float64))
    assert flow.begin == pack.begin > 0
    assert flow.states.shape[1] == len(pack.slots[0]) - pack.begin
    place = pack.members.index(0)
    for nobodys in ((place, None, 7), (place, 5, 0), (place, 0, 3)):
        with pytest.raises(KeyError):
            flow.of(pack, [nobodys])


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
    [pack] = passes.packs()
    own = changes.of(torch.tensor(pack.members))
    flow = passes.enter(pack)
    for below in range(layer):
        flow = passes.step(pack, below, flow)
    left, mlp = passes.watched(pack, layer, flow)
    plain, found, wanted = (
        passes.step(pack, layer, flow),
        passes.moved(pack, layer, left, mlp, own),
        passes.step(pack, layer, flow, own),
    )
    assert left.begin == found.begin == wanted.begin
    assert torch.equal(left.states, plain.states)
    assert difference(found.states, wanted.states) < bound(family, dtype)
    moved = (found.states - plain.states).abs().amax(-1) > 1e-3
    unchanged = (pack.owners == 2)[:, left.begin :]
    holds_token = (pack.owners >= 0)[:, left.begin :]
    assert torch.equal(moved & holds_token, holds_token & ~unchanged)


# ---- models that are asked how they are called ----------------------------------------------------------------


def asked(monkeypatch) -> list[int]:
    """The lengths that models are asked for from now on."""
    lengths, plain = [], strands.record

    def recording(model, batch, **settings):
        lengths.append(batch.input_ids.shape[1])
        return plain(model, batch, **settings)

    monkeypatch.setattr(strands, "record", recording)
    return lengths


def test_a_model_is_asked_once_for_a_length(monkeypatch):
    model, lengths = Model(tiny("llama"), byte_tokenizer()), asked(monkeypatch)
    for length in (5, 32, 1, 33, 64, 40, POSITIONS):
        Passes(model, [Strand((1,) * length)])
    assert lengths == [32, 64, 96]
    model.hf.double()
    Passes(model, [Strand((1,) * 5)])
    assert lengths == [32, 64, 96, 32]


def test_few_lengths_are_remembered(monkeypatch):
    model, lengths = Model(tiny("llama"), byte_tokenizer()), asked(monkeypatch)
    monkeypatch.setattr(strands, "_LENGTHS", 2)
    for length in (5, 40, 5, 70, 40, 5):
        Passes(model, [Strand((1,) * length)])
    assert lengths == [32, 64, 96, 32]


@pytest.mark.parametrize("positions", [7, 45])
def test_models_that_read_little(positions):
    model = Model(tiny("gpt2", LAYERS, torch.float64, n_positions=positions), byte_tokenizer(), "gpt2")
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in (1, positions, positions // 2)]
    some = [Strand(ids, ((1, ids[:1]),)) for ids in drawn if ids]
    wanted = expected(model, some)
    passes = Passes(model, some)
    for pack in (*passes.packs(), *passes.apart(range(len(some)))):
        through(passes, pack, wanted, 1e-10)
    with pytest.raises(FactError, match=f"reads at most {positions}"):
        Passes(model, [Strand((1,) * (positions + 1))])


def test_a_model_that_is_broken_now_is_asked_again(monkeypatch):
    """What it says is no number, which tells nothing of how its blocks can be called."""
    model, lengths = Model(tiny("gpt2", LAYERS), byte_tokenizer(), "gpt2"), asked(monkeypatch)
    weight = model.weight(down_weight_name(model, 1))
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.inf)
        assert all(pack.in_order for pack in Passes(model, made()).packs())
        weight.copy_(kept)
    assert not any(pack.in_order for pack in Passes(model, made()).packs())
    assert lengths == [32, 32]


def other(family: str, **config) -> Model:
    known = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**known, **config))
    return Model(randomised(hf.double()), byte_tokenizer(), family)


@pytest.mark.parametrize(
    ("family", "beside", "config"),
    [
        ("bloom", True, {"hidden_size": 16, "n_head": 2, "n_layer": LAYERS}),
        ("falcon", True, {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": LAYERS, "alibi": True}),
        ("mpt", False, {"d_model": 16, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 96, "expansion_ratio": 2}),
        (
            "gpt_neo",
            False,
            {
                "hidden_size": 16,
                "num_heads": 2,
                "num_layers": LAYERS,
                "attention_types": [[["global", "local"], LAYERS // 2]],
                "window_size": 4,
            },
        ),
    ],
)
def test_models_that_tell_distances_by_places_in_a_row_have_one_text_a_row(family, beside, config):
    """BLOOM and Falcon are given a bias of every key; MPT cuts its own, and GPT-Neo counts slots in its window."""
    model, some = other(family, **config), made()
    some = [Strand(each.trunk, each.branches, len(each.trunk) // 2) for each in some]
    passes = Passes(model, some)
    [pack] = passes.packs()
    assert pack.in_order is not beside
    # their biases and softmax are float32 in float64 models too
    through(passes, pack, expected(model, some), 1e-5)


def test_a_window_counts_as_soon_as_rows_are_longer():
    """GPT-Neo's, of 70: rows are of 64 for texts of up to 32 tokens, and of 128 for longer ones."""
    config = {"hidden_size": 16, "num_heads": 2, "num_layers": LAYERS, "window_size": 70}
    model = other("gpt_neo", attention_types=[[["global", "local"], LAYERS // 2]], **config)
    for length, beside in ((32, True), (33, False)):
        some = [Strand((1,) * length), Strand((2,) * 9)]
        passes = Passes(model, some)
        packs = list(passes.packs())
        assert all(pack.in_order is not beside for pack in packs)
        wanted = expected(model, some)
        for pack in packs:
            through(passes, pack, wanted, 1e-5)


def test_rows_are_never_wider_than_what_was_tried(monkeypatch):
    """Of texts of up to 32 tokens, 64; a strand that is wider has rows of its own."""
    wide = Strand((1,) * 20, ((20, (2,) * 12),) * 4)
    some = [wide, *(Strand((i,) * n) for i, n in enumerate((32, 22, 22, 22, 31, 33 - 22)))]
    packs = list(Passes(model_of("gpt2"), some).packs())
    assert [pack.members for pack in packs if pack.in_order] == [(0,)]
    assert max(len(pack.slots[0]) for pack in packs if not pack.in_order) <= 64
    monkeypatch.setattr(strands, "_BESIDE", 8)
    fresh = Model(tiny("gpt2", LAYERS), byte_tokenizer(), "gpt2")
    packs = list(Passes(fresh, some).packs())
    assert max(len(pack.slots[0]) for pack in packs if not pack.in_order) == 11


def test_blocks_that_come_out_otherwise_are_told(monkeypatch):
    model = Model(tiny("gpt2"), byte_tokenizer(), "gpt2")
    plain = strands.run
    monkeypatch.setattr(strands, "run", lambda *given: plain(*given) * 1.01)
    with pytest.raises(UnsupportedModel, match="come out otherwise"):
        Passes(model, made())


def test_blocks_that_fail_when_they_are_called_are_told(monkeypatch):
    model = Model(tiny("gpt2"), byte_tokenizer(), "gpt2")

    def failing(*given):
        raise RuntimeError("shapes")

    monkeypatch.setattr(strands, "run", failing)
    with pytest.raises(UnsupportedModel, match="come out otherwise"):
        Passes(model, made())
    monkeypatch.setattr(strands, "run", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        Passes(model, made())


# ---- packs ----------------------------------------------------------------------------------------------------


def test_packs_hold_every_strand_once_and_no_more_tokens_than_fit(monkeypatch):
    model, some = model_of("gpt2"), made()
    passes = Passes(model, some)
    assert [pack.members for pack in passes.packs()] == [(0, 1, 2, 3, 4)]
    monkeypatch.setattr(strands, "_TOKENS_AT_ONCE", {"cpu": 40})
    packs = list(passes.packs())
    assert [pack.members for pack in packs] == [(0,), (1, 2), (3, 4)]  # of 25, 8 + 17, 30 + 5 tokens
    wanted = expected(model, some)
    for pack in packs:
        through(passes, pack, wanted, 1e-10)
    apart = [set(pack.members) for pack in passes.packs(["a", "b", "a", "b", "a"])]
    assert all(rows <= {0, 2, 4} or rows <= {1, 3} for rows in apart)
    assert sorted(row for rows in apart for row in rows) == [0, 1, 2, 3, 4]


def tokens_of(pack: Pack, some: list[Strand]) -> dict:
    """Which tokens every token sees, by what it is: strand, branch and index in the text."""
    name = {}
    for i, row in enumerate(pack.slots):
        for j, slot in enumerate(row):
            if slot.owner >= 0:
                name[i, j] = (pack.members[slot.owner], slot.piece, slot.position)
    sees = pack.sees[:, 0]
    return {own: {name.get((i, k)) for k in range(sees.shape[1]) if sees[i, j, k]} for (i, j), own in name.items()}


@pytest.mark.parametrize("width", [8, 64, 500])
def test_each_token_sees_its_own_text_alone(width):
    some = made()
    rows = [3, 0, 4, 1, 2]
    bins = packing.bins([some[i].size for i in rows], width, 500)
    pack = packing.side_by_side(rows, [some[i] for i in rows], bins)
    found, wanted = tokens_of(pack, some), {}
    for i, strand in enumerate(some):
        for position in range(len(strand.trunk)):
            wanted[i, 0, position] = {(i, 0, k) for k in range(position + 1)}
        for piece, (at, own) in enumerate(strand.branches, 1):
            for position in range(at, at + len(own)):
                before = {(i, 0, k) for k in range(at)}
                wanted[i, piece, position] = before | {(i, piece, k) for k in range(at, position + 1)}
    assert found == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(1, 80), st.integers(0, 100))
def test_bins_hold_all_and_are_few(sizes, width, more):
    widest = max(sizes) + more
    bins = packing.bins(sizes, width, widest)
    assert sorted(i for some in bins for i in some) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in some) for some in bins) <= widest
    assert len(bins) <= 2 * math.ceil(sum(sizes) / min(max(width, *sizes), widest))


def test_bins_that_a_size_does_not_fit():
    with pytest.raises(ValueError, match="wider than 4"):
        packing.bins([5], 64, 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 200))
def test_rows_of_their_own_are_no_more_than_fit(shapes, limit):
    some = [Strand((1,) * length, ((length, (2, 3)),) * branches) for length, branches in shapes]
    shares = packing.shares_of_rows(some, limit)
    assert sorted(i for share in shares for i in share) == list(range(len(some)))
    for share in shares:
        pack = packing.one_a_row(share, [some[i] for i in share])
        assert len(share) == 1 or len(pack.slots) * len(pack.slots[0]) <= limit


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 200))
def test_shares_are_of_about_as_much_each(sizes, limit):
    shares = packing.shares(sizes, limit)
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    assert len(shares) <= math.ceil(sum(sizes) / limit)
    each = sum(sizes) / math.ceil(sum(sizes) / limit)
    assert all(abs(sum(sizes[i] for i in share) - each) <= max(each, max(sizes)) for share in shares)


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
    for pack in passes.packs():
        passes.step(pack, 0, passes.enter(pack))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
