"""`errata report`: the paper's tables and a page, from run folders."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from errata.base.display import printable
from errata.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Shown

    from errata.evaluation.formats import Panel
    from errata.evaluation.report import Table

Format = Literal["table", "markdown", "latex", "csv", "json"]

_LABEL = 24  # characters of the column of names, at most: longer names wrap
_STYLES = {"run": "", "paper": "dim italic", "difference": ""}


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, written by errata evaluate --out.")],
    format: Annotated[
        Optional[Format],  # noqa: UP045
        typer.Option(help="Format of the output. By default a table, or the format of --out's ending."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write to this file and not to the terminal: .txt, .md, .tex, .csv or .json."),
    ] = None,
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File for an .html page with every record."),
    ] = None,
    compare: Annotated[
        Optional[tuple[str, str]],  # noqa: UP045
        typer.Option(help="Compare two rows: the first minus the second, over the same records."),
    ] = None,
    probability: Annotated[
        Literal["per_token", "total"],
        typer.Option(
            help="Probability of an object: mean over its tokens, as in the paper's tables, or of all tokens."
        ),
    ] = "per_token",
    interval: Annotated[Literal["normal", "bootstrap"], typer.Option(help="Method for the 95 % intervals.")] = "normal",
    seed: options.Seed = 0,
) -> None:
    """Show runs as the paper's Table 2 (CounterFact) or 1 (zsRE), with the paper's own rows; no model is needed.

    Unfinished runs can be shown too. CSV and JSON hold fractions, not percent.
    """
    from errata.base.files import write_text
    from errata.cli import show
    from errata.evaluation.formats import as_text
    from errata.evaluation.report import table
    from errata.evaluation.results import Run

    wanted = _wanted(format, out)
    if page:
        options.require_ending(page, [".html"], "a page")
    options.require_apart({"--out": out, "--page": page})
    options.require_outputs(out, page)
    loaded = [Run.load(folder) for folder in runs]
    found = table(loaded, probability, interval, compare, seed)
    if page:
        from errata.evaluation.page import write_page

        write_page(page, loaded, found)
    if out:
        write_text(out, _plain(found) if wanted == "table" else as_text(found, wanted))
        show.written(out, page)
    elif wanted == "table":
        _show(found, show.console())
        show.written(page)
    else:
        sys.stdout.write(as_text(found, wanted))


def _wanted(chosen: Format | None, out: Path | None) -> str:
    """The format that --format and the ending of --out say.

    Raises:
        ConfigError: if the ending is unknown, or they say different things.
    """
    from errata.base.errors import ConfigError
    from errata.evaluation.formats import ENDINGS

    if out is None:
        return chosen or "table"
    options.require_ending(out, list(ENDINGS.values()), "a table")
    named = next(name for name, ending in ENDINGS.items() if ending == out.suffix.lower())
    if chosen not in {None, named}:
        raise ConfigError(
            f"--format is {chosen}, and the ending of {out} says {named}: leave --format out, or end the file on "
            f"{ENDINGS[chosen or named]}"
        )
    return named


def _plain(found: Table) -> str:
    """The terminal's table for a file: no colours, as wide as need be; marks are * and !."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, color_system=None)
    _show(found, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _show(found: Table, console: Console) -> None:
    from errata.evaluation.formats import STRONG, panels

    colours = console.color_system is not None
    for panel in panels(found):
        _show_panel(panel, console, colours)
    marks = f"Bold: {STRONG}. Red: fails." if colours else f"*: {STRONG}. !: fails."
    for line in (*found.legend(), marks):
        console.print(printable(line), highlight=False, markup=False)


def _show_panel(panel: Panel, console: Console, colours: bool) -> None:
    """Show a panel; columns that do not fit are shown below, in further tables."""
    from rich.text import Text

    from errata.cli import show

    def widest(columns: Sequence[int]) -> Shown:
        return max(_tables(panel, columns, colours), key=lambda each: console.measure(each).maximum)

    widths = [width for _, width in panel.groups] or [1] * len(panel.heads)
    groups = [range(end - width, end) for width, end in zip(widths, accumulate(widths), strict=True)]
    console.print(Text(printable(panel.title), style="bold"))
    for columns in show.side_by_side(widest, groups, console.width):
        for each in _tables(panel, columns, colours):
            console.print(each)


def _tables(panel: Panel, columns: Sequence[int], colours: bool) -> list[Shown]:
    """A block with a heading is a table of its own: a heading would have to fit into the column of names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown: list[Shown] = []
    for heading, lines in panel.blocks:
        if heading or not shown:
            title = Text(printable(heading)) if heading else None
            shown.append(Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD))
            shown[-1].padding = 0, 1, 0, 0
            shown[-1].add_column("", overflow="fold", max_width=_LABEL)
            for i in columns:
                shown[-1].add_column(Text(panel.heads[i]), justify="right", no_wrap=True)
        shown[-1].add_section()
        for line in lines:
            cells = []
            for cell in (line.cells[i] for i in columns):
                style = ("bold " * cell.strong + "red" * cell.fails) if colours else ""
                marks = "" if colours else "*" * cell.strong + "!" * cell.fails
                text = Text(cell.text + marks, style=style)
                cells.append(text.append(f" {cell.spread}", style="dim not bold") if cell.spread else text)
            shown[-1].add_row(Text(printable(line.label)), *cells, style=_STYLES[line.source])
    return shown
