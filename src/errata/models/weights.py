"""A model's weights by name, as `[d_out, d_in]` views in which an edit is ΔW = write ⊗ read."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.base.errors import EditMismatch, UnsupportedModel
from errata.models.model import Model
from errata.models.modules import linear_matrix


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
