"""The cache folder, for files that can be recreated or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path

from errata.base.files import expanded


def cache_folder(kind: str) -> Path:
    """Folder for files of this kind, in $ERRATA_HOME or else in ~/.cache/errata ($XDG_CACHE_HOME is respected)."""
    home = os.environ.get("ERRATA_HOME")
    if home:
        return expanded(home) / kind
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "errata" / kind
