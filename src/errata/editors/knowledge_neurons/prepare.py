"""Knowledge Neurons for many records: settings settled once, so that every chunk of records is edited alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.base.errors import ConfigError, ErrataError
from errata.base.facts import Rewrite
from errata.editors.editor import Editor
from errata.editors.knowledge_neurons.attribution import require_neurons
from errata.editors.knowledge_neurons.config import KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.editor import knowledge_neurons, known_settings, settled
from errata.edits.edit import Edit
from errata.models.model import Model


def prepare(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """Knowledge Neurons as an editor of many.

    Args:
        model: as it will be edited.
        settings: of `KnowledgeNeuronsConfig`; or over a `preset`, "reference".
        second_moment: not needed.
        seed: of sampled prefixes.

    Raises:
        ConfigError: if a setting does not do.
        UnsupportedModel: if an object's embedding cannot be written where neurons write.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    if preset not in (None, "reference"):
        raise ConfigError(f"'kn' has no preset {preset!r}: choose 'reference', or none")
    base = KnowledgeNeuronsConfig.reference() if preset else known_settings(model)
    config = settled(model, KnowledgeNeuronsConfig(**{**base.model_dump(), **given}), seed)
    require_neurons(model, config)
    return Editor("kn", {**config.model_dump(mode="json"), "seed": seed}, partial(_make, config=config, seed=seed))


def _make(
    model: Model, rewrites: Sequence[Rewrite], *, config: KnowledgeNeuronsConfig, seed: int
) -> list[Edit | ErrataError]:
    return knowledge_neurons(model, list(rewrites), config, seed=seed, errors="keep")
