"""Faster forward passes for text generation: the same sums, rounded differently.

GPT-2's and GPT-J's GELU is written out as eight passes over memory, and torch has one call for it. A linear map to many
numbers, such as a head over fifty thousand tokens, can take a CPU twice as long as in pieces. Both differ from the
model's own by rounding. They are used only to draw tokens, never for a reported number. In 16 bits rounding is too
coarse even for that, so the model's own functions run. The model is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from errata.base.interrupt import unbroken

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation)
# Outputs in a piece of a linear map, and of how many pieces it is worth it.
_PIECE, _PIECES = 1024, 8


@unbroken
def quick(module: nn.Module) -> Iterator[None]:
    """Context with faster functions inside a module, such as a model. No gradient flows through linear maps."""
    ours = {each: way for each in module.modules() if (way := _way(each)) and "forward" not in vars(each)}
    try:
        for each, way in ours.items():
            vars(each)["forward"] = partial(way, each)
        yield
    finally:
        for each in ours:
            vars(each).pop("forward", None)


def _way(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    if type(module) in _WRITTEN_OUT:
        return _at_once
    if type(module) is nn.Linear and module.weight.device.type == "cpu" and len(module.weight) >= _PIECE * _PIECES:
        return _in_pieces
    return None


def _at_once(activation: nn.Module, input: Tensor) -> Tensor:
    if input.dtype.itemsize < 4:
        return type(activation).forward(activation, input)
    return nn.functional.gelu(input, approximate="tanh")


@torch.no_grad()
def _in_pieces(linear: nn.Module, input: Tensor) -> Tensor:
    assert isinstance(linear, nn.Linear)
    if input.dtype.itemsize < 4:
        return nn.Linear.forward(linear, input)
    rows = input.reshape(-1, input.shape[-1])
    output = rows.new_empty(len(rows), len(linear.weight))
    for weight, piece in zip(linear.weight.split(_PIECE), output.split(_PIECE, 1), strict=True):
        torch.mm(rows, weight.T, out=piece)
    if linear.bias is not None:
        output += linear.bias
    return output.view(*input.shape[:-1], -1)
