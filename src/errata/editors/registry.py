"""The registry of editors: built-in ones and those of other packages.

A package adds an editor by an entry point in the group "errata.editors" that names a `Method`:

    [project.entry-points."errata.editors"]
    mine = "my_package.editor:METHOD"
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from errata.base.errors import ConfigError
from errata.editors.fine_tuning import attention, ft, ft_l
from errata.editors.hypernetworks.editor import ke, mend
from errata.editors.knowledge_neurons import kn
from errata.editors.method import Method
from errata.editors.rome import rome

GROUP = "errata.editors"

METHODS = {method.name: method for method in (rome, ft, ft_l, attention, kn, mend, ke)}


def methods() -> dict[str, Method]:
    """All editors by name, built-in ones first.

    Raises:
        ConfigError: if another package brings one that cannot be used.
    """
    return METHODS | {name: _brought(point) for name, point in sorted(_entry_points().items())}


def method_of(name: str) -> Method:
    """The method with this name.

    Raises:
        ConfigError: if there is none, or the package that brings it cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    others = _entry_points()
    if name in others:
        return _brought(others[name])
    near = difflib.get_close_matches(name, [*METHODS, *others], n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join([*METHODS, *others])}"
    raise ConfigError(f"there is no editor {name!r}: {advice}")


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _brought(point: EntryPoint) -> Method:
    """The method that an entry point names."""
    whose = f"the editor {point.name!r} of {point.dist.name if point.dist else 'another package'} ({point.value})"
    if point.name in METHODS:
        raise ConfigError(f"{whose} has the name of one of errata's own, so neither could be told: name it otherwise")
    try:
        method = point.load()
    except Exception as error:  # whatever its package raises
        raise ConfigError(f"{whose} cannot be loaded: {type(error).__name__}: {error}. Mend or remove it") from error
    if not isinstance(method, Method) or method.name != point.name:
        raise ConfigError(f"{whose} is not a Method called {point.name!r}: see errata.editors.registry")
    return method
