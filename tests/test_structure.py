"""How files depend on each other: no circle of imports in the package, and no test module that imports another."""

from __future__ import annotations

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
