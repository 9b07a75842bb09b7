"""Texts run through many edited models at once, each with an edit of its own.

The weights are not touched where an edit is of low rank (`passes.rowwise`); another is on the model while its texts are
run. What lies below the lowest edited layer is run once for all edits of low rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes.packing import Pack, Strand
from errata.passes.rowwise import Factors, RowChanges, can_be_rowwise, row_changes
from errata.passes.strands import Flow, Passes


def run_edited(
    model: Model, strands: Sequence[Strand], variants: Sequence[Sequence[Edit | None]]
) -> Generator[tuple[int, Pack, Flow], None, None]:
    """(which variant, strands, their states behind the last block), pack by pack until every variant has all strands.

    Args:
        model: as it stands; left as it was.
        strands: what is run, at least one.
        variants: for each, the edit that is on the model for each strand; None: the model as it stands.

    An edit that must be put on the model is on it until the next pack is asked for, or the generator closed. The states
    of one variant are the same, bit for bit, whichever others are asked for.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the model's blocks cannot be called one by one.
        EditMismatch: if an edit that is put on was made for other weights.
    """
    plans = [Plan.of(model, edits) for edits in variants]
    passes = Passes(model, strands)
    by_row = {i: plan for i, plan in enumerate(plans) if plan.changes is not None}
    if by_row:
        yield from _row_by_row(passes, by_row)
    for i, plan in enumerate(plans):
        if plan.changes is None:
            for part, flow in _put_on(passes, plan):
                yield i, part, flow


@dataclass(frozen=True)
class Plan:
    """How the texts of a variant are run.

    Attributes:
        edits: for each text, the edit that is on.
        first: the lowest block that differs from the unedited model's; the number of blocks if none does, -1 if what
            enters the first block does.
        changes: the edits as changes of each text; None if they must be put on the model.
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
        """Whether the lowest edited block differs in its down-projection alone, with digits enough to add that on."""
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


def _row_by_row(passes: Passes, plans: Mapping[int, Plan]) -> Iterator[tuple[int, Pack, Flow]]:
    """All packs go through a block before any goes on to the next, for its weights are then at hand."""
    packs = list(passes.packs())
    changes = {
        i: [plan.changes.of(torch.tensor(p.members)) for p in packs] for i, plan in plans.items() if plan.changes
    }
    unedited = [passes.enter(pack) for pack in packs]
    edited: dict[int, list[Flow]] = {}
    for layer in range(passes.model.n_layers):
        edited |= {i: list(unedited) for i, plan in plans.items() if plan.first == layer}
        wanted = any(plan.first > layer for plan in plans.values())
        # Of plans that begin here by a down-projection alone, all else that the block does is as unedited.
        moved = [i for i, plan in plans.items() if plan.first == layer and plan.moves(passes.model)]
        for place, pack in enumerate(packs):
            for i, flows in edited.items():
                if i not in moved:
                    flows[place] = passes.step(pack, layer, flows[place], changes[i][place])
            if moved:
                unedited[place], mlp = passes.watched(pack, layer, unedited[place])
                for i in moved:
                    own = changes[i][place].within(f"{passes.model.anatomy.blocks}.{layer}.")
                    edited[i][place] = passes.moved(pack, layer, unedited[place], mlp, own)
            elif wanted:
                unedited[place] = passes.step(pack, layer, unedited[place])
    for i in plans:
        for pack, flow in zip(packs, edited.get(i, unedited), strict=True):
            for found in _apart_if_broken(passes, pack, flow, plans[i].changes):
                yield i, *found


def _apart_if_broken(
    passes: Passes, pack: Pack, flow: Flow, changes: RowChanges | None = None
) -> Iterator[tuple[Pack, Flow]]:
    """Where a state is no number, a text may have broken those beside it: then each is run in a row of its own, through
    the model as it stands, with changes that each of all strands has."""
    if pack.in_order or flow.states.isfinite().all():
        yield pack, flow
        return
    for alone in passes.apart(pack.members):
        flow = passes.enter(alone)
        for layer in range(passes.model.n_layers):
            flow = passes.step(alone, layer, flow, changes and changes.of(torch.tensor(alone.members)))
        yield alone, flow


def _put_on(passes: Passes, plan: Plan) -> Iterator[tuple[Pack, Flow]]:
    """The rows of each edit, with the edit on the model until the next are asked for."""
    model = passes.model
    packs = list(passes.packs([id(edit) for edit in plan.edits]))
    for edit, places in alike([plan.edits[pack.members[0]] for pack in packs]):
        some = [packs[place] for place in places]
        first = max(plan.first, 0)
        with contextlib.ExitStack() as stack:
            if edit and plan.first < 0:
                stack.enter_context(edit.applied(model))
            flows = [passes.enter(pack) for pack in some]
            for layer in range(model.n_layers):
                if edit and layer == first and plan.first >= 0:
                    stack.enter_context(edit.applied(model))
                flows = [passes.step(pack, layer, flow) for pack, flow in zip(some, flows, strict=True)]
            for pack, flow in zip(some, flows, strict=True):
                yield from _apart_if_broken(passes, pack, flow)


def alike(edits: Sequence[Edit | None]) -> list[tuple[Edit | None, list[int]]]:
    """Each edit, and the rows that have it."""
    groups: dict[int, list[int]] = {}
    for i, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(i)
    return [(edits[rows[0]], rows) for rows in groups.values()]
