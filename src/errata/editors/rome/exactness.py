"""Exactness of an edit in the weight's own dtype: it is applied temporarily and compared with the computed change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from errata.base.errors import EditMismatch
from errata.base.interrupt import unbroken
from errata.editors.rome import insert
from errata.editors.rome.key import Keys
from errata.edits.delta import RankOne
from errata.models.model import Model
from errata.models.weights import add_, matrix


def exactness(model: Model, parts: Sequence[tuple[RankOne, Keys, Tensor]]) -> dict[str, float]:
    """`residual` and `rounding` of changes (see `insert.constraint`), the larger of several parts.

    Args:
        model: the model without the edit.
        parts: change, anchor and δ for each weight.

    Raises:
        EditMismatch: if a weight's dtype cannot hold the change.
    """
    with ExitStack() as stack:
        weights = [stack.enter_context(_applied(model, change)) for change, _, _ in parts]
        each = [
            insert.constraint(old, new, change, anchor, delta)
            for (old, new), (change, anchor, delta) in zip(weights, parts, strict=True)
        ]
    return {name: max(part[name] for part in each) for name in each[0]}


@unbroken
def _applied(model: Model, change: RankOne) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight `[d_out, d_in]` without and with the change, which is applied inside the block.

    Like `Edit.applied`, byte for byte, without fingerprints: nobody else can touch the model meanwhile.
    """
    weight = matrix(model, change.weight).detach()
    old = weight.clone()
    try:
        add_(model, change.weight, change.matrix())
        if not torch.isfinite(weight).all():
            raise EditMismatch(
                f"the edit does not fit into {change.weight}: {weight.dtype} overflows. Load the model in a wider dtype"
            )
        yield old, weight
    finally:
        weight.copy_(old)
