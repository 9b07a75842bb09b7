"""Fine-tuning for many records: its settings settled once, so that every chunk of records is edited alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from errata.base.errors import ConfigError, ErrataError
from errata.base.facts import Rewrite
from errata.editors.editor import Editor
from errata.editors.fine_tuning.config import FineTuningConfig
from errata.editors.fine_tuning.editor import fine_tune, settled
from errata.editors.fine_tuning.trained import trained
from errata.edits.edit import Edit
from errata.models.model import Model


def prepare_ft(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """FT as an editor of many.

    Args:
        model: as it will be edited.
        settings: of `FineTuningConfig`, over what is known for the model; `preset` "reference" is the published code's
            way of training, below them.
        second_moment: not needed.
        seed: kept in the edits; nothing here is random.

    Raises:
        ConfigError: if a setting does not do, or is another method's, or one that is needed is not known.
        UnsupportedModel: if what is to be trained is not there, or not at hand.
    """
    return _prepare("ft", FineTuningConfig.ft, model, settings, seed)


def prepare_ft_l(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """FT+L as an editor of many. As `prepare_ft`."""
    return _prepare("ft-l", FineTuningConfig.ft_l, model, settings, seed)


def prepare_attention(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """The attention edit as an editor of many. As `prepare_ft`."""
    return _prepare("attention", FineTuningConfig.attention, model, settings, seed)


def _prepare(
    method: str, preset: Callable[..., FineTuningConfig], model: Model, settings: Mapping[str, Any], seed: int
) -> Editor:
    given = dict(settings)
    way = given.pop("preset", None)
    if way not in (None, "reference"):
        raise ConfigError(f"{method!r} has no preset {way!r}: choose 'reference', or none")
    if way:
        given = {**FineTuningConfig.reference().model_dump(include={"loss", "bias", "stop_below"}), **given}
    config = settled(model, preset(model, **given))
    if config.method != method:
        raise ConfigError(f"these settings are those of {config.method!r}, not of {method!r}: evaluate it by its name")
    trained(model, config)  # raises if it is not there
    return Editor(method, config.model_dump(mode="json"), partial(_make, config=config, seed=seed))


def _make(
    model: Model, rewrites: Sequence[Rewrite], *, config: FineTuningConfig, seed: int
) -> list[Edit | ErrataError]:
    return fine_tune(model, list(rewrites), config, seed=seed, errors="keep")
