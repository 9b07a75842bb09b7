"""Attribution of a token's probability to every MLP neuron, by integrated gradients (Dai et al., section 3.1).

The activation of one layer's neurons at the prompt's last token is scaled from zero to its full value; the attribution
of a neuron is its activation times the mean of ∂P/∂activation along the way. Only that token changes, and only from
that layer on: earlier tokens are present as recorded keys and values, and the rows of all layers run together; those of
a layer join when the blocks reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from errata.base import budgets
from errata.base.errors import ConfigError, UnsupportedModel
from errata.editors.knowledge_neurons.config import KnowledgeNeuronsConfig
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.models.weights import matrix, mlp_maps
from errata.passes.replay import Recording, RowPatch, record
from errata.passes.taps import tapped


@dataclass(frozen=True)
class _Neurons:
    """Activations at one token in one layer, and how the down-projection's input comes of them."""

    activation: Tensor  # [d_mlp]
    key: Callable[[Tensor], Tensor]


# A caller in inference mode gets gradients all the same.
@torch.inference_mode(False)
def attributions(model: Model, ids: Sequence[int], target: int, config: KnowledgeNeuronsConfig) -> Tensor:
    """Attributions `[layers, d_mlp]` of a token's probability after a text, in float32 at least, on the model's device.

    Args:
        model: the model; left unchanged.
        ids: the text.
        target: the token.
        config: `steps`, `points` and `at` are read.

    Raises:
        FactError: if the text is too long for the model.
        ConfigError: if neurons are to be taken before a nonlinearity that this model does not have.
        UnsupportedModel: if the model's blocks cannot be resumed.
    """
    model.require_room(ids, "the prompt")
    layers = range(model.n_layers)
    maps = [_up_map(model, layer) for layer in layers] if config.at == "before" else []
    with tapped(model, maps) as taps, torch.no_grad():
        recording = record(model, model.batch([ids]), keep=[("key", layer) for layer in layers], check=len(ids) > 1)
    neurons = []
    for layer in layers:
        key = recording.kept["key", layer][0, -1]
        if config.at == "key":
            neurons.append(_Neurons(key, lambda scaled: scaled))
        else:
            neurons.append(
                _before(model, layer, taps[maps[layer]].leaving.reshape(-1, len(key))[-1].to(model.device), key)
            )
    fractions = torch.linspace(0, 1, config.steps) if config.points == "ends" else _right(config.steps)
    found = []
    with frozen(model), torch.enable_grad():
        for some in _groups(model, config.steps, len(ids)):
            found += _of_layers(recording, some, neurons, fractions, target)
    return torch.stack(found)


def _instead(keys: Tensor) -> RowPatch:
    """These keys `[r, d_mlp]` in place of the rows' own at their one token."""
    return lambda tensor, chosen: keys[chosen, None]


def require_neurons(model: Model, config: KnowledgeNeuronsConfig) -> None:
    """Check, before long work, that the model has neurons at the requested place.

    Raises:
        ConfigError: if they are to be taken before a nonlinearity that it does not have.
    """
    if config.at == "before":
        _up_map(model, 0)


def _right(steps: int) -> Tensor:
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def _of_layers(
    recording: Recording, layers: range, neurons: Sequence[_Neurons], fractions: Tensor, target: int
) -> list[Tensor]:
    """Attributions `[d_mlp]` of each of these layers, whose rows climb together."""
    model, token, steps = recording.model, recording.length - 1, len(fractions)
    rows = torch.zeros(steps, dtype=torch.long, device=model.device)
    scaled: list[Tensor] = []
    states: Tensor | None = None  # of the rows of the layers so far, [r, 1, d_model]
    for layer in range(layers.start, model.n_layers):
        if states is not None:
            states = recording.step(layer, states, token, rows.new_zeros(len(states)))
        if layer in layers:
            own = neurons[layer]
            leaf = fractions.to(own.activation)[:, None] * own.activation
            scaled.append(leaf.requires_grad_())
            keys = own.key(leaf)
            joining = recording.step(
                layer,
                recording.states[layer][:, token:].expand(steps, -1, -1),
                token,
                rows,
                {"key": _instead(keys)},
            )
            states = joining if states is None else torch.cat([states, joining])
    assert states is not None  # there are layers
    logits = model.unembed(states[:, -1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    gradients = torch.autograd.grad(logits.to(wide).softmax(-1)[:, target].sum(), scaled)
    return [
        neurons[layer].activation.to(wide) * gradient.to(wide).mean(0)
        for layer, gradient in zip(layers, gradients, strict=True)
    ]


def _groups(model: Model, steps: int, length: int) -> Iterator[range]:
    """Layers whose rows climb together: as many as memory holds what backward passes need of them."""
    # Of a row a block keeps about so much: its states, queries, keys and values, the MLP's twice over, and the keys and
    # values of all tokens, for attention to be followed backwards.
    per_block = 4 * (8 * model.d_model + 3 * model.d_mlp + 2 * length * model.d_model)
    costs = [steps * (model.n_layers - layer) for layer in range(model.n_layers)]
    yield from budgets.groups(costs, max(costs[0], budgets.fitting(model.devices, per_block)))


# ---- before the nonlinearity ----


def _up_map(model: Model, layer: int) -> str:
    """The name of the one linear map whose output a nonlinearity makes the down-projection's input of.

    Raises:
        ConfigError: if there is none, or several: the MLP is gated.
    """
    down = model.path(("key", layer))
    found = [
        name
        for name in mlp_maps(model, layer)
        if name != down and matrix(model, f"{name}.weight").shape[0] == model.d_mlp
    ]
    if len(found) != 1:
        raise ConfigError(
            f"at = 'before' needs an MLP with one map before its nonlinearity, and layer {layer} of {model.name} has "
            f"{len(found)}: where it is gated, neurons are what the down-projection reads, at = 'key'"
        )
    return found[0]


def _before(model: Model, layer: int, activation: Tensor, key: Tensor) -> _Neurons:
    """The neurons before the nonlinearity that the model's config names, which is measured.

    Raises:
        UnsupportedModel: if it is not what makes the key.
    """
    config = model.hf.config.get_text_config()
    name = next((n for n in ("activation_function", "hidden_act", "hidden_activation") if hasattr(config, n)), None)
    function = ACT2FN[getattr(config, name)] if name else None
    if function is None or not torch.allclose(function(activation), key.to(activation.device), rtol=1e-3, atol=1e-5):
        raise UnsupportedModel(
            f"layer {layer} of {model.name}: its keys are not what the nonlinearity that its config names makes of "
            "the map before it, so neurons cannot be taken there. Say at = 'key'"
        )
    return _Neurons(activation, function)
