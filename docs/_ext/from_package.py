"""Reference pages written from the package: what it offers, its commands, its settings.

A line `% from the package: commands` in a page is replaced by what `WRITERS["commands"]` returns when the page is read.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from sphinx.ext.napoleon.docstring import GoogleDocstring
from typer.models import ArgumentInfo, CommandInfo

import errata
from errata.base.config import Config
from errata.cli.app import app as command_line

# Headings of the reference of Python, by the folder of the package in which a name is defined.
HEADINGS = {
    "api": "Models and editors",
    "models": "Models and editors",
    "base": "Facts and errors",
    "tracing": "Causal tracing",
    "editors": "Models and editors",
    "edits": "Edits",
    "statistics": "Second moments",
    "tasks": "Records",
    "data": "Records",
    "evaluation": "Evaluation",
}


# An option of the command line in a sentence, to be shown as code.
OPTION = re.compile(r"(?<![\w`-])(--[a-z][a-z-]*[a-z])")


def escaped(text: str) -> str:
    """Text with the characters of Markdown escaped, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", OPTION.sub(r"`\1`", " ".join(text.split())))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>$|{}])", r"\\\1", part) for part in parts)


def api() -> str:
    """Every name of `import errata`, by topic."""
    topics: dict[str, list[str]] = {}
    for name in errata.__all__:
        if name != "__version__":
            folder = errata._HOME[name][0].split(".")[1]
            topics.setdefault(HEADINGS[folder], []).append(name)
    text = []
    for heading in dict.fromkeys(HEADINGS.values()):
        text += [f"## {heading}", ""]
        for name in sorted(topics.get(heading, []), key=lambda name: (inspect.isclass(getattr(errata, name)), name)):
            text += [_documented(name), ""]
    return "\n".join(text)


def _documented(name: str) -> str:
    found = getattr(errata, name)
    if not (inspect.isclass(found) or inspect.isroutine(found)):  # a method of editing
        return _method(name, found)
    if inspect.isroutine(found):
        return f"```{{eval-rst}}\n.. autofunction:: errata.{name}\n```"
    paths = [f"errata.{name}", *(f"{base.__module__}.{base.__name__}" for base in _extended(found))]
    return "\n\n".join(f"```{{eval-rst}}\n.. autoclass:: {path}\n   :members:\n```" for path in paths)


def _extended(found: type) -> list[type]:
    """Classes of the package that a class extends and that have no place of their own in the reference."""
    bases = [base for base in found.__mro__[1:] if base.__module__.startswith("errata.")]
    return [base for base in bases if not issubclass(base, Config) and base.__name__ not in errata.__all__]


def _method(name: str, method: Any) -> str:
    """A callable object that edits: all of them are called alike, so `Method` has the arguments."""
    about = f"{method.summary} ({method.source}).".replace("*", r"\*").replace("|", r"\|")
    presets = [f'   * ``preset="{preset}"``: {found.summary}' for preset, found in method.presets.items()]
    lines = [
        "```{eval-rst}",
        f".. py:function:: errata.{name}(model, rewrites, config=None, **settings)",
        "",
        f"   {about} All editors are called alike, see `errata.editors.method.Method`;",
        f"   its :doc:`settings <settings>` are those of ``{method.config.__name__}``.",
        "",
        *presets,
        "```",
    ]
    return "\n".join(lines)


def commands() -> str:
    """Every command, with its help, example, arguments and options."""
    panels: dict[str, list[str]] = {}
    for group, prefix, panel in [(command_line, "", None), *_groups()]:
        for command in group.registered_commands:
            about = _command(f"{prefix}{command.name}", command)
            panels.setdefault(panel or command.rich_help_panel, []).extend(about)
    return "\n".join(line for panel, lines in panels.items() for line in (f"## {panel}", "", *lines))


def _groups() -> Iterator[tuple[typer.Typer, str, str]]:
    for group in command_line.registered_groups:
        yield group.typer_instance, f"{group.name} ", group.rich_help_panel


def _command(name: str, command: CommandInfo) -> list[str]:
    text = [f"### `errata {name}`", ""]
    for paragraph in inspect.cleandoc(command.help or command.callback.__doc__ or "").split("\n\n"):
        text += [escaped(paragraph), ""]
    if command.epilog:
        text += ["```text", command.epilog.removeprefix("Example: "), "```", ""]
    hints = get_type_hints(command.callback, include_extras=True)
    for parameter in inspect.signature(command.callback).parameters.values():
        text += _parameter(parameter, hints[parameter.name])
    return text


def _parameter(parameter: inspect.Parameter, annotation: Any) -> list[str]:
    """A definition of one argument or option: its names, what it means, its default."""
    kind, info = get_args(annotation)[:2] if get_origin(annotation) is Annotated else (annotation, parameter.default)
    if info.hidden:
        return []
    default = None if parameter.default in (info, inspect.Parameter.empty) else parameter.default
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    if isinstance(info, ArgumentInfo):
        names = [info.metavar or parameter.name.upper()]
    elif kind is bool:
        option = f"--{parameter.name.replace('_', '-')}"
        names = names or [f"{option}/--no-{option[2:]}"]
    else:
        value = info.metavar or _metavar(kind)
        names = [f"{option} {value}" for option in names or [f"--{parameter.name.replace('_', '-')}"]]
    about = escaped(info.help or "")
    if default not in (None, False, (), [], ""):
        about += f" Default: `{default}`."
    return [", ".join(f"`{name}`" for name in names), f": {about}", ""]


def _metavar(kind: Any) -> str:
    """Placeholder for an option's value, such as TEXT or paper|reference."""
    while get_origin(kind) in (Union, types.UnionType, list, tuple):  # optional, or repeatable
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}[kind]


def settings() -> str:
    """Every class of settings, with the type, default and meaning of each."""
    for module in pkgutil.walk_packages(errata.__path__, "errata."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    text = []
    for config in sorted(subclasses(Config), key=lambda found: (found.__module__, found.__name__)):
        if not config.model_fields:
            continue
        about = inspect.cleandoc(config.__doc__ or "").partition("\n\n")[0]
        text += [f"## {config.__name__}", "", f"`{config.__module__}`: {escaped(about)}", ""]
        text += ["| setting | values | default | meaning |", "|---|---|---|---|"]
        described = config.described()
        for name, field in config.model_fields.items():
            default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
            text += [f"| `{name}` | {values(field.annotation)} | {default} | {escaped(described[name])} |"]
        text += [""]
    return "\n".join(text)


def subclasses(base: type) -> set[type]:
    below = set(base.__subclasses__())
    return below.union(*map(subclasses, below))


def values(annotation: Any) -> str:
    """A type as people write it: `"a"`, `"b"` or `None`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return ", ".join(values(part) for part in get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{value!r}`" for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):  # Annotated
        return values(get_args(annotation)[0])
    if annotation is type(None):
        return "`None`"
    return f"`{annotation.__name__}`" if isinstance(annotation, type) and not origin else f"`{annotation}`"


def files() -> str:
    """Every file of the package with the first sentence of its docstring, by folder."""
    root = Path(errata.__file__).parent
    folders: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        folder = path.parent.relative_to(root)
        folders.setdefault(Path(*folder.parts[:1]), []).append(path)
    text = []
    for folder, paths in folders.items():
        text += [f"### `{folder if folder.parts else 'errata'}`", "", "| file | is |", "|---|---|"]
        for path in paths:
            about = inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
            sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", about)[0]
            if path.name not in ("__init__.py", "__main__.py") or sentence:
                text.append(f"| `{path.relative_to(root / folder)}` | {escaped(sentence)} |")
        text += [""]
    return "\n".join(text)


WRITERS = {"api": api, "commands": commands, "settings": settings, "files": files}
PAGES = ["reference/python", "reference/command-line", "reference/settings", "explanation/architecture"]


def _fill(app, page: str, source: list[str]) -> None:
    source[0] = re.sub(r"^% from the package: (\w+)$", lambda line: WRITERS[line[1]](), source[0], flags=re.M)


def _escape(app, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Make docstrings plain reStructuredText: bars, as in <|endoftext|>, are text, and options are code."""
    lines[:] = [OPTION.sub(r"``\1``", line if "`" in line else line.replace("|", r"\|")) for line in lines]


def _whole(self: GoogleDocstring) -> tuple[str, list[str]]:
    """A property's docstring as it is: without this, Sphinx takes what stands before a colon for the type."""
    return "", type(self)(self._dedent(self._consume_to_end()), self._config).lines()


def setup(app) -> dict[str, bool]:
    GoogleDocstring._consume_inline_attribute = _whole
    app.connect("autodoc-process-docstring", _escape)
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", lambda *_: PAGES)  # the package may have changed
    return {"parallel_read_safe": True, "parallel_write_safe": True}
