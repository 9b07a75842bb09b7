"""Docstrings and messages are in plain English: patterns that make a reader decode a sentence are kept out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "errata"
RIDDLES = re.compile(r"(What|Of|As|That|Those|Whose|Where|How|Which|When|Who)\b")
PHRASES = (r"\bdo(es)? not do\b", r"\bchoose of\b", r"(?<!there )\b(is|are) no (?!longer|more|less)[a-z]+")
FILES = sorted(SOURCE.rglob("*.py"))


def docstrings(path: Path) -> list[tuple[str, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "name", path.stem), text) for node in nodes if (text := ast.get_docstring(node))]


def test_there_are_files():
    assert len(FILES) > 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_say_what_a_thing_is(path):
    riddles = [f"{name}: {text.splitlines()[0]}" for name, text in docstrings(path) if RIDDLES.match(text)]
    assert not riddles


@pytest.mark.parametrize("phrase", PHRASES)
def test_messages_and_comments_avoid_phrases(phrase):
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(phrase, line)
    ]
    assert not found
