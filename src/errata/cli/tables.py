"""Input tables of commands, with messages about bad lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.base.display import abridged, tell

if TYPE_CHECKING:
    from errata.data.fact_table import BadLine, FactTable, TableKind
    from errata.data.requests import RequestTable

MOST_TOLD = 100  # bad lines; the others are counted


def tell_bad_lines(bad: Sequence[BadLine], file: Path, unit: str, strict: bool = False) -> None:
    """List bad lines (or entries: `unit`) on standard error.

    Raises:
        FactError: of the first, if strict.
    """
    from errata.base.errors import FactError

    for number, each in enumerate(sorted(bad, key=lambda one: one.line)):
        told = f"{file}, {unit} {each.line}: {each.reason}"
        if strict:
            raise FactError(told)
        if number < MOST_TOLD:
            tell(abridged(" ".join(told.split())), err=True)
    if len(bad) > MOST_TOLD:
        tell(f"{file}: and {len(bad) - MOST_TOLD:,} more bad {'entries' if unit == 'entry' else f'{unit}s'}", err=True)


def tell_unread(unread: Sequence[str], file: Path, kind: TableKind[Any]) -> None:
    """List the columns that are not read, if any, on standard error."""
    from errata.data.fact_table import unread_message

    if unread:
        tell(f"{file}: {unread_message(unread, kind)}", err=True)


def facts_of(file: Path) -> FactTable:
    """A table of facts; its unread columns are reported."""
    from errata.data.fact_table import FACTS, read_facts

    table = read_facts(file)
    tell_unread(table.unread, file, FACTS)
    return table


def requested(file: Path, strict: bool = False) -> RequestTable:
    """A table of requests; its bad lines and contradictions are reported.

    Raises:
        FactError: of the first bad line, if strict.
    """
    from errata.data.requests import REQUESTS, read_requests

    table = read_requests(file)
    tell_unread(table.unread, file, REQUESTS)
    tell_bad_lines(table.bad, file, table.unit, strict)
    for rows in table.contradictions:
        places = ", ".join(f"{row.line} ({row.rewrite.new_object})" for row in rows)
        tell(
            f"{file}: {rows[0].rewrite.text!r} is to have several answers, which mix unless each edit is made with "
            "the earlier ones on: "
            f"{table.unit}s {places}",
            err=True,
        )
    return table
