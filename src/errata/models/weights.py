"""Weights as `[d_out, d_in]`, whichever way a module stores them.

`nn.Linear` keeps `[d_out, d_in]`, GPT-2's `Conv1D` its transpose. This is the one place that knows:
everything else sees a view in which an edit is ΔW = write ⊗ read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.base.errors import EditMismatch, UnsupportedModel
from errata.base.extras import needed
from errata.base.interrupt import unbroken

if TYPE_CHECKING:
    from errata.models.model import Model


def down_weight_name(model: Model, layer: int) -> str:
    """The name of a layer's down-projection weight, such as "transformer.h.3.mlp.c_proj.weight"."""
    return f"{model.path(('key', layer))}.weight"


def mlp_maps(model: Model, layer: int) -> tuple[str, ...]:
    """The names of all linear maps of a layer's MLP, the down-projection among them, in the order of its modules."""
    block, mlp, down = (model.path((part, layer)) for part in ("state", "mlp", "key"))
    root = mlp
    if mlp == down:
        # An MLP that adds the state itself (BLOOM, MPT) stands around its down-projection; a block without a module
        # for its MLP (OPT) has the maps in itself, attention's among them.
        around = down.removeprefix(f"{block}.").split(".")[:-1]
        root = f"{block}.{around[0]}" if around else block
    attention = f"{block}.{model.anatomy.attention_of(layer).split('.')[0]}"
    names = [f"{root}.{path}" if path else root for path, _ in model.hf.get_submodule(root).named_modules()]
    return tuple(
        name
        for name in names
        if not name.startswith(f"{attention}.") and linear_matrix(model.hf.get_submodule(name)) is not None
    )


def matrix(model: Model, name: str) -> Tensor:
    """A `[d_out, d_in]` view of a weight: writing into it, under `torch.no_grad()`, changes the model.

    The bias of a linear map is `[d_out, 1]`, a map of the constant 1.

    Raises:
        ConfigError: if the model has no parameter of that name.
        UnsupportedModel: if the parameter is not the weight of a linear map.
    """
    parameter = model.weight(name)
    owner, _, leaf = name.rpartition(".")
    view = linear_matrix(model.hf.get_submodule(owner)) if leaf in ("weight", "bias") else None
    if view is not None and leaf == "bias":
        view = parameter[:, None]
    if view is None:
        raise UnsupportedModel(
            f"{name} {tuple(parameter.shape)} is not the weight of a linear map: there is no matrix to edit. "
            f"Name one that is, such as {down_weight_name(model, 0)}"
        )
    return view


def add_(model: Model, name: str, delta: Tensor) -> None:
    """Add `delta` `[d_out, d_in]` to a weight in place, rounding once, to the weight's own dtype.

    Raises:
        ConfigError: if the model has no parameter of that name.
        UnsupportedModel: if the parameter is not the weight of a linear map.
        EditMismatch: if the shapes differ.
    """
    weight = matrix(model, name)
    if delta.shape != weight.shape:
        raise EditMismatch(f"{name} is {tuple(weight.shape)} as [d_out, d_in]; the change is {tuple(delta.shape)}")
    with torch.no_grad():
        weight.copy_(weight + delta.to(weight.device))  # promotes to the wider dtype before it rounds


def place(module: nn.Module) -> torch.device:
    """Where a module's weights are; if accelerate has offloaded them, where it brings them when they are needed."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            hook: Any = getattr(part, "_hf_hook", None)
            return torch.device(hook.execution_device) if weight.is_meta else weight.device
    raise UnsupportedModel(f"a {type(module).__name__} without weights is nowhere, so nothing can be brought to it")


@unbroken
def at_hand(module: nn.Module) -> Iterator[None]:
    """A module's own weights, not its children's, brought meanwhile from where accelerate has offloaded them."""
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
    """How far module(x) - module(0) is from view @ x, relative to its size; None if it takes no such x."""
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
