"""`rome`: from a rewrite to an edit. The model is the same, byte for byte, afterwards."""

from __future__ import annotations

from typing import Any

import torch

from errata.base.errors import ConfigError, FactError, StaleStatistics
from errata.base.facts import Rewrite
from errata.editors.rome import contexts, insert, value
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.key import read_keys
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.statistics.second_moment import SecondMoment


@torch.inference_mode(False)  # a caller in inference mode gets gradients all the same
def rome(
    model: Model,
    rewrite: Rewrite,
    config: RomeConfig | None = None,
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    seed: int = 0,
    progress: value.Progress | None = None,
) -> Edit:
    """The rank-one edit of one MLP down-projection that makes the model say the rewrite's new object.

    Args:
        model: left as it is, byte for byte, on errors and interrupts too.
        rewrite: the fact and its new object.
        config: settings; None: the defaults, with what the model's own hints say otherwise.
        layer: the layer to edit, from 0; it goes before the config's, which goes before the model's hint.
        second_moment: C, of the keys of that layer: `statistics.collect(model, [layer], texts)[layer]`.
        seed: of the sampled prefixes.
        progress: called after every evaluation of the loss, with a `value.Step`.

    Returns:
        An edit whose `notes` hold the loss of every step, the prefixes, and how exactly Ŵk* = v* holds.

    Raises:
        ConfigError: if no layer is named or it is not there, it has no later layer to act through, or no
        second
            moment is given.
        StaleStatistics: if the second moment is of another layer or size.
        FactError: if a text is too long for the model, or has no token in the wanted role.
        Diverged: if the optimisation meets a loss that is no finite number.
    """
    if not isinstance(rewrite, Rewrite):
        raise FactError(f"rome takes a Rewrite, not a {type(rewrite).__name__}: write fact.rewrite('Paris')")
    config = _resolved(model, config, layer)
    layer = config.layer
    assert layer is not None  # _resolved
    weight = down_weight_name(model, layer)
    second_moment = _checked(model, second_moment, layer)

    bare = contexts.Context.of(rewrite.fact)
    bare_keys = read_keys(model, layer, [bare], config.fact_token)  # first: a prompt that does not do fails fast
    prefixes = contexts.prefixes(model, config.prefixes, seed)
    all_contexts = [contexts.Context.of(rewrite.fact, prefix) for prefix in prefixes]
    task = value.prepare(model, rewrite, all_contexts, config)
    keys = read_keys(model, layer, all_contexts, config.fact_token)
    anchor = keys if config.key == "consistent" else bare_keys
    k0, v0 = anchor.mean_key, anchor.mean_value

    read = insert.read_vector(second_moment, keys.mean_key, k0)
    delta, steps = value.optimise(model, layer, task, v0, config, progress)
    change = insert.insert(model, weight, delta, read)
    notes: dict[str, Any] = {
        "steps": [step.numbers for step in steps],
        "prefixes": prefixes,
        "residual": insert.residual(model, change, k0, v0, delta),
        "delta_norm": delta.norm(),
        "value_norm": v0.norm(),
        "read_at_bare_prompt": float(read @ bare_keys.mean_key),
        "second_moment": {
            "tokens": second_moment.count,
            "ridge": second_moment.ridge,
            "fingerprint": second_moment.fingerprint,
        },
    }
    return Edit.of(model, [change], "rome", [rewrite], config=config.model_dump(), seed=seed, notes=notes)


def _resolved(model: Model, config: RomeConfig | None, layer: int | None) -> RomeConfig:
    """The settings with a layer that the model has."""
    if config is None:
        config = RomeConfig(**model.hints.get("rome", {}))
    for candidate in (layer, config.layer, model.hints.get("rome_layer")):
        if candidate is not None:
            model.path(("key", candidate))  # raises for a layer that is not there
            return RomeConfig(**{**config.model_dump(), "layer": candidate})
    raise ConfigError(
        f"no layer to edit is named, and {model.name} has no hint of its own: say layer=..., "
        f"0 to {model.n_layers - 1}. A causal trace shows where; early-middle layers are usual (GPT-2 XL 17, GPT-J 5)"
    )


def _checked(model: Model, second_moment: SecondMoment | None, layer: int) -> SecondMoment:
    if second_moment is None:
        raise ConfigError(
            f"ROME needs the second moment of the keys of layer {layer}: collect it with "
            f"errata.second_moments(model, [{layer}], texts)[{layer}], or do without what it protects, by "
            f"SecondMoment.identity({model.d_mlp})"
        )
    if second_moment.layer not in (None, layer):
        raise StaleStatistics(
            f"the second moment is of layer {second_moment.layer}, the edit of layer {layer}: collect it for that layer"
        )
    if second_moment.size != model.d_mlp:
        raise StaleStatistics(
            f"the second moment has size {second_moment.size}, the keys of {model.name} have {model.d_mlp}: "
            "it was collected on another model. Collect it on this one"
        )
    return second_moment
