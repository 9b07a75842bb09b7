"""Where files are kept that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of this kind of files: in $ERRATA_HOME, or else in ~/.cache/errata ($XDG_CACHE_HOME is heeded)."""
    home = os.environ.get("ERRATA_HOME")
    if home:
        return Path(home).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "errata" / kind
