"""Which layer to edit, and with which settings: as said, as the model's config hints, as published, or as a trace
finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from errata.base.errors import ConfigError
from errata.base.facts import Fact
from errata.editors.published import Published, Shape, shape_of
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.site import Site, early_site
from errata.models.model import Model

_HPARAMS = "hyperparameters of the published code (kmeng01/rome, hparams/ROME)"
_MEMIT = "hyperparameters of MEMIT (kmeng01/memit, hparams/MEMIT/EleutherAI_gpt-neox-20b.json)"
PUBLISHED: dict[Shape, Published] = {
    ("gpt2", 24, 1024): Published("GPT-2 Medium", {"layer": 8, "clamp": 3.0}, _HPARAMS),
    ("gpt2", 36, 1280): Published("GPT-2 Large", {"layer": 12}, _HPARAMS),
    ("gpt2", 48, 1600): Published("GPT-2 XL", {"layer": 17}, _HPARAMS),
    ("gptj", 28, 4096): Published("GPT-J 6B", {"layer": 5}, _HPARAMS),
    ("gpt_neox", 44, 6144): Published("GPT-NeoX 20B", {"layer": 15}, _MEMIT),
}


def known_settings(model: Model) -> RomeConfig:
    """The defaults, with what was published for the model and what its own config hints; without a layer."""
    published = PUBLISHED.get(shape_of(model))
    known = {**(published.settings if published else {}), **model.hints.get("rome", {})}
    return RomeConfig(**{name: value for name, value in known.items() if name != "layer"})


def known_layer(model: Model) -> tuple[int, str] | None:
    """The layer that the model's own config hints, or that was published for it, and which of these it is."""
    hint = model.hints.get("rome_layer", model.hints.get("rome", {}).get("layer"))
    if hint is not None:
        return hint, "the model's own hint"
    if published := PUBLISHED.get(shape_of(model)):
        return published.settings["layer"], f"published for {published.model}: {published.source}"
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
