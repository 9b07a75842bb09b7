"""Another edit in every row of a batch, without touching a weight.

A change of low rank, ΔW = write @ read, adds write @ (read @ x) to what its linear map makes of x. A hook does so with
factors of its own for every row, so that one forward pass is a pass of as many edited models as it has rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.models.model import Model
from errata.models.weights import linear_matrix

Factors = tuple[Tensor, Tensor]  # write [d_out, k], read [k, d_in]


@dataclass(frozen=True)
class RowChanges:
    """Changes of linear maps, others in every row. Made by `row_changes`.

    Attributes:
        factors: by name of the weight, write `[e, d_out, k]` and read `[e, k, d_in]` of e changes; of those of lower
            rank, or none, the rest is zero.
        rows: `[r]`, which of the changes each row has.
    """

    factors: Mapping[str, Factors]
    rows: Tensor

    def of(self, rows: Tensor | slice) -> RowChanges:
        """Those of some rows."""
        return RowChanges(self.factors, self.rows[rows])

    def within(self, prefix: str) -> RowChanges:
        """Those of weights whose names begin so."""
        return RowChanges({name: each for name, each in self.factors.items() if name.startswith(prefix)}, self.rows)

    def by_row(self, name: str) -> Factors:
        """Write `[r, d_out, k]` and read `[r, k, d_in]` of a weight, each row with a copy of its own."""
        write, read = self.factors[name]
        rows = self.rows.to(write.device)
        return write[rows], read[rows]


def row_changes(model: Model, changes: Sequence[Mapping[str, Factors]]) -> RowChanges:
    """The changes of each row, by names of weights, ready for `rowwise`; rows with the same object share it."""
    names = dict.fromkeys(name for each in changes for name in each)
    distinct = {id(each): each for each in changes}
    place = {key: i for i, key in enumerate(distinct)}
    factors: dict[str, Factors] = {}
    for name in names:
        weight = model.weight(name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        rank = max(each[name][0].shape[1] for each in distinct.values() if name in each)
        d_out, d_in = next((len(each[name][0]), each[name][1].shape[1]) for each in distinct.values() if name in each)
        write = torch.zeros(len(distinct), d_out, rank, dtype=wide)
        read = torch.zeros(len(distinct), rank, d_in, dtype=wide)
        for i, each in enumerate(distinct.values()):
            if name in each:
                own = each[name][0].shape[1]
                write[i, :, :own], read[i, :own] = each[name]
        factors[name] = write.to(weight.device), read.to(weight.device)
    return RowChanges(factors, torch.tensor([place[id(each)] for each in changes]))


def can_be_rowwise(model: Model, name: str) -> bool:
    """Whether a weight belongs to one linear map alone, so that a hook there is all that a change of it does."""
    owner, _, leaf = name.rpartition(".")
    weight = model.weight(name)
    owners = sum(each is weight for _, each in model.hf.named_parameters(remove_duplicate=False))
    return leaf == "weight" and owners == 1 and linear_matrix(model.hf.get_submodule(owner)) is not None


@contextlib.contextmanager
def rowwise(model: Model, changes: RowChanges) -> Iterator[None]:
    """Inside the block, row b of every pass is one of the model with the b-th changes on.

    Products with the factors are taken in float32 at least, and what they add is rounded once, to the model's dtype.
    """
    with contextlib.ExitStack() as stack:
        for name in changes.factors:
            module = model.hf.get_submodule(name.rpartition(".")[0])
            stack.callback(module.register_forward_hook(_adding(*changes.by_row(name))).remove)
        yield


def _adding(write: Tensor, read: Tensor) -> Any:
    rows, down, up = len(read), read.mT, write.mT  # [r, d_in, k], [r, k, d_out]

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        entering = args[0].reshape(rows, -1, args[0].shape[-1])  # some blocks (OPT) flatten rows and tokens
        added = (entering.to(down.dtype) @ down) @ up
        return (output.to(down.dtype) + added.reshape(output.shape)).to(output.dtype)

    return add
