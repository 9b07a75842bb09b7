"""Optional dependencies: imported when they are needed, asked for by name when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from errata.base.errors import MissingExtra


def pandas() -> Any:
    """The pandas module.

    Raises:
        MissingExtra: if it is not installed.
    """
    return _load("pandas", "tables")


def _load(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this needs {module}, which is not installed: pip install 'errata[{extra}]'") from error
