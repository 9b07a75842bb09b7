"""Optional dependencies: imported when they are needed, asked for by name when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from errata.base.errors import MissingExtra


def needed(module: str, extra: str) -> Any:
    """A module that comes with an extra of the package.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this needs {module}, which is not installed: pip install 'errata[{extra}]'") from error
