"""Inputs and outputs of linear maps of a model, with gradients to the outputs.

The gradient of a loss with respect to a map's weight is a sum over tokens, Σ δ ⊗ u: u is the map's input, δ the
gradient with respect to its output. Neither needs the gradient of the weight itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.base.interrupt import unbroken
from errata.models.model import Model


@dataclass
class Tap:
    """Input and output of a map in the last pass.

    Attributes:
        entering: `[..., d_in]`, detached.
        leaving: `[..., d_out]`.
        added: zeros that were added to what leaves; where gradients are on, they have its gradient.
    """

    entering: Tensor
    leaving: Tensor
    added: Tensor


@unbroken
def tapped(model: Model, maps: Sequence[str]) -> Iterator[dict[str, Tap]]:
    """Context in which passes record the inputs and outputs of these maps, by name.

    Of a pass with gradients, what leaves each map depends on `Tap.added`.
    """
    found: dict[str, Tap] = {}

    def tap(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            added = torch.zeros_like(output, requires_grad=torch.is_grad_enabled())
            found[name] = Tap(args[0].detach(), output.detach(), added)
            return output + added if torch.is_grad_enabled() else None

        return note

    with contextlib.ExitStack() as stack:
        for name in maps:
            stack.callback(model.hf.get_submodule(name).register_forward_hook(tap(name)).remove)
        yield found
