"""`fine_tune`: from rewrites to edits. The model is the same, byte for byte, afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from errata.base import budgets
from errata.base.errors import ConfigError, ErrataError, FactError
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.fine_tuning.config import FineTuningConfig
from errata.editors.fine_tuning.optimise import Found, Progress, Step, optimise
from errata.editors.fine_tuning.trained import full_name, trained
from errata.editors.texts import Text, text_of
from errata.edits.delta import Dense
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.weights import matrix

# Facts that are trained together, if memory allows: more make no batch fuller.
_MOST = 32


@overload
def fine_tune(model: Model, rewrites: Rewrite, config: FineTuningConfig | None = None, **settings: Any) -> Edit: ...


@overload
def fine_tune(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: FineTuningConfig | None = None,
    *,
    errors: Literal["raise"] = "raise",
    **settings: Any,
) -> list[Edit]: ...


@overload
def fine_tune(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: FineTuningConfig | None = None,
    *,
    errors: Literal["keep"],
    **settings: Any,
) -> list[Edit | ErrataError]: ...


# A caller in inference mode gets gradients all the same.
@torch.inference_mode(False)  # type: ignore[misc]  # the other settings are spelt out here alone
def fine_tune(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: FineTuningConfig | None = None,
    *,
    seed: int = 0,
    errors: Literal["raise", "keep"] = "raise",
    progress: Progress | None = None,
) -> Edit | list[Edit] | list[Edit | ErrataError]:
    """The change of one layer's weights that training on the rewrite comes to; or of many rewrites.

    Many rewrites are trained independently, each as if it were alone, and computed together.

    Args:
        model: left as it is, byte for byte, on errors and interrupts too.
        rewrites: a fact and its new object, or a sequence of such.
        config: settings; None: `FineTuningConfig.ft(model)`.
        seed: kept in the edit; nothing here is random.
        errors: "raise" the first; or "keep" each in the place of the edit that could not be made.
        progress: called after every evaluation of a loss, with a `Step`.

    Returns:
        An edit for a rewrite, or a list for a sequence; its deltas are dense, of a bias one column. Its `notes` hold
        the losses, how often the weights were changed (`updates`), what ended it (`stopped`: "loss" or "steps") and the
        largest entry of the change by magnitude (`largest_change`). Where the loss is below `stop_below` at once, the
        fact is there already, and the edit changes nothing: `updates` is 0.

    Raises:
        UnsupportedModel: if accelerate has offloaded a weight that is to change.
        ConfigError: if no layer is named or it is not there.
        FactError: if a text is too long for the model.
        Diverged: if training meets a loss that is no finite number.
    """
    if errors not in ("raise", "keep"):
        raise ConfigError(f"errors is {errors!r}: it is 'raise' or 'keep'")
    one = not isinstance(rewrites, (list, tuple))
    wanted: list[Rewrite] = [rewrites] if one else list(rewrites)  # type: ignore[arg-type,list-item]
    for rewrite in wanted:
        if not isinstance(rewrite, Rewrite):
            raise FactError(
                f"fine_tune takes a Rewrite or a list of them, not a {type(rewrite).__name__}: write "
                "fact.rewrite('Paris')"
            )
    config = settled(model, config)
    found: dict[int, Edit | ErrataError] = {}
    texts: dict[int, Text] = {}
    for number, rewrite in enumerate(wanted):
        try:
            texts[number] = text_of(
                model,
                rewrite.text,
                rewrite.new_object,
                rewrite.separator,
                forced=config.loss == "teacher_forcing",
            )
        except FactError as error:
            if errors == "raise":
                raise
            found[number] = error
    names = trained(model, config)
    weights = {name: full_name(model, config.layer, name) for name in names}  # type: ignore[arg-type]  # settled
    fingerprints = {full: tensor_digest(model.weight(full)) for full in weights.values()}
    for share in _batches(model, list(fingerprints), list(texts)):

        def tell(step: Step, share: Sequence[int] = share) -> None:
            if progress is not None:
                progress(dataclasses.replace(step, fact=share[step.fact], facts=len(wanted)))

        made = optimise(model, names, [texts[number] for number in share], config, tell)
        for number, each in zip(share, made, strict=True):
            if isinstance(each, ErrataError):
                if errors == "raise":
                    raise each
                found[number] = each
            else:
                found[number] = _edit(model, wanted[number], each, weights, config, fingerprints, seed)
    edits = [found[number] for number in range(len(wanted))]
    return edits[0] if one else edits  # type: ignore[return-value]


def settled(model: Model, config: FineTuningConfig | None) -> FineTuningConfig:
    """The settings, or the model's own, with a layer that it has.

    Raises:
        ConfigError: if no layer is named and none is known, or it is not there.
    """
    if config is None:
        config = FineTuningConfig.ft(model)
    if not isinstance(config, FineTuningConfig):
        raise ConfigError(f"config is a {type(config).__name__}: write FineTuningConfig(layer=1, ...)")
    if config.layer is None:
        raise ConfigError(
            f"no layer to train is named: say FineTuningConfig(layer=..., ...), 0 to {model.n_layers - 1} for "
            f"{model.name}, or take what is known for it, by FineTuningConfig.ft(model)"
        )
    model.path(("state", config.layer))  # raises for a layer that is not there
    return config


def _edit(
    model: Model,
    rewrite: Rewrite,
    found: Found,
    weights: Mapping[str, str],
    config: FineTuningConfig,
    fingerprints: Mapping[str, str],
    seed: int,
) -> Edit:
    notes = {
        "losses": found.losses,
        "updates": found.updates,
        "stopped": "loss" if found.updates < len(found.losses) else "steps",
        "largest_change": max(float(change.abs().max()) for change in found.changes.values()),
    }
    return Edit.of(
        model,
        [Dense(weights[name], _as_matrix(model, weights[name], change)) for name, change in found.changes.items()],
        config.method,
        [rewrite],
        config=config.model_dump(),
        seed=seed,
        notes=notes,
        fingerprints=fingerprints,
    )


def _as_matrix(model: Model, name: str, change: Tensor) -> Tensor:
    """A parameter's change as `[d_out, d_in]`; a bias's as `[d_out, 1]`, a map of the constant 1."""
    if change.dim() == 1:
        return change[:, None]
    return change if matrix(model, name).stride() == model.weight(name).stride() else change.T


def _batches(model: Model, names: Sequence[str], facts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Facts, as many at a time as memory holds."""
    # Of each: the change, its gradient, Adam's two moments and the sum with the weight, wide and rounded.
    per_fact = sum(6 * model.weight(name).numel() * 4 for name in names)
    most = min(_MOST, budgets.fitting(model.devices, per_fact, part=2))
    yield from ([facts[i] for i in group] for group in budgets.groups([1] * len(facts), most))
