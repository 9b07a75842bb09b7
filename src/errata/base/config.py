"""Base class of all settings: frozen, checked, with clear errors."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from errata.base.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of the settings of an editor or a trace: immutable, every field checked, unknown names refused.

    Raises:
        ConfigError: in one line, with the nearest name if a setting is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            lines = dict.fromkeys(self._line(each) for each in error.errors(include_url=False))
            raise ConfigError("; ".join(lines)) from None

    @classmethod
    def described(cls) -> dict[str, str]:
        """Description of each setting: the class's own first, then those of the classes that it extends."""
        names = sorted(cls.model_fields, key=lambda name: name not in cls.__annotations__)
        return {name: cls.model_fields[name].description or "" for name in names}

    @classmethod
    def _line(cls, error: ErrorDetails) -> str:
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(cls.described())}"
            return f"{cls.__name__} has no setting {name!r}: {advice}"
        said = error["msg"].removeprefix("Value error, ")
        if not name:
            return f"{cls.__name__}: {said}"
        return f"{cls.__name__}: {name} = {error['input']!r} is not valid: {said}"


def changed(config: C, **settings: Any) -> C:
    """A copy of the settings with some of them changed; all are validated again."""
    return type(config)(**{**config.model_dump(exclude_unset=True), **settings})
