"""Which editors there are, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from errata.base.config import Config
from errata.base.errors import ConfigError
from errata.editors.editor import Editor
from errata.editors.rome import RomeConfig
from errata.editors.rome.editor import SecondMoments
from errata.editors.rome.prepare import prepare as prepare_rome
from errata.models.model import Model

Prepare = Callable[[Model, Mapping[str, Any], "SecondMoments | None", int], Editor]


@dataclass(frozen=True)
class Method:
    """A way to edit.

    Attributes:
        name: what to call it by.
        summary: what it does, in a line.
        source: where it is from.
        config: its settings.
        prepare: makes it an editor of many rewrites on a model: from settings by name, second moments, and a seed.
    """

    name: str
    summary: str
    source: str
    config: type[Config]
    prepare: Prepare


METHODS = {
    method.name: method
    for method in (
        Method(
            "rome",
            "Rank-One Model Editing: one MLP's down-projection is given a new value for the subject's key",
            "Meng et al., 2022: Locating and Editing Factual Associations in GPT",
            RomeConfig,
            prepare_rome,
        ),
    )
}


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(METHODS)}"
        raise ConfigError(f"there is no editor {name!r}: {advice}")
    return METHODS[name]
