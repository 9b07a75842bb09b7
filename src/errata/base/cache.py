"""The cache folder, for files that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path

from errata.base.files import expanded


def cache_folder(kind: str) -> Path:
    """The folder of this kind of files: in $ERRATA_HOME, or else in ~/.cache/errata ($XDG_CACHE_HOME is heeded)."""
    home = os.environ.get("ERRATA_HOME")
    if home:
        return expanded(home) / kind
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "errata" / kind
