"""Texts that share their beginnings, run block by block, against one whole pass a text with hooks of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from errata.base import budgets
from errata.base.budgets import padded_groups
from errata.base.errors import FactError, UnsupportedModel
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes import packed, packing, token_batch
from errata.passes.packed import PackedPasses
from errata.passes.packing import PackedBatch, PackedSequence
from errata.passes.rowwise import row_changes
from helpers.budget import examples
from helpers.models import difference, narrow_model
from helpers.softmax import softmax_in_its_own_dtype  # noqa: F401, a fixture
from tiny import ALL_FAMILIES, POSITIONS, VOCAB, attentions, byte_tokenizer, randomised, tiny

LAYERS = 4
KINDS = [(family, attention) for family in ALL_FAMILIES for attention in attentions(family)]


def bound(family: str, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the largest feature of a token."""
    if family == "gptj":  # scores are float32 in float64 models too
        return 1e-5
    if dtype == torch.float64:
        return 1e-10
    return 1e-4 if family in ("gemma2", "gemma3") else 1e-5  # norms behind the continuations enlarge rounding


# For each sequence, tokens of the prefix; for each continuation, where it leaves the prefix and how many tokens it has.
# None; behind the first token; at the end; several of one length and of others, some longer than the prefix or window.
SHAPES = (
    (9, ((1, 3), (9, 2), (4, 5), (4, 5), (4, 1))),
    (1, ((1, 6), (1, 1))),
    (17, ()),
    (9, ((4, 5), (8, 13), (1, 3))),
    (3, ((3, 2),)),
)


def made(seed: int = 0) -> list[PackedSequence]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    return [PackedSequence(drawn(prefix), tuple((at, drawn(own)) for at, own in some)) for prefix, some in SHAPES]


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


def worst(batch: PackedBatch, hidden: Tensor, layer: int, wanted: dict) -> float:
    """The largest difference of any token that is asked for behind `layer` blocks."""
    found = []
    for place, sequence in enumerate(batch.members):
        for continuation, states in wanted[sequence].items():
            first = wanted[sequence]["wanted"] if continuation is None else 0
            if continuation != "wanted":
                tokens = [(place, continuation, i) for i in range(first, len(states[layer]))]
                found.append(difference(batch.pick(hidden, tokens), states[layer][first:]))
    assert len(found) == sum(len(wanted[sequence]) - 1 for sequence in batch.members)
    assert all(math.isfinite(each) for each in found)
    return max(found)


def expected(model: Model, some: list[PackedSequence]) -> dict:
    """Hidden states behind so many blocks, by sequence and continuation (None: the prefix); the first wanted token."""
    return {
        i: {"wanted": sequence.wanted, None: whole(model, sequence.prefix)}
        | {
            continuation: [states[at:] for states in whole(model, sequence.prefix[:at] + own)]
            for continuation, (at, own) in enumerate(sequence.continuations)
        }
        for i, sequence in enumerate(some)
    }


def through(passes: PackedPasses, batch: PackedBatch, wanted: dict, bound: float, changes=None) -> Tensor:
    """All blocks, with a look behind each."""
    hidden = passes.enter(batch)
    assert worst(batch, hidden, 0, wanted) < bound
    for layer in range(LAYERS):
        hidden = passes.step(batch, layer, hidden, changes)
        assert worst(batch, hidden, layer + 1, wanted) < bound
    return hidden


@pytest.mark.parametrize(("family", "attention"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("apart", [False, True])
def test_prefixes_and_continuations_are_what_whole_passes_give(family, attention, dtype, apart):
    """Beside each other in rows, and each in a row of its own."""
    model, some = narrow_model(family, attention, dtype), made()
    passes, wanted = PackedPasses(model, some), expected(model, some)
    [batch] = passes.apart(range(len(some))) if apart else passes.batches()
    assert batch.in_order is apart  # every family here will have it
    assert len(batch.rows) == (16 if apart else 2)
    through(passes, batch, wanted, bound(family, dtype))


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
def test_a_window_matters_here(family):
    """The same weights without the window say something else of these texts."""
    model, ids = narrow_model(family), made()[2].prefix
    free = Model(tiny(family, LAYERS, torch.float64, sliding_window=64), byte_tokenizer(), family)
    assert difference(whole(model, ids)[-1], whole(free, ids)[-1]) > 1e-3


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_row_with_changes_of_its_own(family):
    """Prefixes and their continuations, each with another change of one of two blocks, against weights that hold it."""
    model, some = narrow_model(family, attentions(family)[-1]), made()
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
    passes, changes = PackedPasses(model, some), row_changes(model, each)
    for batch in (*passes.batches(), *passes.apart([3, 0])):
        own = changes.of(torch.tensor(batch.members))
        through(passes, batch, wanted, bound(family, torch.float64), own)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("apart", [False, True])
def test_behind_the_last_block_only_wanted_tokens_are_there(family, apart):
    model, some = narrow_model(family, attentions(family)[-1]), made()
    some = [
        PackedSequence(each.prefix, each.continuations, len(each.prefix) - 1) for each in some if len(each.prefix) > 1
    ]
    passes = PackedPasses(model, some)
    [batch] = passes.apart(range(len(some))) if apart else passes.batches()
    hidden = through(passes, batch, expected(model, some), bound(family, torch.float64))
    assert batch.begin > 0
    assert hidden.shape[1] == len(batch.rows[0]) - batch.begin
    place = batch.members.index(0)
    for nobodys in ((place, None, 7), (place, 5, 0), (place, 0, 3)):
        with pytest.raises(KeyError):
            batch.pick(hidden, [nobodys])


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("layer", [1, LAYERS - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_down_projection_is_added_to_what_a_block_made_without(family, layer, dtype):
    model = narrow_model(family, attentions(family)[-1], dtype)
    some = [PackedSequence(each.prefix, each.continuations, len(each.prefix) - 1) for each in made()]
    generator = torch.Generator().manual_seed(2)

    def factors(rank: int) -> dict:
        write = torch.randn(model.d_model, rank, generator=generator, dtype=torch.float64)
        return {down_weight_name(model, layer): (write / 4, torch.randn(rank, model.d_mlp, generator=generator) / 4)}

    passes, changes = (
        PackedPasses(model, some),
        row_changes(model, [factors(1), factors(2), {}, factors(1), factors(3)]),
    )
    [batch] = passes.batches()
    own = changes.of(torch.tensor(batch.members))
    hidden = passes.enter(batch)
    for below in range(layer):
        hidden = passes.step(batch, below, hidden)
    left, mlp = passes.watched(batch, layer, hidden)
    plain, found, wanted = (
        passes.step(batch, layer, hidden),
        passes.moved(batch, layer, left, mlp, own),
        passes.step(batch, layer, hidden, own),
    )
    assert torch.equal(left, plain)
    assert difference(found, wanted) < bound(family, dtype)
    moved = (found - plain).abs().amax(-1) > 1e-3
    unchanged = (batch.owners == 2)[:, -left.shape[1] :]
    holds_token = (batch.owners >= 0)[:, -left.shape[1] :]
    assert torch.equal(moved & holds_token, holds_token & ~unchanged)


# ---- models that are asked how they are called ----------------------------------------------------------------


def asked(monkeypatch) -> list[int]:
    """The lengths that models are asked for from now on."""
    lengths, plain = [], packed.record

    def recording(model, batch, **settings):
        lengths.append(batch.input_ids.shape[1])
        return plain(model, batch, **settings)

    monkeypatch.setattr(packed, "record", recording)
    return lengths


def test_a_model_is_asked_once_for_a_length(monkeypatch):
    model, lengths = Model(tiny("llama"), byte_tokenizer()), asked(monkeypatch)
    for length in (5, 32, 1, 33, 64, 40, POSITIONS):
        PackedPasses(model, [PackedSequence((1,) * length)])
    assert lengths == [32, 64, 96]
    model.hf.double()
    PackedPasses(model, [PackedSequence((1,) * 5)])
    assert lengths == [32, 64, 96, 32]


def test_few_lengths_are_remembered(monkeypatch):
    model, lengths = Model(tiny("llama"), byte_tokenizer()), asked(monkeypatch)
    monkeypatch.setattr(packed, "_LENGTHS", 2)
    for length in (5, 40, 5, 70, 40, 5):
        PackedPasses(model, [PackedSequence((1,) * length)])
    assert lengths == [32, 64, 96, 32]


@pytest.mark.parametrize("positions", [7, 45])
def test_models_that_read_little(positions):
    model = Model(tiny("gpt2", LAYERS, torch.float64, n_positions=positions), byte_tokenizer(), "gpt2")
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in (1, positions, positions // 2)]
    some = [PackedSequence(ids, ((1, ids[:1]),)) for ids in drawn if ids]
    wanted = expected(model, some)
    passes = PackedPasses(model, some)
    for batch in (*passes.batches(), *passes.apart(range(len(some)))):
        through(passes, batch, wanted, 1e-10)
    with pytest.raises(FactError, match=f"reads at most {positions}"):
        PackedPasses(model, [PackedSequence((1,) * (positions + 1))])


def test_a_model_that_is_broken_now_is_asked_again(monkeypatch):
    """What it says is not a number, which tells nothing of how its blocks can be called."""
    model, lengths = Model(tiny("gpt2", LAYERS), byte_tokenizer(), "gpt2"), asked(monkeypatch)
    weight = model.weight(down_weight_name(model, 1))
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.inf)
        assert all(batch.in_order for batch in PackedPasses(model, made()).batches())
        weight.copy_(kept)
    assert not any(batch.in_order for batch in PackedPasses(model, made()).batches())
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
    some = [PackedSequence(each.prefix, each.continuations, len(each.prefix) // 2) for each in some]
    passes = PackedPasses(model, some)
    [batch] = passes.batches()
    assert batch.in_order is not beside
    # their biases and softmax are float32 in float64 models too
    through(passes, batch, expected(model, some), 1e-5)


def test_a_window_counts_as_soon_as_rows_are_longer():
    """GPT-Neo's, of 70: rows are of 64 for texts of up to 32 tokens, and of 128 for longer ones."""
    config = {"hidden_size": 16, "num_heads": 2, "num_layers": LAYERS, "window_size": 70}
    model = other("gpt_neo", attention_types=[[["global", "local"], LAYERS // 2]], **config)
    for length, beside in ((32, True), (33, False)):
        some = [PackedSequence((1,) * length), PackedSequence((2,) * 9)]
        passes = PackedPasses(model, some)
        batches = list(passes.batches())
        assert all(batch.in_order is not beside for batch in batches)
        wanted = expected(model, some)
        for batch in batches:
            through(passes, batch, wanted, 1e-5)


def test_rows_are_never_wider_than_what_was_tried(monkeypatch):
    """Of texts of up to 32 tokens, 64; a sequence that is wider has rows of its own."""
    wide = PackedSequence((1,) * 20, ((20, (2,) * 12),) * 4)
    some = [wide, *(PackedSequence((i,) * n) for i, n in enumerate((32, 22, 22, 22, 31, 33 - 22)))]
    batches = list(PackedPasses(narrow_model("gpt2"), some).batches())
    assert [batch.members for batch in batches if batch.in_order] == [(0,)]
    assert max(len(batch.rows[0]) for batch in batches if not batch.in_order) <= 64
    monkeypatch.setattr(packed, "_BESIDE", 8)
    fresh = Model(tiny("gpt2", LAYERS), byte_tokenizer(), "gpt2")
    batches = list(PackedPasses(fresh, some).batches())
    assert max(len(batch.rows[0]) for batch in batches if not batch.in_order) == 11


def test_blocks_that_come_out_otherwise_are_told(monkeypatch):
    model = Model(tiny("gpt2"), byte_tokenizer(), "gpt2")
    plain = token_batch.run
    monkeypatch.setattr(token_batch, "run", lambda *given: plain(*given) * 1.01)
    with pytest.raises(UnsupportedModel, match=r"^transformer.h.0: called on its own, it comes out otherwise"):
        PackedPasses(model, made())


def test_blocks_that_fail_when_they_are_called_are_told(monkeypatch):
    model = Model(tiny("gpt2"), byte_tokenizer(), "gpt2")

    def failing(*given):
        raise RuntimeError("shapes")

    monkeypatch.setattr(token_batch, "run", failing)
    with pytest.raises(UnsupportedModel, match=r"^transformer.h.0: .* it fails with RuntimeError: shapes"):
        PackedPasses(model, made())
    monkeypatch.setattr(token_batch, "run", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        PackedPasses(model, made())


# ---- batches ----------------------------------------------------------------------------------------------------


def test_batches_hold_every_sequence_once_and_no_more_tokens_than_fit(monkeypatch):
    model, some = narrow_model("gpt2"), made()
    passes = PackedPasses(model, some)
    assert [batch.members for batch in passes.batches()] == [(0, 1, 2, 3, 4)]
    monkeypatch.setitem(budgets.TOKENS["forward"], "cpu", 40)
    batches = list(passes.batches())
    assert [batch.members for batch in batches] == [(0,), (1, 2), (3, 4)]  # of 25, 8 + 17, 30 + 5 tokens
    wanted = expected(model, some)
    for batch in batches:
        through(passes, batch, wanted, 1e-10)
    apart = [set(batch.members) for batch in passes.batches(["a", "b", "a", "b", "a"])]
    assert all(rows <= {0, 2, 4} or rows <= {1, 3} for rows in apart)
    assert sorted(row for rows in apart for row in rows) == [0, 1, 2, 3, 4]


def tokens_of(batch: PackedBatch, some: list[PackedSequence]) -> dict:
    """Which tokens every token sees, by what it is: sequence, continuation and index in the text."""
    name = {}
    for i, row in enumerate(batch.rows):
        for j, token in enumerate(row):
            if token.owner >= 0:
                name[i, j] = (batch.members[token.owner], token.piece, token.offset)
    sees = batch.sees[:, 0]
    return {own: {name.get((i, k)) for k in range(sees.shape[1]) if sees[i, j, k]} for (i, j), own in name.items()}


@pytest.mark.parametrize("width", [8, 64, 500])
def test_each_token_sees_its_own_text_alone(width):
    some = made()
    rows = [3, 0, 4, 1, 2]
    bins = packing.bins([some[i].size for i in rows], width, 500)
    batch = packing.side_by_side(rows, [some[i] for i in rows], bins)
    found, wanted = tokens_of(batch, some), {}
    for i, sequence in enumerate(some):
        for position in range(len(sequence.prefix)):
            wanted[i, 0, position] = {(i, 0, k) for k in range(position + 1)}
        for piece, (at, own) in enumerate(sequence.continuations, 1):
            for position in range(at, at + len(own)):
                before = {(i, 0, k) for k in range(at)}
                wanted[i, piece, position] = before | {(i, piece, k) for k in range(at, position + 1)}
    assert found == wanted


@settings(max_examples=examples(60), deadline=None)
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


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 200))
def test_rows_of_their_own_are_no_more_than_fit(shapes, limit):
    some = [PackedSequence((1,) * length, ((length, (2, 3)),) * continuations) for length, continuations in shapes]
    shares = list(padded_groups([one.length for one in some], limit, [len(one.texts) for one in some]))
    assert sorted(i for share in shares for i in share) == list(range(len(some)))
    for share in shares:
        batch = packing.one_a_row(share, [some[i] for i in share])
        assert len(share) == 1 or len(batch.rows) * len(batch.rows[0]) <= limit


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 200))
def test_shares_are_of_about_as_much_each(sizes, limit):
    shares = packing.shares(sizes, limit)
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    assert len(shares) <= math.ceil(sum(sizes) / limit)
    each = sum(sizes) / math.ceil(sum(sizes) / limit)
    assert all(abs(sum(sizes[i] for i in share) - each) <= max(each, max(sizes)) for share in shares)


def test_texts_of_a_sequence():
    assert PackedSequence((1, 2, 3), ((1, (4, 5)), (3, (6,)))).texts == [(1, 2, 3), (1, 4, 5), (1, 2, 3, 6)]


def test_a_branch_that_is_too_long_is_told():
    model = narrow_model("gpt2")
    fits = PackedSequence((1,) * 40, ((40, (2,) * (POSITIONS - 40)),))
    PackedPasses(model, [fits])
    with pytest.raises(FactError, match=f"reads at most {POSITIONS}"):
        PackedPasses(model, [fits, PackedSequence((1,) * 40, ((40, (2,) * (POSITIONS - 39)),))])


def test_nothing_is_left_on_the_model():
    model, some = narrow_model("llama"), made()
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    passes = PackedPasses(model, some)
    for batch in passes.batches():
        passes.step(batch, 0, passes.enter(batch))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
