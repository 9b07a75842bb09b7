"""The docs site: what is written from the package is complete, and no page needs the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pytest
import typer

import errata
from errata.base.config import Config
from errata.cli.app import app

pytest.importorskip("sphinx", reason="Sphinx 9 needs Python 3.11")
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))

import from_package
import offline


def commands(group, above=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def test_every_command_is_documented_with_its_options():
    text = from_package.commands()
    found = list(commands(typer.main.get_command(app)))
    assert len(found) > 15
    for name, command in found:
        part = text.split(f"### `errata {name}`\n")[1].split("\n### ")[0]
        for parameter in command.params:
            if not parameter.hidden and parameter.param_type_name == "option":
                assert all(option in part for option in parameter.opts), (name, parameter.opts)


def test_every_name_of_the_package_is_documented():
    text = from_package.api()
    for name in errata.__all__:
        assert name == "__version__" or f"errata.{name}\n" in text or f"errata.{name}(" in text, name


def test_attributes_that_a_class_has_from_another_are_documented():
    text = from_package.api()
    for path in ("errata.edits.content.Content", "errata.models.decoder.Decoder"):
        assert f".. autoclass:: {path}\n" in text, path


def test_every_setting_is_documented():
    text = from_package.settings()
    classes = [found for found in from_package.subclasses(Config) if found.model_fields]
    assert {"RomeConfig", "TraceConfig", "TrainingConfig"} <= {found.__name__ for found in classes}
    for found in classes:
        part = text.split(f"## {found.__name__}\n")[1].split("\n## ")[0]
        rows = dict(line.strip("| ").split(" | ", 1) for line in part.splitlines() if line.startswith("| `"))
        assert set(rows) == {f"`{name}`" for name in found.model_fields}
        assert all(row.rpartition(" | ")[2] for row in rows.values()), found


def test_every_file_is_described():
    text = from_package.files()
    root = Path(errata.__file__).parent
    for path in root.rglob("*.py"):
        if not path.name.startswith("__"):
            folder, _, rest = str(path.relative_to(root)).partition("/")
            part = text.split(f"### `{folder if rest else 'errata'}`\n")[1].split("\n### ")[0]
            assert f"| `{rest or folder}` | " in part, path


def test_types_are_written_as_people_write_them():
    assert from_package.values(int | None) == "`int`, `None`"
    assert from_package.values(Literal["a", 2]) == "`'a'`, `2`"


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://cdn.example/mathjax.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/x.css" />', 1),
        ("body { background: url('http://example.org/a.png') }", 1),
        ("@import 'https://fonts.example/x.css';", 1),
        ('<script src="_static/furo.js"></script><a href="https://arxiv.org">paper</a>', 0),
        ("body { background: url(a.png) }", 0),
    ],
)
def test_what_a_page_loads_from_the_network_is_seen(text, loads):
    assert len(offline.loaded_from_network(text)) == loads
