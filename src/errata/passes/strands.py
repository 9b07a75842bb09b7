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
from errata.models.model import Model, Stream
from errata.passes.block_call import Call, Past, run
from errata.passes.hooks import Patch, hooked_block
from errata.passes.packing import WIDTH, Pack, Strand, one_a_row, shares, side_by_side
from errata.passes.replay import Recording, record, same_states
from errata.passes.rowwise import RowChanges, rowwise

# Tokens in a batch: on a CPU what a block makes of them should stay near it, a GPU wants large products.
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
# What blocks are given is asked for texts of so many tokens, or twice as many, ...: few lengths serve all texts.
_STEP = 32


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
        self._calls = calls or _calls_of(model, max(len(text) for strand in self.strands for text in strand.texts))
        self._given: dict[tuple[object, ...], dict[str, Any]] = {}

    def packs(self, together: Sequence[object] | None = None) -> Iterator[Pack]:
        """All strands, some hundred tokens in a pack (some thousand on a GPU).

        Args:
            together: for each strand, what it must have in common with others to be in a pack with them.
        """
        limit = _TOKENS_AT_ONCE.get(self.model.device.type, 16384)
        kinds: dict[object, list[int]] = defaultdict(list)
        for i in range(len(self.strands)):
            kinds[together[i] if together else None].append(i)
        for some in kinds.values():
            for share in shares([self.strands[i].size for i in some], limit):
                yield self.pack([some[place] for place in share])

    def pack(self, rows: Sequence[int], apart: bool = False, width: int = WIDTH) -> Pack:
        """Some of the strands in one pack, in rows about so wide; `apart`: each text in a row of its own."""
        chosen = [self.strands[i] for i in rows]
        # Rows of twice the length are those that were tried.
        fit = self._calls.side_by_side and max(strand.size for strand in chosen) <= 2 * self._calls.length
        return side_by_side(rows, chosen, width) if fit and not apart else one_a_row(rows, chosen)

    @torch.no_grad()
    def enter(self, pack: Pack) -> Flow:
        """What enters the first block."""
        texts = [text for i in pack.rows for text in self.strands[i].texts]
        states = _entering(self.model, texts)
        positions = pack.positions.clamp(max=states.shape[1] - 1)
        return Flow(states[pack.texts.to(states.device), positions.to(states.device)])

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
        begin = pack.begin if layer == model.n_layers - 1 else 0
        if begin:
            with _changed(model, here, pack, slice(begin)):
                given = self._at(layer, pack, 0, begin, states.device)
                past = past.after(lambda cache: run(block, states[:, :begin], given, cache))
        with _changed(model, here, pack, slice(begin, None)), hooked_block(model, patches or {}, rows):
            given = self._at(layer, pack, begin, width, states.device)
            return Flow(run(block, states[:, begin:], given, past), begin)

    def _at(self, layer: int, pack: Pack, begin: int, end: int, device: torch.device) -> dict[str, Any]:
        """What a block is given beside the states in the slots of a pack from `begin` to `end`."""
        call = self._calls.blocks[layer]
        key = (pack, begin, end, device, *map(id, call.arguments.values()))  # most blocks are given the same
        if key not in self._given:
            self._given[key] = (
                call.at(begin, len(pack.slots), end - begin, device)
                if pack.in_order
                else call.scattered(pack.positions.to(device), pack.sees.to(device), begin, end)
            )
        return self._given[key]

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

    handle = model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.forward(model.batch(texts), keep=1)
    except _Entered:
        pass
    finally:
        handle.remove()
    return found[0]


# ---- what blocks are given ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """What the blocks of a model are given beside their states.

    Attributes:
        blocks: of each, for texts of up to `length` tokens.
        side_by_side: whether texts may share a row; else each has one of its own.
    """

    blocks: tuple[Call, ...]
    length: int
    side_by_side: bool


_known: WeakKeyDictionary[Model, dict[tuple[object, ...], _Calls]] = WeakKeyDictionary()


def _calls_of(model: Model, longest: int) -> _Calls:
    """What blocks are given for texts of so many tokens. A model is asked once for a length, and watched: its blocks,
    called one by one, must give what they give in one piece.

    Raises:
        UnsupportedModel: if they do not.
    """
    length = min(-(-longest // _STEP) * _STEP, model.max_length)
    known = _known.setdefault(model, {})
    kind = (length, model.device, model.dtype, model.hf.config._attn_implementation)
    if kind not in known:
        ids = tuple((17 * i + 5) % model.vocab_size for i in range(length))
        recording = record(model, model.batch([ids]), check=False)
        ways = (_Calls(tuple(recording.calls), length, beside) for beside in (True, False))
        held = next((calls for calls in ways if _holds(calls, recording, ids)), None)
        if held is None:
            raise UnsupportedModel(
                f"the blocks of {model.name}, called one by one, come out otherwise than in one piece, so many edits "
                "cannot be measured in one pass; load it with attn_implementation='eager' if it has another"
            )
        known[kind] = held
    return known[kind]


def _holds(calls: _Calls, recording: Recording, ids: tuple[int, ...]) -> bool:
    """Whether the blocks give a recorded text back, as a trunk, and as a branch of another trunk beside it."""
    model, half = recording.model, len(ids) // 2
    passes = Passes(model, [Strand(ids, wanted=half), Strand(ids[: half + 1], ((half, ids[half:]),), half)], calls)
    pack = passes.pack([0, 1], width=2 * len(ids) + 1)
    flow, later = passes.enter(pack), range(len(ids) - half)
    for layer in range(model.n_layers):
        try:
            flow = passes.step(pack, layer, flow)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a foreign block raises, it cannot be called so
            return False
        found = flow.of(pack, [(0, None, half + i) for i in later] + [(1, 0, i) for i in later])
        if not same_states(found, recording.states[layer + 1][0, half:].repeat(2, 1)):
            return False
    return True
