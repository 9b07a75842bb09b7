"""Warns of pages that would load scripts, styles, fonts or pictures from the network; `sphinx-build -W` then fails."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.util import logging

LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']*|(?:@import|url\()\s*["']?(?:https?:)?//[^"')]*"""
)


def loaded_from_network(text: str) -> list[str]:
    """Addresses from which a page or style sheet loads something else."""
    return LOADED.findall(text)


def _check(app, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for found in loaded_from_network(path.read_text(encoding="utf-8")):
                logging.getLogger(__name__).warning("%s loads %s: the site must work offline", path.name, found)


def setup(app) -> dict[str, bool]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
