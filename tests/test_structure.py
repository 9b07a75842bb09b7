"""How files depend on each other: no circle of imports in the package, and no test module that imports another."""

from __future__ import annotations

import ast
from pathlib import Path

import grimp
import pytest

TESTS = Path(__file__).parent


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Files of one circle, the first that is found; empty if there is none."""
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> list[str]:
        if file in path:
            return path[path.index(file) :]
        if file in done:
            return []
        found = next((c for other in sorted(imports[file]) if (c := visit(other, [*path, file]))), [])
        done.add(file)
        return found

    return next((c for file in sorted(imports) if (c := visit(file, []))), [])


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("errata", cache_dir=None)  # imports in functions and for type checkers, too
    imports = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    assert sum(map(len, imports.values())) > 500
    assert circle(imports) == []


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
        ({"a": set(), "b": {"b"}}, ["b"]),
    ],
)
def test_a_circle_is_found(imports, found):
    assert circle(imports) == found


def imported(code: str) -> set[str]:
    """First names of all modules that are imported, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_module_is_imported(file):
    """What two need belongs into tests/helpers/."""
    tests = {test.stem for test in TESTS.rglob("test_*.py")}
    assert not imported(file.read_text(encoding="utf-8")) & tests


def test_imports_are_found_in_functions_too():
    assert imported("import a.b\ndef f():\n    from c.d import e\n    from . import g") == {"a", "c", "e", "", "g"}
