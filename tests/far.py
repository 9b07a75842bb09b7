"""A second device for machines that have none: tensors that are in the CPU's memory and say that they are not.

An operation on tensors of both devices fails, as it does between a CPU and a GPU, except where torch allows it: copies,
single numbers, indexes on the CPU, and lengths of packed sequences, which are always there. Importing this registers
the device with torch, before anything is differentiated and for the whole process: tests do it in a process of their
own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
FAR = torch.device("far", 0)

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_PACKED = _aten._pack_padded_sequence.default
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


def _lstm_cell(given: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of an LSTM, which CPUs have in parts only and other devices are asked for in one."""
    gates = given + hidden + sum(biases)
    take, keep, new, give = gates.chunk(4, 1)
    cell = take.sigmoid() * new.tanh() + keep.sigmoid() * cell
    return give.sigmoid() * cell.tanh(), cell, gates


_STAND_INS = {_aten._thnn_fused_lstm_cell.default: _lstm_cell}


class Far(Tensor):
    """A tensor on the far device, around the near one that holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Tensor:
        return nn.Parameter(data, requires_grad)  # accelerate makes a parameter by the class of the one before

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


def _far(near: Tensor) -> Far:
    far = Tensor._make_wrapper_subclass(
        Far, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
    )
    far.near = near
    return far


def _run(op: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    strict = tensors
    if op in _INDEXED and isinstance(args[0], Far):
        strict = [args[0], *(each for each in tree_leaves(args[1:]) if isinstance(each, Far))]
    if op is _PACKED:
        strict = []  # lengths are on the CPU, whatever the sequences are on
    places = {each.device for each in strict if each.dim()}
    if len(places) > 1 and op not in _COPIES:
        raise RuntimeError(f"{op} is given tensors on different devices: {places}")
    any_far = any(isinstance(each, Far) for each in tensors)
    wanted = torch.device(kwargs.get("device") or (FAR if any_far else "cpu"))
    if kwargs.get("device") is not None and wanted.type == FAR.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    near_args, near_kwargs = tree_map_only(Far, lambda far: far.near, (args, kwargs))
    output = _STAND_INS.get(op, op)(*near_args, **near_kwargs)
    if op is _aten.copy_.default:
        return args[0]
    if op is _PACKED and any_far:
        return _far(output[0]), output[1]
    if wanted.type == FAR.type:
        output = tree_map_only(Tensor, _far, output)
    return return_and_correct_aliasing(op, args, kwargs, output) if any_far and op not in _COPIES else output


# What torch does without asking the class: factories, and copies from the CPU.
_LIBRARY = torch.library.Library("aten", "IMPL")
for _op in (_aten.empty.memory_format, _aten.empty_strided.default, _aten.copy_.default):
    _LIBRARY.impl(_op, lambda *args, op=_op, **kwargs: _run(op, args, kwargs), "PrivateUse1")
