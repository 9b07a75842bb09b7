"""Forward passes of many texts that share their beginnings, block by block.

Texts lie side by side in the rows of a batch (`packing`), and each token sees its own text alone. Passes can be parted
at any layer, so that what lies below an edited layer is run once for all edits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from errata.base.errors import UnsupportedModel
from errata.base.interrupt import attached
from errata.models.model import Model, Stream
from errata.passes.block_call import Call, Past, run
from errata.passes.hooks import Patch, hooked_block
from errata.passes.packing import WIDTH, Pack, Strand, bins, one_a_row, shares, shares_of_rows, side_by_side
from errata.passes.replay import Recording, record, same_states
from errata.passes.rowwise import RowChanges, rowwise

# Tokens in a batch: on a CPU what a block makes of them should stay near it, a GPU wants large products.
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
# What blocks are given is asked for texts of multiples of so many tokens, and of so many lengths remembered.
_STEP, _LENGTHS = 32, 8
# Texts lie side by side in rows of at most twice so many tokens: in longer ones there is little to gain.
_BESIDE = 128


class _Entered(Exception):
    """What enters the first block is known."""


@dataclass(frozen=True)
class Flow:
    """States of a pack between two blocks. Made by `Passes.enter`.

    Attributes:
        states: `[b, w, d_model]`.
        begin: which slot is the first; behind the last block those that nobody asks for are left out.
    """

    states: Tensor
    begin: int = 0

    def of(self, pack: Pack, wanted: Sequence[tuple[int, int | None, int]]) -> Tensor:
        """States `[n, d_model]` of tokens: (place of the strand in the pack, its branch or None, index in that).

        Raises:
            KeyError: if there is no such token, or none that is asked for.
        """
        rows, slots = pack.places(wanted)
        return self.states[rows, slots - self.begin]


@dataclass(frozen=True)
class Mlp:
    """What a layer's down-projection read, `[b, w, d_mlp]`, and wrote, `[b, w, d_model]`, as a flow went by."""

    keys: Tensor
    values: Tensor


class Passes:
    """The passes of some strands through one model.

    Attributes:
        model: the model.
        strands: what is run.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the blocks cannot be called one by one.
    """

    def __init__(self, model: Model, strands: Sequence[Strand], calls: _Calls | None = None):
        self.model = model
        self.strands = list(strands)
        for strand in self.strands:
            for text in strand.texts:
                model.require_room(text, None)
        self._calls = calls or _calls_of(model, max(strand.length for strand in self.strands))
        self._given: WeakKeyDictionary[Pack, dict[tuple[object, ...], dict[str, Any]]] = WeakKeyDictionary()

    def packs(self, together: Sequence[object] | None = None) -> Iterator[Pack]:
        """All strands, some hundred tokens in a pack (some thousand on a GPU).

        Args:
            together: for each strand, what it must have in common with others to be in a pack with them.
        """
        kinds: dict[tuple[object, bool], list[int]] = defaultdict(list)
        for i, strand in enumerate(self.strands):
            kinds[together[i] if together else None, strand.size <= self._calls.widest].append(i)
        for (_, narrow), some in kinds.items():
            yield from self._beside(some) if narrow else self.apart(some)

    def _beside(self, members: Sequence[int]) -> Iterator[Pack]:
        sizes = [self.strands[i].size for i in members]
        for share in shares(sizes, self._limit):
            some = bins([sizes[place] for place in share], WIDTH, self._calls.widest)
            chosen = [members[place] for place in share]
            yield side_by_side(chosen, [self.strands[i] for i in chosen], some)

    def apart(self, members: Sequence[int]) -> Iterator[Pack]:
        """Some of the strands, each text in a row of its own."""
        for share in shares_of_rows([self.strands[i] for i in members], self._limit):
            chosen = [members[place] for place in share]
            yield one_a_row(chosen, [self.strands[i] for i in chosen])

    @property
    def _limit(self) -> int:
        return _TOKENS_AT_ONCE.get(self.model.device.type, 16384)

    @torch.no_grad()
    def enter(self, pack: Pack) -> Flow:
        """What enters the first block."""
        states = _entering(self.model, [text for i in pack.members for text in self.strands[i].texts])
        return Flow(states[pack.texts.to(states.device), pack.positions.to(states.device)])

    @torch.no_grad()
    def step(
        self,
        pack: Pack,
        layer: int,
        flow: Flow,
        changes: RowChanges | None = None,
        patches: Mapping[Stream, Patch] | None = None,
    ) -> Flow:
        """What leaves block `layer`, if `flow` enters it.

        Args:
            changes: of the block's weights, an entry a strand of the pack.
            patches: as of `hooked_block`.
        """
        model, block, states = self.model, self.model.blocks[layer], flow.states
        here = changes.within(f"{model.anatomy.blocks}.{layer}.") if changes else None
        past = Past.none()
        rows, width = states.shape[:2]
        # Of tokens whose state nobody asks for, the last block's keys and values are enough.
        begin = pack.begin if layer == model.n_layers - 1 and not self._calls.blocks[layer].whole else 0
        if begin:
            with _changed(model, here, pack, slice(begin)):
                given, ahead = self._at(layer, pack, 0, begin, states.device), states[:, :begin]
                past = past.after(ahead, lambda cache: run(block, ahead, given, cache))
        with _changed(model, here, pack, slice(begin, None)), hooked_block(model, patches or {}, rows):
            given = self._at(layer, pack, begin, width, states.device)
            return Flow(run(block, states[:, begin:], given, past), begin)

    def _at(self, layer: int, pack: Pack, begin: int, end: int, device: torch.device) -> dict[str, Any]:
        """What a block is given beside the states in the slots of a pack from `begin` to `end`."""
        call = self._calls.blocks[layer]
        known = self._given.setdefault(pack, {})
        key = (begin, end, device, *map(id, call.arguments.values()))  # most blocks are given the same
        if key not in known:
            known[key] = (
                call.at(begin, len(pack.slots), end - begin, device)
                if pack.in_order
                else call.scattered(pack.positions.to(device), pack.sees.to(device), begin, end)
            )
        return known[key]

    def watched(self, pack: Pack, layer: int, flow: Flow) -> tuple[Flow, Mlp]:
        """What leaves block `layer`, and what its down-projection read and wrote on the way."""
        seen: dict[str, Tensor] = {}

        def keeper(part: str) -> Patch:
            def keep(tensor: Tensor) -> None:
                seen[part] = tensor.clone()  # some blocks go on to add into it in place

            return keep

        left = self.step(pack, layer, flow, patches={(part, layer): keeper(part) for part in ("key", "value")})
        return left, Mlp(seen["key"], seen["value"])

    @torch.no_grad()
    def moved(self, pack: Pack, layer: int, left: Flow, mlp: Mlp, changes: RowChanges) -> Flow:
        """What leaves block `layer` with changes of its down-projection alone, from what leaves it without."""
        [name] = changes.factors
        added = changes.of(_owners(pack, slice(left.begin, None))).adder(name)(mlp.keys)
        before, after = (self.model.added(layer, each) for each in (mlp.values, mlp.values + added.to(mlp.values)))
        return Flow(left.states + (after - before).to(left.states.device), left.begin)


def _owners(pack: Pack, slots: slice) -> Tensor:
    """The place in the pack of each slot's strand, `[b, w]`; where no token is, that of any."""
    return pack.owners[:, slots].clamp(min=0)


def _changed(
    model: Model, changes: RowChanges | None, pack: Pack, slots: slice
) -> contextlib.AbstractContextManager[None]:
    if not changes or not changes.factors:
        return contextlib.nullcontext()
    return rowwise(model, changes.of(_owners(pack, slots)))


@torch.no_grad()
def _entering(model: Model, texts: Sequence[Sequence[int]]) -> Tensor:
    """What enters the first block, `[texts, tokens, d_model]`."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = next(iter(inspect.signature(module.forward).parameters))
        found.append((args[0] if args else kwargs[first]).to(model.device, copy=True))
        raise _Entered

    with (
        contextlib.suppress(_Entered),
        attached(lambda: model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)),
    ):
        model.forward(model.batch(texts), keep=1)
    return found[0]


# ---- what blocks are given ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """What the blocks of a model are given beside their states.

    Attributes:
        blocks: of each, for texts of up to so many tokens as were asked for.
        widest: the widest row in which texts may lie side by side; 0 where each must have a row of its own.
    """

    blocks: tuple[Call, ...]
    widest: int = 0


_known: WeakKeyDictionary[Model, dict[tuple[object, ...], _Calls]] = WeakKeyDictionary()


def _calls_of(model: Model, longest: int) -> _Calls:
    """What blocks are given for texts of so many tokens. A model is asked once for a length, and watched: its blocks,
    called one by one, must give what they give in one piece.

    Raises:
        UnsupportedModel: if they do not.
    """
    length = min(-(-longest // _STEP) * _STEP, model.max_length)
    attention = model.hf.config.get_text_config()._attn_implementation
    kind = (length, id(model.hf), model.device, model.dtype, attention)
    known = _known.setdefault(model, {})
    if kind in known:
        return known[kind]
    ids = tuple((17 * i + 5) % model.vocab_size for i in range(length))
    recording = record(model, model.batch([ids]), check=False)
    calls = _Calls(tuple(recording.calls))
    whole = Passes(model, [Strand(ids, ((length - 1, ids[-1:]),), length // 2)], calls)
    if not all(_holds(whole, pack, ids, recording) for pack in whole.apart([0])):
        raise UnsupportedModel(
            f"the blocks of {model.name}, called one by one, come out otherwise than in one piece, so many edits "
            "cannot be measured in one pass; load it with attn_implementation='eager' if it has another"
        )
    if not all(bool(each.isfinite().all()) for each in recording.states.values()):
        return calls  # as it stands, nothing tells
    few = ids[:_BESIDE]
    if _holds(*_trial(model, few, calls), few, recording):
        calls = _Calls(calls.blocks, 2 * len(few))
    known[kind] = calls
    if len(known) > _LENGTHS:
        known.pop(next(iter(known)))
    return calls


def _trial(model: Model, ids: tuple[int, ...], calls: _Calls) -> tuple[Passes, Pack]:
    """A text three times: with its first and last token at the ends of a row as wide as any may be; with a branch
    between these; and in another row, where its tokens stand elsewhere."""
    half, last = len(ids) // 2, len(ids) - 1
    strands = [
        Strand(ids[:half], ((half, ids[half:]),)),
        Strand(ids, wanted=last),
        Strand(ids, wanted=half),
    ]
    return Passes(model, strands, calls), side_by_side(range(3), strands, [[0, 1], [2]])


def _holds(passes: Passes, pack: Pack, ids: tuple[int, ...], recording: Recording) -> bool:
    """Whether the blocks give the recorded states of a text back, wherever it lies in a pack and is asked for."""
    flow = passes.enter(pack)
    asked = [slot for row in pack.slots for slot in row if slot.wanted]
    places = [(slot.owner, slot.piece - 1 if slot.piece else None, slot.position - slot.at) for slot in asked]
    positions = [slot.position for slot in asked]
    for layer in range(passes.model.n_layers):
        try:
            flow = passes.step(pack, layer, flow)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a foreign block raises, it cannot be called so
            return False
        if not same_states(flow.of(pack, places), recording.states[layer + 1][0, positions]):
            return False
    return True
