"""Which versions computed a result."""

from __future__ import annotations

from importlib import metadata

from errata import __version__


def library_versions() -> dict[str, str]:
    """Versions of errata and of what computes for it."""
    return {"errata": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
