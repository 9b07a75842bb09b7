"""Means over facts, and the long table of the means of sites: one row for each part, role and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errata.tracing.result import ROLES

COLUMNS = ("mean", "low", "high", "boot_low", "boot_high", "facts")
PLACE = ("part", "role", "layer")
SCALARS = ("clean", "corrupted", "total_effect")
SCOPES = ("subject", "all")

Array = NDArray[Any]


@dataclass(frozen=True)
class Mean:
    """A mean over facts, with normal and bootstrap 95 % intervals and the number of facts.

    Intervals are None below two facts, and the mean is below one.
    """

    mean: float | None
    low: float | None
    high: float | None
    boot_low: float | None
    boot_high: float | None
    facts: int


@dataclass(frozen=True)
class Best:
    """Statistics over facts of the site that restores most in each fact.

    Attributes:
        effect: its indirect effect.
        roles: how many facts have it in each role, in the order of `ROLES`.
        layers: how many facts have it in each layer.
    """

    effect: Mean
    roles: tuple[int, ...]
    layers: tuple[int, ...]


def plain(values: Array) -> Any:
    """An array as lists, with None for NaN, which JSON does not have."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def places_of(part: str, layers: int) -> list[tuple[str, str, int]]:
    """(part, role, layer) of the rows of a part in the long table."""
    return [(part, role, layer) for role in ROLES for layer in range(layers)]
