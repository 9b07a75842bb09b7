"""ROME for many records: its settings settled once, so that every chunk of records is edited alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.base.errors import ConfigError, ErrataError
from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.editor import Editor
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.contexts import prefixes
from errata.editors.rome.editor import SecondMoments, rome, second_moment_of
from errata.editors.rome.layer import known_settings, resolve
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.statistics.second_moment import SecondMoment

_PRESETS = {"paper": RomeConfig.paper, "reference": RomeConfig.reference}


def prepare(
    model: Model,
    settings: Mapping[str, Any],
    second_moment: SecondMoments | None,
    seed: int,
    facts: Sequence[Fact] = (),
) -> Editor:
    """ROME as an editor of many.

    Args:
        model: as it will be edited.
        settings: of `RomeConfig`, over what is known for the model; or over a `preset`, "paper" or "reference".
        second_moment: as of `rome`.
        seed: of the sampled prefixes, and of the trace that finds a layer.
        facts: for `layer="auto"`, which traces the first ten of them, whichever records are edited later.

    Raises:
        FactError: if the layer is "auto" and the trace finds none.
        ConfigError: if a setting does not do, no layer is named and none is known, or there is no second moment.
            A setting that does for some records alone is not told of here.
        StaleStatistics: if the second moment is of another layer or size.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    if preset is not None and preset not in [*_PRESETS]:
        raise ConfigError(f"ROME has no preset {preset!r}: choose of {', '.join(_PRESETS)}")
    base = _PRESETS[preset]() if preset else known_settings(model)
    config = RomeConfig(**{**base.model_dump(), **given})
    unused = [name for name in ("max_drift", "probes") if given.get(name) is not None]
    if unused:
        raise ConfigError(f"{unused[0]} does not do here: no edit is refused as disabling, for what they break is told")
    chosen_by = {"layer_by": "auto"} if config.layer == "auto" else {}
    if chosen_by and not facts:
        raise ConfigError(
            "layer='auto' traces facts to find the layer, and there are none: give some (facts=[...]), or name a layer"
        )
    config = settled(model, facts, config, None, seed, alone=True)
    assert isinstance(config.layer, int)  # settled
    if config.loss_layer is not None and not config.layer <= config.loss_layer < model.n_layers:
        raise ConfigError(
            f"loss_layer is {config.loss_layer}: it must be from {config.layer}, which is edited, to "
            f"{model.n_layers - 1}, the last"
        )
    moment = second_moment_of(model, second_moment, config)
    told = {**config.model_dump(mode="json"), "seed": seed, "second_moment": tensor_digest(moment.matrix), **chosen_by}
    return Editor("rome", told, partial(_make, config=config, second_moment=moment, seed=seed))


def settled(
    model: Model,
    facts: Sequence[Fact],
    config: RomeConfig | None,
    layer: int | None,
    seed: int,
    *,
    alone: bool = False,
) -> RomeConfig:
    """The settings of `rome`, or the model's own, ready for many edits.

    Prefixes are strings: sampled once, and from the model as it is now. No edit is probed and refused as disabling:
    what edits break is what a run measures. With `alone`, each rewrite is edited as if no other existed, those of one
    subject too.

    Raises:
        ConfigError: if no layer is named and none is known, or it is not there.
    """
    config, _ = resolve(model, facts, config, layer, seed)
    sampled = prefixes(model, config.prefixes, seed)
    apart = {"same_subject": "apart"} if alone else {}
    return RomeConfig(**{**config.model_dump(), "prefixes": sampled, "max_drift": None, **apart})


def _make(
    model: Model, rewrites: Sequence[Rewrite], *, config: RomeConfig, second_moment: SecondMoment, seed: int
) -> list[Edit | ErrataError]:
    return rome(model, list(rewrites), config, second_moment=second_moment, seed=seed, errors="keep")
