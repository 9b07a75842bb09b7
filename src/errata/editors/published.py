"""Published settings of methods, looked up by the model's type and size, not by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.models.model import Model

Shape = tuple[str, int, int]  # model type, number of layers, d_model


@dataclass(frozen=True)
class Published:
    """Settings of a method for one model.

    Attributes:
        model: its name.
        settings: the settings that differ from the method's defaults.
        source: where they are from.
    """

    model: str
    settings: Mapping[str, Any]
    source: str


def shape_of(model: Model) -> Shape:
    """Key of a model in tables of published settings."""
    return model.hf.config.model_type, model.n_layers, model.d_model
