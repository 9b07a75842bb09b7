"""Optional dependencies, imported on first use. A missing one is an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from errata.base.errors import MissingExtra
from errata.base.versions import DISTRIBUTION


def needed(module: str, extra: str) -> Any:
    """An optional module, imported; an error names the extra that installs it.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs {module}, which is not installed: pip install '{DISTRIBUTION}[{extra}]'"
        ) from error
