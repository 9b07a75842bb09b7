"""Forward passes with a different edit in every row of a batch, added on the fly; no weight changes.

A low-rank change, ΔW = write @ read, adds write @ (read @ x) to the output of its linear map for x. A hook does this
with different factors for every row or token, so that one forward pass evaluates many edited models.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.base.interrupt import unbroken
from errata.models.model import Model
from errata.models.modules import linear_matrix

Factors = tuple[Tensor, Tensor]  # write [d_out, k], read [k, d_in]


@dataclass(frozen=True)
class RowChanges:
    """Low-rank changes of linear maps, different in every row. Made by `row_changes`.

    Attributes:
        factors: by name of the weight, write `[e, d_out, k]` and read `[e, k, d_in]` of e changes, padded with zeros.
        rows: index of each row's change, `[r]`, or of each token's, `[r, n]`; -1: none.
    """

    factors: Mapping[str, Factors]
    rows: Tensor

    def of(self, rows: Tensor | slice) -> RowChanges:
        """The changes of selected rows, in any shape."""
        return RowChanges(self.factors, self.rows[rows])

    def within(self, prefix: str) -> RowChanges:
        """The changes of weights whose names begin with a prefix."""
        return RowChanges({name: each for name, each in self.factors.items() if name.startswith(prefix)}, self.rows)

    def adder(self, name: str) -> Callable[[Tensor], Tensor]:
        """Function from the input of a weight's linear map, `[..., d_in]`, rows in order, to what its changes add to
        the output, `[..., d_out]`.

        In float32 at least, on the device of the weight.
        """
        write, read = self.factors[name]
        owners = self.rows.to(read.device).flatten()

        @functools.cache
        def grouped(count: int) -> tuple[Tensor, ...]:
            own = owners.repeat_interleave(count // len(owners))
            changed = (own >= 0).nonzero()[:, 0]
            present, table, place = _grouped(own[changed])
            return read[present].mT, write[present].mT, changed, changed[table], place

        def added(entering: Tensor) -> Tensor:
            tokens = entering.reshape(-1, entering.shape[-1]).to(read)  # some blocks (OPT) flatten rows
            down, up, changed, table, place = grouped(len(tokens))
            own = (tokens[table] @ down @ up).flatten(0, 1)[place]
            whole = own.new_zeros(len(tokens), own.shape[-1]).index_copy(0, changed, own)
            return whole.view(*entering.shape[:-1], -1)

        return added


def _grouped(owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct owners `[e]`; a table of the items of each, `[e, m]`, filled up with any; and the place of each item
    in the flattened table, `[n]`."""
    present, owners, counts = owners.unique(return_inverse=True, return_counts=True)
    order, width = owners.argsort(stable=True), max(counts.tolist(), default=0)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(order)
    place[order] = owners[order] * width + torch.arange(len(order), device=order.device) - before
    table = order.new_zeros(len(present) * width)
    table[place[order]] = order
    return present, table.view(len(present), width), place


def row_changes(model: Model, changes: Sequence[Mapping[str, Factors]]) -> RowChanges:
    """The changes of each row, by names of weights, ready for `rowwise`; rows with the same object share it."""
    names = dict.fromkeys(name for each in changes for name in each)
    distinct = {id(each): each for each in changes if each}
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
    return RowChanges(factors, torch.tensor([place.get(id(each), -1) for each in changes]))


def can_be_rowwise(model: Model, name: str) -> bool:
    """True if a weight belongs to one linear map only, so that a hook on it has the effect of a change."""
    owner, _, leaf = name.rpartition(".")
    weight = model.weight(name)
    owners = sum(each is weight for _, each in model.hf.named_parameters(remove_duplicate=False))
    return leaf == "weight" and owners == 1 and linear_matrix(model.hf.get_submodule(owner)) is not None


@unbroken
def rowwise(model: Model, changes: RowChanges) -> Iterator[None]:
    """Context in which each row (or token) of every pass is computed with its own changes.

    Products with the factors are taken in float32 at least, and what they add is rounded once, to the model's dtype.
    """
    with contextlib.ExitStack() as stack:
        for name in changes.factors:
            module = model.hf.get_submodule(name.rpartition(".")[0])
            stack.callback(module.register_forward_hook(_adding(changes.adder(name))).remove)
        yield


def _adding(adder: Callable[[Tensor], Tensor]) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = adder(args[0])
        return (output.to(added.dtype) + added).to(output.dtype)

    return add
