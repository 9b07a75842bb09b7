"""Forward passes of packed texts (`packing`), block by block.

Each token sees only its own text. Passes can be split at any layer, so that the layers below an edited one run once for
all edits.
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

from errata.base import budgets
from errata.base.interrupt import attached
from errata.models.model import Model
from errata.passes.block_call import Call, Earlier, Past
from errata.passes.hooks import Patch
from errata.passes.packing import (
    WIDTH,
    PackedBatch,
    PackedSequence,
    bins,
    one_a_row,
    shares,
    side_by_side,
)
from errata.passes.replay import Recording, record
from errata.passes.rowwise import RowChanges
from errata.passes.token_batch import Mismatch, TokenBatch, mismatch, same_states

# Arguments of blocks are recorded on texts of multiples of so many tokens, and those of so many lengths are kept.
_STEP, _LENGTHS = 32, 8
# Texts lie side by side in rows of at most twice so many tokens: in longer ones there is little to gain.
_BESIDE = 128


class _Entered(Exception):
    """The first block has its input."""


@dataclass(frozen=True)
class Mlp:
    """Input `[b, w, d_mlp]` and output `[b, w, d_model]` of a layer's down-projection in one pass."""

    keys: Tensor
    values: Tensor


class PackedPasses:
    """Forward passes of packed sequences through one model.

    Attributes:
        model: the model.
        sequences: the sequences to run.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the blocks cannot be called one by one.
    """

    def __init__(self, model: Model, sequences: Sequence[PackedSequence], calls: _Calls | None = None):
        self.model = model
        self.sequences = list(sequences)
        for sequence in self.sequences:
            for text in sequence.texts:
                model.require_room(text, None)
        self._calls = calls or _calls_of(model, max(sequence.length for sequence in self.sequences))
        self._batches: WeakKeyDictionary[PackedBatch, TokenBatch] = WeakKeyDictionary()

    def batches(self, together: Sequence[object] | None = None) -> Iterator[PackedBatch]:
        """All sequences in batches of some hundred tokens (some thousand on a GPU).

        Args:
            together: for each sequence, what it must have in common with others to be in a batch with them.
        """
        kinds: dict[tuple[object, bool], list[int]] = defaultdict(list)
        for i, sequence in enumerate(self.sequences):
            kinds[together[i] if together else None, sequence.size <= self._calls.widest].append(i)
        for (_, narrow), some in kinds.items():
            yield from self._beside(some) if narrow else self.apart(some)

    def _beside(self, members: Sequence[int]) -> Iterator[PackedBatch]:
        sizes = [self.sequences[i].size for i in members]
        for share in shares(sizes, budgets.tokens(self.model.device)):
            some = bins([sizes[place] for place in share], WIDTH, self._calls.widest)
            chosen = [members[place] for place in share]
            yield side_by_side(chosen, [self.sequences[i] for i in chosen], some)

    def apart(self, members: Sequence[int]) -> Iterator[PackedBatch]:
        """Some of the sequences, with one row for each text."""
        lengths, rows = zip(*((self.sequences[i].length, len(self.sequences[i].texts)) for i in members), strict=True)
        for share in budgets.padded_groups(lengths, budgets.tokens(self.model.device), rows):
            chosen = [members[place] for place in share]
            yield one_a_row(chosen, [self.sequences[i] for i in chosen])

    @torch.no_grad()
    def enter(self, batch: PackedBatch) -> Tensor:
        """Input of the first block, `[b, w, d_model]`."""
        states = _entering(self.model, [text for i in batch.members for text in self.sequences[i].texts])
        return states[batch.texts.to(states.device), batch.offsets.to(states.device)]

    @torch.no_grad()
    def step(
        self,
        batch: PackedBatch,
        layer: int,
        states: Tensor,
        changes: RowChanges | None = None,
        patches: Mapping[str, Patch] | None = None,
    ) -> Tensor:
        """Output of block `layer`; for the last block, from the first wanted position on.

        Args:
            batch: the batch to run.
            layer: the block.
            states: hidden states that enter it, `[b, w, d_model]`.
            changes: of the model's weights, an entry for each sequence of the batch.
            patches: as of `TokenBatch.step`.
        """
        model = self.model
        here = changes.within(f"{model.anatomy.blocks}.{layer}.").of(_owners(batch)) if changes else None
        # Of tokens whose state nobody asks for, the last block's keys and values are enough.
        begin = batch.begin if layer == model.n_layers - 1 else 0
        return self.tokens(batch).step(layer, states, states.shape[1] - begin, patches, here)

    def tokens(self, batch: PackedBatch) -> TokenBatch:
        """The batch as blocks are called on it."""
        if batch not in self._batches:
            device, calls = self.model.device, self._calls.blocks
            none = torch.empty(len(batch.rows), 0, self.model.d_model, dtype=self.model.dtype, device=device)
            layout = None if batch.in_order else (batch.offsets.to(device), batch.sees.to(device))
            self._batches[batch] = TokenBatch(
                self.model, calls, lambda layer: Earlier(none) if calls[layer].whole else Past.none(), layout=layout
            )
        return self._batches[batch]

    def watched(self, batch: PackedBatch, layer: int, states: Tensor) -> tuple[Tensor, Mlp]:
        """Output of block `layer`, with the input and output of its down-projection."""
        seen: dict[str, Tensor] = {}

        def keeper(part: str) -> Patch:
            def keep(tensor: Tensor) -> None:
                seen[part] = tensor.clone()  # some blocks go on to add into it in place

            return keep

        left = self.step(batch, layer, states, patches={part: keeper(part) for part in ("key", "value")})
        return left, Mlp(seen["key"], seen["value"])

    @torch.no_grad()
    def moved(self, batch: PackedBatch, layer: int, left: Tensor, mlp: Mlp, changes: RowChanges) -> Tensor:
        """Output of block `layer` with changes of its down-projection only, computed from its unchanged output."""
        [name] = changes.factors
        added = changes.of(_owners(batch)[:, -left.shape[1] :]).adder(name)(mlp.keys)
        before, after = (self.model.added(layer, each) for each in (mlp.values, mlp.values + added.to(mlp.values)))
        return left + (after - before).to(left.device)


def _owners(batch: PackedBatch) -> Tensor:
    """Index in the batch of each position's sequence, `[b, w]`; any where no token is."""
    return batch.owners.clamp(min=0)


@torch.no_grad()
def _entering(model: Model, texts: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states that enter the first block, `[texts, tokens, d_model]`."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
    """Recorded arguments of a model's blocks.

    Attributes:
        blocks: of each, for texts of up to so many tokens as were asked for.
        widest: the widest row in which texts may lie side by side; 0 where each must have a row of its own.
    """

    blocks: tuple[Call, ...]
    widest: int = 0


_known: WeakKeyDictionary[Model, dict[tuple[object, ...], _Calls]] = WeakKeyDictionary()


def _calls_of(model: Model, longest: int) -> _Calls:
    """Arguments of blocks for texts of so many tokens, recorded once for a length, and checked.

    Raises:
        UnsupportedModel: if blocks that are called one by one come out otherwise than in one piece.
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
    passes = PackedPasses(model, [PackedSequence(ids, ((length - 1, ids[-1:]),), length // 2)], calls)
    for batch in passes.apart([0]):
        if wrong := _mismatch(passes, batch, recording):
            raise wrong.refusal(model, "called on its own", "cannot be measured with many edits in one pass")
    if not all(bool(each.isfinite().all()) for each in recording.states.values()):
        return calls  # a model that gives no numbers now tells nothing
    if _mismatch(*_trial(model, ids[:_BESIDE], calls), recording) is None:
        calls = _Calls(calls.blocks, 2 * min(length, _BESIDE))
    known[kind] = calls
    if len(known) > _LENGTHS:
        known.pop(next(iter(known)))
    return calls


def _trial(model: Model, ids: tuple[int, ...], calls: _Calls) -> tuple[PackedPasses, PackedBatch]:
    """A text three times: with its first and last token at the ends of a row as wide as any may be; with a continuation
    between these; and in another row, at other positions."""
    half, last = len(ids) // 2, len(ids) - 1
    sequences = [
        PackedSequence(ids[:half], ((half, ids[half:]),)),
        PackedSequence(ids, wanted=last),
        PackedSequence(ids, wanted=half),
    ]
    return PackedPasses(model, sequences, calls), side_by_side(range(3), sequences, [[0, 1], [2]])


def _mismatch(passes: PackedPasses, batch: PackedBatch, recording: Recording) -> Mismatch | None:
    """The first block that does not give back the recorded hidden states of the one text that is in the batch."""
    model, held = passes.model, batch.owners >= 0
    last, wanted = model.n_layers - 1, torch.tensor([[token.wanted for token in row] for row in batch.rows])

    def states(layer: int) -> Tensor:
        return recording.states[layer][0, batch.offsets]

    if not same_states(passes.enter(batch)[held], states(0)[held]):
        return Mismatch(0, "it is given other hidden states")
    tokens = passes.tokens(batch)
    return mismatch(tokens.step, range(last + 1), states, held) or mismatch(
        lambda layer, entering: passes.step(batch, layer, entering), [last], states, wanted
    )
