"""Forward passes of texts through many edited models at once, each text with its own edit.

A low-rank edit is added on the fly and changes no weight (`passes.rowwise`); any other edit is applied to the model
while its texts run. Blocks below the lowest edited layer run once for all low-rank edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes.packed import PackedPasses
from errata.passes.packing import PackedBatch, PackedSequence
from errata.passes.rowwise import Factors, RowChanges, can_be_rowwise, row_changes


def run_edited(
    model: Model, sequences: Sequence[PackedSequence], variants: Sequence[Sequence[Edit | None]]
) -> Generator[tuple[int, PackedBatch, Tensor], None, None]:
    """Last hidden states of every variant: (which variant, batch, its hidden states), batch by batch.

    Args:
        model: the model in its current state; left unchanged.
        sequences: the sequences to run, at least one.
        variants: for each variant, the edit applied for each sequence; None: the model in its current state.

    An edit that must be applied to the model stays until the next batch is asked for, or the generator is closed. The
    hidden states of one variant are the same, bit for bit, whichever others are asked for.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the model's blocks cannot be called one by one.
        EditMismatch: if an edit that is put on was made for other weights.
    """
    plans = [Plan.of(model, edits) for edits in variants]
    passes = PackedPasses(model, sequences)
    by_row = {i: plan for i, plan in enumerate(plans) if plan.changes is not None}
    if by_row:
        yield from _row_by_row(passes, by_row)
    for i, plan in enumerate(plans):
        if plan.changes is None:
            for batch, hidden in _put_on(passes, plan):
                yield i, batch, hidden


@dataclass(frozen=True)
class Plan:
    """The way to run the texts of a variant.

    Attributes:
        edits: for each text, its edit.
        first: the lowest block that differs from the unedited model's; the number of blocks if none does, -1 if already
            the first block's input does.
        changes: the edits as low-rank changes for each text; None if they must be applied to the model.
    """

    edits: tuple[Edit | None, ...]
    first: int
    changes: RowChanges | None

    @classmethod
    def of(cls, model: Model, edits: Sequence[Edit | None]) -> Plan:
        """Row by row, if every edit is of low rank and acts through linear maps of the blocks alone."""
        distinct = {id(edit): edit for edit in edits if edit is not None}
        deltas = [delta for edit in distinct.values() for delta in edit.deltas]
        names = {delta.weight for delta in deltas}
        first = min((_layer_of(model, name) for name in names), default=model.n_layers)
        rowwise = all(hasattr(delta, "factors") for delta in deltas)
        if not rowwise or first < 0 or not all(can_be_rowwise(model, name) for name in names):
            return cls(tuple(edits), first, None)
        factors = {key: _factors(edit) for key, edit in distinct.items()}
        nothing: Mapping[str, Factors] = {}
        changes = row_changes(model, [nothing if edit is None else factors[id(edit)] for edit in edits])
        return cls(tuple(edits), first, changes)

    def moves(self, model: Model) -> bool:
        """True if the lowest edited block differs in its down-projection alone, in a dtype that can add it."""
        here = self.changes.within(f"{model.anatomy.blocks}.{self.first}.") if self.changes else None
        own = down_weight_name(model, self.first)
        return here is not None and list(here.factors) == [own] and model.dtype.itemsize >= 4


def _layer_of(model: Model, name: str) -> int:
    """The block that a weight belongs to; -1 if none, for then it may act on what enters the first."""
    head = f"{model.anatomy.blocks}."
    return int(name.removeprefix(head).split(".")[0]) if name.startswith(head) else -1


def _factors(edit: Edit) -> dict[str, Factors]:
    """Write and read by weight; of several changes of one weight, side by side."""
    found: dict[str, Factors] = {}
    for delta in edit.deltas:
        write, read = delta.factors()  # type: ignore[union-attr]  # no dense one comes here
        if delta.weight in found:
            write, read = (
                torch.cat([found[delta.weight][0], write], 1),
                torch.cat([found[delta.weight][1], read]),
            )
        found[delta.weight] = write, read
    return found


def _row_by_row(passes: PackedPasses, plans: Mapping[int, Plan]) -> Iterator[tuple[int, PackedBatch, Tensor]]:
    """Each block runs on all batches before the next block, so that its weights stay in the cache."""
    batches = list(passes.batches())
    changes = {
        i: [plan.changes.of(torch.tensor(p.members)) for p in batches] for i, plan in plans.items() if plan.changes
    }
    unedited = [passes.enter(batch) for batch in batches]
    edited: dict[int, list[Tensor]] = {}
    for layer in range(passes.model.n_layers):
        edited |= {i: list(unedited) for i, plan in plans.items() if plan.first == layer}
        wanted = any(plan.first > layer for plan in plans.values())
        # Of plans that begin here by a down-projection alone, all else that the block does is as unedited.
        moved = [i for i, plan in plans.items() if plan.first == layer and plan.moves(passes.model)]
        for place, batch in enumerate(batches):
            for i, own in edited.items():
                if i not in moved:
                    own[place] = passes.step(batch, layer, own[place], changes[i][place])
            if moved:
                unedited[place], mlp = passes.watched(batch, layer, unedited[place])
                for i in moved:
                    here = changes[i][place].within(f"{passes.model.anatomy.blocks}.{layer}.")
                    edited[i][place] = passes.moved(batch, layer, unedited[place], mlp, here)
            elif wanted:
                unedited[place] = passes.step(batch, layer, unedited[place])
    for i in plans:
        for batch, hidden in zip(batches, edited.get(i, unedited), strict=True):
            for found in _apart_if_broken(passes, batch, hidden, plans[i].changes):
                yield i, *found


def _apart_if_broken(
    passes: PackedPasses, batch: PackedBatch, hidden: Tensor, changes: RowChanges | None = None
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """The batch; or, if a hidden state is not finite, its sequences again with a row for each text, since one text may
    have broken those beside it. `changes` are of all sequences."""
    if batch.in_order or hidden.isfinite().all():
        yield batch, hidden
        return
    for alone in passes.apart(batch.members):
        hidden = passes.enter(alone)
        for layer in range(passes.model.n_layers):
            hidden = passes.step(alone, layer, hidden, changes and changes.of(torch.tensor(alone.members)))
        yield alone, hidden


def _put_on(passes: PackedPasses, plan: Plan) -> Iterator[tuple[PackedBatch, Tensor]]:
    """The rows of each edit, with the edit on the model until the next are asked for."""
    model = passes.model
    batches = list(passes.batches([id(edit) for edit in plan.edits]))
    for edit, places in alike([plan.edits[batch.members[0]] for batch in batches]):
        some = [batches[place] for place in places]
        first = max(plan.first, 0)
        with contextlib.ExitStack() as stack:
            if edit and plan.first < 0:
                stack.enter_context(edit.applied(model))
            states = [passes.enter(batch) for batch in some]
            for layer in range(model.n_layers):
                if edit and layer == first and plan.first >= 0:
                    stack.enter_context(edit.applied(model))
                states = [passes.step(batch, layer, hidden) for batch, hidden in zip(some, states, strict=True)]
            for batch, hidden in zip(some, states, strict=True):
                yield from _apart_if_broken(passes, batch, hidden)


def alike(edits: Sequence[Edit | None]) -> list[tuple[Edit | None, list[int]]]:
    """The distinct edits, each with its rows."""
    groups: dict[int, list[int]] = {}
    for i, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(i)
    return [(edits[rows[0]], rows) for rows in groups.values()]
