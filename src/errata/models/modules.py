"""Weights of one module: their layout and device.

`nn.Linear` stores `[d_out, d_in]`, GPT-2's `Conv1D` its transpose. Only this file distinguishes them; all others use
the view `[d_out, d_in]` that `linear_matrix` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from errata.base.errors import UnsupportedModel
from errata.base.extras import needed
from errata.base.interrupt import unbroken


def place(module: nn.Module) -> torch.device:
    """Device of a module's weights; if accelerate has offloaded them, the device that it moves them to for use."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            hook: Any = getattr(part, "_hf_hook", None)
            return torch.device(hook.execution_device) if weight.is_meta else weight.device
    raise UnsupportedModel(f"a {type(module).__name__} without weights is nowhere, so nothing can be brought to it")


@unbroken
def at_hand(module: nn.Module) -> Iterator[None]:
    """Context in which a module's own weights, not its children's, are loaded if accelerate has offloaded them."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield
        return
    with needed("accelerate.utils", "peft").align_module_device(module):
        yield


def linear_matrix(module: nn.Module) -> Tensor | None:
    """The weight of a linear map as a `[d_out, d_in]` view; None for any other module.

    A module whose class does not settle the orientation is asked: it is called on a probe, and the view
    that gives the same answer is the right one.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if type(module) is nn.Linear:
        return weight
    if isinstance(module, nn.Embedding):
        return None
    with at_hand(module):
        real = module.get_parameter("weight")
        misfits = {transposed: _misfit(module, real.T if transposed else real) for transposed in (True, False)}
    fitting = {transposed: error for transposed, error in misfits.items() if error is not None and error < 0.1}
    if not fitting:
        return None
    return weight.T if min(fitting, key=fitting.__getitem__) else weight


@torch.no_grad()
def _misfit(module: nn.Module, view: Tensor) -> float | None:
    """Relative distance of module(x) - module(0) from view @ x; None if the module does not take such an x."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(view.shape[1], generator=generator).to(view.device, view.dtype)
    # forward, not __call__: a hook on the module is none of this measurement's business, accelerate's neither
    forward = getattr(module, "_old_forward", module.forward)
    try:
        answer = forward(torch.stack([probe, torch.zeros_like(probe)])[None])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not isinstance(answer, Tensor) or answer.shape != (1, 2, view.shape[0]):
        return None
    wanted = (view @ probe).double()
    answer = answer[0].double()
    rounding = 4 * torch.finfo(view.dtype).eps * answer[1].abs().max()  # a large bias swallows digits
    error = (answer[0] - answer[1] - wanted).abs().max() - rounding
    return float(error / wanted.abs().max().clamp_min(torch.finfo(view.dtype).tiny))
