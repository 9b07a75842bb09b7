"""Fine-tuning by whichever of its three methods some settings are, with side effects left unmeasured."""

from __future__ import annotations

from typing import Any

import errata
from errata.editors.fine_tuning import FineTuningConfig
from errata.models.model import Model

METHODS = {"ft": errata.ft, "ft-l": errata.ft_l, "attention": errata.attention}


def fine_tuned(model: Model, rewrites: Any, config: FineTuningConfig, **options: Any) -> Any:
    return METHODS[config.method](model, rewrites, **{**config.model_dump(), "max_drift": None}, **options)
