"""Which layer to edit, and with which settings: as said, as the model's config hints, as published, or as a trace
finds.

Published settings are known by a model's type and sizes, not by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from errata.base.errors import ConfigError
from errata.base.facts import Fact
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.site import Site, early_site
from errata.models.model import Model


@dataclass(frozen=True)
class Preset:
    """Settings of ROME for one model.

    Attributes:
        name: the model.
        settings: what differs from `RomeConfig`'s defaults.
        source: where they were published.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = "hyperparameters of the published code (kmeng01/rome, hparams/ROME)"


# By model type, number of layers and d_model.
_PUBLISHED = {
    ("gpt2", 24, 1024): Preset("GPT-2 Medium", {"layer": 8, "clamp": 3.0}),
    ("gpt2", 36, 1280): Preset("GPT-2 Large", {"layer": 12}),
    ("gpt2", 48, 1600): Preset("GPT-2 XL", {"layer": 17}),
    ("gptj", 28, 4096): Preset("GPT-J 6B", {"layer": 5}),
    ("gpt_neox", 44, 6144): Preset("GPT-NeoX 20B", {"layer": 15}),
}


def preset_of(model: Model) -> Preset | None:
    """What was published for a model of this type and size."""
    return _PUBLISHED.get((model.hf.config.model_type, model.n_layers, model.d_model))


def known_settings(model: Model) -> RomeConfig:
    """The defaults, with what was published for the model and what its own config hints; without a layer."""
    preset = preset_of(model)
    known = {**(preset.settings if preset else {}), **model.hints.get("rome", {})}
    return RomeConfig(**{name: value for name, value in known.items() if name != "layer"})


def known_layer(model: Model) -> tuple[int, str] | None:
    """The layer that the model's own config hints, or that was published for it, and which of these it is."""
    hint = model.hints.get("rome_layer", model.hints.get("rome", {}).get("layer"))
    if hint is not None:
        return hint, "the model's own hint"
    if preset := preset_of(model):
        return preset.settings["layer"], f"published for {preset.name}: {preset.source}"
    return None


def resolve(
    model: Model,
    facts: Sequence[Fact],
    config: RomeConfig | None = None,
    layer: int | Literal["auto"] | Site | None = None,
    seed: int = 0,
) -> tuple[RomeConfig, str]:
    """The settings with a layer that the model has, and how that came to be chosen.

    Raises:
        ConfigError: if none is named and none is known, or it is not there.
        FactError: if "auto" finds no site.
    """
    if config is not None and not isinstance(config, RomeConfig):
        raise ConfigError(f"config is a {type(config).__name__}: write RomeConfig(steps=20, ...)")
    config = known_settings(model) if config is None else config
    chosen = config.layer if layer is None else layer
    how = "named"
    if chosen is None:
        known = known_layer(model)
        if known is None:
            raise ConfigError(
                f"no layer to edit is named, and none is known for {model.name}: say layer=..., 0 to "
                f'{model.n_layers - 1}, or layer="auto" to have a quick trace of the fact find it'
            )
        chosen, how = known
    if chosen == "auto":
        chosen = early_site(model, facts, seed=seed)
    if isinstance(chosen, Site):
        chosen, how = chosen.layer, str(chosen)
    model.path(("key", chosen))  # raises for a layer that is not there
    return RomeConfig(**{**config.model_dump(), "layer": chosen}), how
