"""Comparison of the settings of two runs. Nested settings get dotted names, so that messages can name the exact one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found


def differing(one: Mapping[str, Any], other: Mapping[str, Any], missing: Any = None) -> list[str]:
    """Names of flat settings that differ; absent ones count as `missing`."""
    return [name for name in {**one, **other} if one.get(name, missing) != other.get(name, missing)]
