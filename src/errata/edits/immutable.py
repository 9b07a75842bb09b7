"""Immutable JSON values, for the settings and notes of an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from errata.base.errors import ConfigError


class FrozenDict(dict[str, Any]):
    """Immutable dict of settings or notes. Its lists are tuples, its dicts frozen too."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an edit is a value: its settings and notes cannot be changed. dict(...) gives a copy")

    if not TYPE_CHECKING:
        __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # pickled and copied as a whole: items cannot be set one by one


def frozen(value: Any) -> Any:
    """A JSON-able value made immutable: dicts become `FrozenDict`, lists tuples, one-number tensors numbers.

    Raises:
        ConfigError: for anything that JSON cannot hold, NaN and infinity among it.
    """
    if isinstance(value, Mapping):
        return FrozenDict({str(key): frozen(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(each) for each in value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} cannot be kept in an edit's settings or notes: only finite numbers can")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ConfigError(f"a {type(value).__name__} cannot be kept in an edit's settings or notes: only JSON values can")
