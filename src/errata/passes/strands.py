"""Forward passes of many texts that share their beginnings, block by block.

A *strand* is a text's tokens, the trunk, and branches that leave it: other ways to go on after so many of its tokens.
Two targets after one prompt are a trunk and a branch, and the prompt is run once. Passes can be parted at any layer, so
that what lies below an edited layer is run once for all edits. Rows of like length share a batch, padded on the right,
where no token looks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.base.errors import UnsupportedModel
from errata.models.model import Model, Stream
from errata.passes.block_call import Past, run
from errata.passes.hooks import Patch, hooked_block
from errata.passes.replay import Recording, record, same_states
from errata.passes.rowwise import RowChanges, rowwise

# Tokens in a batch: on a CPU what a block makes of them should stay near it, a GPU wants large products.
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
# What a batch more costs, in tokens: the weights are read once more.
_NEW_BATCH = 24


class _Entered(Exception):
    """What enters the first block is known."""


@dataclass(frozen=True)
class Strand:
    """Tokens of one text.

    Attributes:
        trunk: its token ids, at least one.
        branches: for each, how many tokens of the trunk go before it, at least one, and its own token ids.
        wanted: the first token of the trunk whose state behind the last block is asked for.
    """

    trunk: tuple[int, ...]
    branches: tuple[tuple[int, tuple[int, ...]], ...] = ()
    wanted: int = 0

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The trunk and each branch with what goes before it."""
        return [self.trunk, *(self.trunk[:at] + own for at, own in self.branches)]


@dataclass(frozen=True)
class Flow:
    """States of a batch of strands between two blocks. Made by `Passes.enter`.

    Attributes:
        trunk: `[r, t, d_model]`, padded on the right.
        branches: `[g, n, d_model]` of each group of the batch.
        begin: which token of the trunk is the first; behind the last block those that nobody asks for are left out.
    """

    trunk: Tensor
    branches: tuple[Tensor, ...]
    begin: int = 0


@dataclass(frozen=True)
class Mlp:
    """What a layer's down-projection read and wrote as a flow went by.

    Attributes:
        keys: `[r, t, d_mlp]` of the trunk, then of each group.
        values: `[r, t, d_model]`, likewise.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Group:
    """Branches of one length that leave their trunks after as many tokens.

    Attributes:
        at: how many tokens go before.
        owners: for each, the row of its trunk in the batch, and which of its branches it is.
    """

    at: int
    owners: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StrandBatch:
    """Strands that are run together.

    Attributes:
        rows: which of all strands they are.
        groups: their branches.
    """

    rows: tuple[int, ...]
    groups: tuple[Group, ...]

    def state(self, flow: Flow, row: int, branch: int | None, at: int) -> Tensor:
        """The state `[d_model]` of a token of a row's trunk, or of one of its branches."""
        if branch is None:
            return flow.trunk[row, at - flow.begin]
        for group, states in zip(self.groups, flow.branches, strict=True):
            if (row, branch) in group.owners:
                return states[group.owners.index((row, branch)), at]
        raise KeyError((row, branch))


class Passes:
    """The passes of some strands through one model.

    Attributes:
        model: the model.
        strands: what is run.

    Args:
        check: whether to make sure that its blocks can be called alone; to be left out where `verify` will.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the blocks cannot be resumed.
    """

    def __init__(self, model: Model, strands: Sequence[Strand], check: bool = True):
        self.model = model
        self.strands = list(strands)
        for strand in self.strands:
            for text in strand.texts:
                model.require_room(text, None)
        # One text, of the longest, tells what blocks are given beside their states, and that they can be called alone.
        self._longest = max(range(len(self.strands)), key=lambda i: max(map(len, self.strands[i].texts)))
        text = max(self.strands[self._longest].texts, key=len)
        self._template: Recording = record(model, model.batch([text]), check=check)

    def batches(self, together: Sequence[object] | None = None) -> Iterator[StrandBatch]:
        """All strands, in batches of some hundred tokens (some thousand on a GPU), those of like length together.

        Args:
            together: for each strand, what it must have in common with others to be in a batch with them.
        """
        limit = _TOKENS_AT_ONCE.get(self.model.device.type, 16384)
        kinds: dict[object, list[int]] = defaultdict(list)
        for i in range(len(self.strands)):
            kinds[together[i] if together else None].append(i)
        for some in kinds.values():
            some.sort(key=lambda i: len(self.strands[i].trunk))
            for begin, end in _cuts([len(self.strands[i].trunk) for i in some], limit):
                yield self._batch(some[begin:end])

    def _batch(self, rows: Sequence[int]) -> StrandBatch:
        alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for row, i in enumerate(rows):
            for branch, (at, own) in enumerate(self.strands[i].branches):
                alike[at, len(own)].append((row, branch))
        return StrandBatch(tuple(rows), tuple(Group(at, tuple(owners)) for (at, _), owners in sorted(alike.items())))

    @torch.no_grad()
    def enter(self, batch: StrandBatch) -> Flow:
        """What enters the first block."""
        texts = [self.strands[i].trunk for i in batch.rows]
        branches = [
            [self.strands[batch.rows[row]].texts[branch + 1] for row, branch in group.owners] for group in batch.groups
        ]
        states = self._entering([*texts, *(text for some in branches for text in some)])
        width = max(map(len, texts))
        begin, cut = len(texts), []
        for group, some in zip(batch.groups, branches, strict=True):
            cut.append(states[begin : begin + len(some), group.at : len(some[0])])
            begin += len(some)
        return Flow(states[: len(texts), :width], tuple(cut))

    def _entering(self, texts: Sequence[Sequence[int]]) -> Tensor:
        found: list[Tensor] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            first = next(iter(inspect.signature(module.forward).parameters))
            found.append((args[0] if args else kwargs[first]).to(self.model.device, copy=True))
            raise _Entered

        handle = self.model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.model.forward(self.model.batch(texts), keep=1)
        except _Entered:
            pass
        finally:
            handle.remove()
        return found[0]

    def verify(self, batch: StrandBatch, flow: Flow) -> None:
        """Make sure that what left the last block of the unedited model is what a whole run has there.

        Raises:
            UnsupportedModel: if it is not.
        """
        if self._longest in batch.rows and len(self.strands[self._longest].trunk) == self._template.length:
            found = flow.trunk[batch.rows.index(self._longest), : self._template.length - flow.begin]
            if not same_states(found, self._template.states[self.model.n_layers][0, flow.begin :]):
                raise UnsupportedModel(
                    f"the blocks of {self.model.name}, called one by one, come out otherwise than in one piece, so "
                    "many edits cannot be measured in one pass; load it with attn_implementation='eager' if it has "
                    "another"
                )

    @torch.no_grad()
    def step(
        self,
        batch: StrandBatch,
        layer: int,
        flow: Flow,
        changes: RowChanges | None = None,
        patches: Mapping[Stream, Patch] | None = None,
    ) -> Flow:
        """What leaves block `layer`, if `flow` enters it.

        Args:
            changes: of the block's weights, an entry a row.
            patches: as of `hooked_block`; they see the trunk, then each group.
        """
        model, call = self.model, self._template.calls[layer]
        block = model.blocks[layer]
        here = changes.within(f"{model.anatomy.blocks}.{layer}.") if changes else None
        rows, width = flow.trunk.shape[:2]
        device = flow.trunk.device
        before = self._template.past(layer, torch.zeros(rows, dtype=torch.long, device=device), 0)
        # Of tokens whose state nobody asks for, the last block's keys and values are enough.
        begin = min(self.strands[i].wanted for i in batch.rows) if layer == model.n_layers - 1 else 0
        with contextlib.ExitStack() as stack:
            if here:
                stack.enter_context(rowwise(model, here))
            if begin:
                earlier, given = flow.trunk[:, :begin], call.at(0, rows, begin, device)
                before = before.after(lambda cache: run(block, earlier, given, cache))
            past = _Kept(before.keys_before, before.values_before)
            stack.enter_context(hooked_block(model, patches or {}, rows))
            trunk = run(block, flow.trunk[:, begin:], call.at(begin, rows, width - begin, device), past)
        branches = []
        for group, states in zip(batch.groups, flow.branches, strict=True):
            owners = torch.tensor([row for row, _ in group.owners])
            before = Past(past.keys, past.values).of(owners, group.at)
            given = call.at(group.at, len(owners), states.shape[1], states.device)
            own = rowwise(model, here.of(owners)) if here else contextlib.nullcontext()
            with own, hooked_block(model, patches or {}, len(owners)):
                branches.append(run(block, states, given, before))
        return Flow(trunk, tuple(branches), begin)

    def watched(self, batch: StrandBatch, layer: int, flow: Flow) -> tuple[Flow, Mlp]:
        """What leaves block `layer`, and what its down-projection read and wrote on the way."""
        seen: dict[str, list[Tensor]] = {"key": [], "value": []}

        def keeper(part: str) -> Patch:
            def keep(tensor: Tensor) -> None:
                seen[part].append(tensor.clone())  # some blocks go on to add into it in place

            return keep

        left = self.step(batch, layer, flow, patches={(part, layer): keeper(part) for part in seen})
        return left, Mlp(tuple(seen["key"]), tuple(seen["value"]))

    @torch.no_grad()
    def moved(self, batch: StrandBatch, layer: int, left: Flow, mlp: Mlp, changes: RowChanges) -> Flow:
        """What leaves block `layer` with changes of its down-projection alone, from what leaves it without."""
        [name] = changes.factors
        write, read = changes.by_row(name)

        def move(states: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
            new = values + (keys @ read[rows].mT.to(keys)) @ write[rows].mT.to(keys)
            before, after = (self.model.added(layer, each) for each in (values, new))
            return states + (after - before).to(states.device)

        owners = [torch.arange(len(batch.rows)), *(torch.tensor([row for row, _ in g.owners]) for g in batch.groups)]
        states = [left.trunk, *left.branches]
        trunk, *branches = map(move, states, mlp.keys, mlp.values, owners)
        return Flow(trunk, tuple(branches), left.begin)


class _Kept(Past):
    """A past that remembers the keys and values of all tokens so far."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(key_states, value_states)
        return self.keys, self.values


def _cuts(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Where to part rows of ascending lengths into batches, so that padding and new batches cost least together."""
    best: list[tuple[int, int]] = [(0, 0)]  # of the first so many rows: their cost, and where their last batch begins
    for end, width in enumerate(lengths, 1):
        costs: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            tokens = (end - begin) * width
            if tokens > limit and costs:
                break
            costs.append((best[begin][0] + tokens + _NEW_BATCH, begin))
        best.append(min(costs))
    cuts = []
    end = len(lengths)
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]
