"""The trained parameters, and a block run with other tensors in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.base.errors import UnsupportedModel
from errata.editors.fine_tuning.config import FineTuningConfig
from errata.models.model import Model
from errata.models.modules import linear_matrix
from errata.passes.block_call import Earlier, run
from errata.passes.replay import record

T = TypeVar("T")


def trained(model: Model, config: FineTuningConfig) -> tuple[str, ...]:
    """Names within their block of the parameters that are trained: weights, and biases where these are too.

    Raises:
        ConfigError: if there is no such layer.
        UnsupportedModel: if accelerate has offloaded one, or no linear map makes queries, keys and values.
    """
    layer = config.layer
    assert layer is not None  # settled
    model.path(("state", layer))  # raises for a layer that is not there
    maps = (model.anatomy.down,) if config.part == "mlp" else _before_attention(model, layer)
    block = model.blocks[layer]
    names = [f"{path}.weight" for path in maps]
    if config.bias:
        names += [f"{path}.bias" for path in maps if getattr(block.get_submodule(path), "bias", None) is not None]
    for name in names:
        model.weight(full_name(model, layer, name))  # raises if it is not at hand
    return tuple(names)


def full_name(model: Model, layer: int, name: str) -> str:
    """The name in the model of a parameter with this name in its block."""
    return f"{model.anatomy.blocks}.{layer}.{name}"


@torch.no_grad()
def _before_attention(model: Model, layer: int) -> list[str]:
    """Paths within the block of attention's linear maps but for its output projection, found by measurement.

    Of a token that sees itself alone, queries change nothing; keys and values are remembered; what changes the block's
    output, but nothing that is remembered, comes after attention.
    """
    block, root = model.blocks[layer], model.anatomy.attention_of(layer).split(".")[0]
    inside = {path: module for path, module in block.named_modules() if path.split(".")[0] == root}
    maps = [path for path, module in inside.items() if linear_matrix(module) is not None]
    recording = record(model, model.batch([[model.vocab_size // 2]]), first=layer, check=False)
    past = recording.past(layer, torch.zeros(1, dtype=torch.long, device=model.device), 0)
    if isinstance(past, Earlier):
        raise UnsupportedModel(
            f"{full_name(model, layer, root)}: {model.name} leaves no keys and values by which the maps that make them "
            "could be told from others, so its attention cannot be trained: train its MLP (method 'ft')"
        )

    states = recording.states[layer]
    given = recording.calls[layer].at(0, 1, 1, states.device)

    def with_changed(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        def both() -> tuple[Tensor, Tensor]:
            after = past.after(lambda cache: run(block, states, given, cache))
            return run(block, states, given, past), torch.cat(
                [after.keys_before.flatten(), after.values_before.flatten()]
            )

        return with_weights(block, weights, both)

    written, remembered = with_changed({})
    found = []
    for path in maps:
        weight = model.weight(full_name(model, layer, f"{path}.weight"))
        new, kept = with_changed({f"{path}.weight": weight.flip(0)})  # not only longer: a norm would undo that
        if torch.equal(new, written) or not torch.equal(kept, remembered):
            found.append(path)
    if not found:
        where = full_name(model, layer, root)
        raise UnsupportedModel(f"{where}: no linear map makes queries, keys and values, so there is none to train")
    return found


def with_weights(block: nn.Module, weights: Mapping[str, Tensor], work: Callable[[], T]) -> T:
    """Result of `work` while a block has these tensors in place of its parameters of those names."""
    return functional_call(_Meanwhile(block), {f"block.{name}": each for name, each in weights.items()}, (work,))


class _Meanwhile(nn.Module):
    """Work in which a block takes part, as the module that `functional_call` asks for."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()
