"""`errata editors`: the editors, their settings and their sources."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from errata.cli import options

if TYPE_CHECKING:
    from errata.editors.method import Method


def editors(
    name: Annotated[Optional[str], typer.Argument(help="Show the settings of this editor.")] = None,  # noqa: UP045
    json: options.Json = False,
) -> None:
    """List the editors; or show one editor's settings, its presets, and the published settings for each model.

    errata evaluate takes them as --editor NAME or NAME:SETTING=VALUE,...
    """
    from errata.cli import show
    from errata.editors.registry import method_of, methods

    if name is not None:
        method = method_of(name)
        if json:
            show.as_json(_as_dict(method))
        else:
            _show(method)
        return
    found = methods().values()
    if json:
        show.as_json({"editors": [_as_dict(method) for method in found]})
        return
    show.table(("editor", "what it does", "from"), [(each.name, each.summary, each.source) for each in found])


def _settings(method: Method) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each."""
    told = method.config.described()
    defaults = method.config.model_fields
    return [
        (name, "required" if defaults[name].is_required() else json_.dumps(defaults[name].default), text)
        for name, text in told.items()
    ]


def _as_dict(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "settings": [dict(zip(("name", "default", "meaning"), each, strict=True)) for each in _settings(method)],
        "presets": {name: preset.summary for name, preset in method.presets.items()},
        "published": [
            {"model": each.model, "settings": dict(each.settings), "source": each.source}
            for each in method.published.values()
        ],
    }


def _show(method: Method) -> None:
    from errata.cli import show

    show.line(f"{method.name}: {method.summary}. From {method.source}.")
    show.table(("setting", "default", "meaning"), _settings(method))
    if method.presets:
        show.table(("preset", "meaning"), [(name, preset.summary) for name, preset in method.presets.items()])
    if method.published:
        rows = [
            (each.model, ", ".join(f"{key}={value}" for key, value in each.settings.items()), each.source)
            for each in method.published.values()
        ]
        show.table(("model", "known settings", "from"), rows)
