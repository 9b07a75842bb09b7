"""Versions of errata and of the libraries that its results depend on."""

from __future__ import annotations

from importlib import metadata

# The name that pip knows. On PyPI, `errata` is an unrelated package.
DISTRIBUTION = "errata-lm"

try:
    __version__ = metadata.version(DISTRIBUTION)
except metadata.PackageNotFoundError:  # a source folder on the path, not installed
    __version__ = "unknown"


def library_versions() -> dict[str, str]:
    """Versions of errata, torch and transformers, kept in saved files."""
    return {"errata": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
