"""Activations that transformers writes out as many passes over memory, run as one while texts are written.

GPT-2's and GPT-J's GELU is eight such passes. The call that torch has for it differs by rounding, so no number that is
told comes from it: tokens are drawn with it, as they may be with any rounding. In 16 bits rounding is too coarse for
that, and the model's own is run. Whoever calls the model finds it as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation)


@contextlib.contextmanager
def fused(module: nn.Module) -> Iterator[None]:
    """A context in which the activations inside a module, such as a model, are one call each."""
    ours = [each for each in module.modules() if type(each) in _WRITTEN_OUT and "forward" not in vars(each)]
    try:
        for each in ours:
            vars(each)["forward"] = partial(_at_once, each)
        yield
    finally:
        for each in ours:
            vars(each).pop("forward", None)


def _at_once(activation: nn.Module, input: Tensor) -> Tensor:
    if input.dtype.itemsize < 4:
        return type(activation).forward(activation, input)
    return nn.functional.gelu(input, approximate="tanh")
