"""Texts run through many edited models at once, each row of a batch with an edit of its own.

The weights are not touched where an edit is of low rank (`passes.rowwise`); another is on the model while its rows are
run. What lies below the lowest edited layer is run once for all that are run row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from errata.edits.edit import Edit
from errata.models.model import Model
from errata.passes.rowwise import Factors, RowChanges, can_be_rowwise, row_changes
from errata.passes.strands import Flow, Passes, Strand, StrandBatch


def run_edited(
    model: Model, strands: Sequence[Strand], variants: Sequence[Sequence[Edit | None]]
) -> Iterator[tuple[int, StrandBatch, Flow]]:
    """(which variant, rows, their states behind the last block), part by part until every variant has all strands.

    Args:
        model: as it stands; left as it was.
        strands: what is run, at least one.
        variants: for each, the edit that is on the model for each strand; None: the model as it stands.

    An edit that must be put on the model is on it until the next part is asked for. The states of one variant are the
    same, bit for bit, whichever others are asked for.

    Raises:
        FactError: if a text is too long for the model.
        UnsupportedModel: if the model's blocks cannot be resumed.
        EditMismatch: if an edit that is put on was made for other weights.
    """
    passes = Passes(model, strands)
    plans = [Plan.of(model, edits) for edits in variants]
    # Edits that are put on the model go by themselves, the rows of each together.
    sweeps = [[i for i, plan in enumerate(plans) if plan.changes is not None]]
    sweeps += [[i] for i, plan in enumerate(plans) if plan.changes is None]
    for sweep in filter(None, sweeps):
        chosen = [plans[i] for i in sweep]
        together = [id(edit) for edit in chosen[0].edits] if chosen[0].changes is None else None
        for batch in passes.batches(together):
            for i, part, flow in _runs(passes, batch, chosen):
                yield sweep[i], part, flow


@dataclass(frozen=True)
class Plan:
    """How the rows of a variant are run.

    Attributes:
        edits: for each row, the edit that is on.
        first: the lowest block that differs from the unedited model's; the number of blocks if none does, -1 if what
            enters the first block does.
        changes: the edits as changes of rows; None if they must be put on the model.
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


def _runs(passes: Passes, batch: StrandBatch, plans: Sequence[Plan]) -> Iterator[tuple[int, StrandBatch, Flow]]:
    """(which plan, rows, states behind the last block): of all rows, or of those of one edit after the other, which is
    on the model until the next is asked for."""
    model = passes.model
    firsts = {max(plan.first, 0) for plan in plans}
    entering: dict[int, Flow] = {}
    flow = passes.enter(batch)
    for layer in range(max(firsts) + 1):
        if layer in firsts:
            entering[layer] = flow
        if layer < max(firsts):
            flow = passes.step(batch, layer, flow)

    def above(part: StrandBatch, flow: Flow, first: int, changes: RowChanges | None = None) -> Flow:
        for layer in range(first, model.n_layers):
            flow = passes.step(part, layer, flow, changes)
        return flow

    for number, plan in enumerate(plans):
        first = max(plan.first, 0)
        if plan.changes is not None:
            changes = plan.changes.of(torch.tensor(batch.rows))
            yield number, batch, above(batch, entering[first], first, changes)
            continue
        for edit, rows in alike([plan.edits[i] for i in batch.rows]):
            with contextlib.nullcontext() if edit is None else edit.applied(model):
                flow, part = entering[first].of(batch, rows)
                if plan.first < 0:
                    flow = passes.enter(part)
                yield number, part, above(part, flow, first)


def alike(edits: Sequence[Edit | None]) -> list[tuple[Edit | None, list[int]]]:
    """Each edit, and the rows that have it."""
    groups: dict[int, list[int]] = {}
    for i, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(i)
    return [(edits[rows[0]], rows) for rows in groups.values()]
