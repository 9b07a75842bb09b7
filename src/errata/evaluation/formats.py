"""Tables of `evaluation.report` as text: panels for people (Markdown, LaTeX, the terminal, the page), and CSV and JSON.

A table is shown as two panels, narrow enough for a terminal: the paper's numbers, and numbers that the paper does not
report. CSV and JSON hold everything once, one line for each row, as fractions and not × 100 (GE: bits; essence:
perplexity).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from errata.base.display import printable, unformulated
from errata.evaluation.report import Row, Source, Table
from errata.metrics.summary import Estimate, Method
from errata.tasks.task import Column

ENDINGS = {"table": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv", "json": ".json"}

STRONG = "the best of the editors; of a difference, clear of 0"

_NONE = "–"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the number.
        spread: its interval; "" if it has none.
        strong: best among editors; of a difference, clear of 0.
        fails: by the rules of `evaluation.report`.
    """

    text: str
    spread: str = ""
    strong: bool = False
    fails: bool = False


@dataclass(frozen=True)
class Line:
    """A row's name, its source, and its cells."""

    label: str
    source: Source
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Panel:
    """A table for display.

    Attributes:
        title: title of the panel.
        heads: the columns' symbols.
        groups: what adjacent columns tell of, and how many they are; () if nothing.
        blocks: their headings, "" if there is but one, with their lines.
    """

    title: str
    heads: tuple[str, ...]
    groups: tuple[tuple[str, int], ...]
    blocks: tuple[tuple[str, tuple[Line, ...]], ...]


def panels(table: Table) -> list[Panel]:
    """A table as its two panels."""
    paper = [column for column in table.columns if not column.own]
    own = [column for column in table.columns if column.own]

    def scores(columns: list[Column], row: Row) -> tuple[Cell, ...]:
        return tuple(_cell(row, column, table.interval) for column in columns)

    return [
        Panel(
            printable(table.title),
            tuple(column.symbol for column in paper),
            _groups(paper),
            _blocks(table, lambda row: scores(paper, row), ("run", "paper", "difference")),
        ),
        Panel(
            "Behind the numbers",
            (*(column.symbol for column in own), "records", "failed", "disabling", "s / record"),
            (),
            _blocks(table, lambda row: scores(own, row) + _counts(row), ("run", "difference")),
        ),
    ]


def markdown(table: Table) -> str:
    """A table in Markdown: best numbers in bold, failing ones with a ✗."""

    def cell(each: Cell) -> str:
        text = f"{each.text} {each.spread}".strip()
        return (f"**{text}**" if each.strong else text) + (" ✗" if each.fails else "")

    parts = []
    for panel in panels(table):
        lines = [_piped("", *panel.heads), _piped("---", *("---:" for _ in panel.heads))]
        for heading, rows in panel.blocks:
            if heading:
                lines.append(_piped(f"*{_unpiped(heading)}*", *("" for _ in panel.heads)))
            lines += [_piped(_unpiped(row.label), *map(cell, row.cells)) for row in rows]
        parts.append(f"**{_unpiped(panel.title)}**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, _unpiped(_notes(table, f"Bold: {STRONG}. ✗: fails."))]) + "\n"


def latex(table: Table) -> str:
    """A table in LaTeX, with the packages booktabs and xcolor: best numbers in bold, failing ones in red."""

    def cell(each: Cell) -> str:
        text = _escaped(each.text) + (rf" {{\scriptsize {_escaped(each.spread)}}}" if each.spread else "")
        text = rf"\textbf{{{text}}}" if each.strong else text
        return rf"\textcolor{{red}}{{{text}}}" if each.fails else text

    parts = ["% \\usepackage{booktabs, xcolor}"]
    for panel in panels(table):
        lines = [
            f"% {printable(' '.join(panel.title.split()))}",
            rf"\begin{{tabular}}{{l{'r' * len(panel.heads)}}}",
            r"\toprule",
        ]
        if panel.groups:
            spans = (rf"\multicolumn{{{width}}}{{c}}{{{_escaped(name)}}}" for name, width in panel.groups)
            lines += [" & ".join(["", *spans]) + r" \\", " ".join(_rules(panel))]
        lines.append(" & ".join(["", *map(_escaped, panel.heads)]) + r" \\")
        for heading, rows in panel.blocks:
            lines.append(r"\midrule")
            if heading:
                lines.append(rf"\multicolumn{{{len(panel.heads) + 1}}}{{l}}{{\emph{{{_escaped(heading)}}}}} \\")
            lines += [" & ".join([_escaped(row.label), *map(cell, row.cells)]) + r" \\" for row in rows]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    notes = _notes(table, f"Bold: {STRONG}. Red: fails.")
    return "\n\n".join([*parts, _escaped(notes)]) + "\n"


def as_csv(table: Table) -> str:
    """A table as CSV, one line for each row: each number's mean, interval ends, and count of records.

    `short` is what the other formats call a row whose name is too long for them; `probability`, what P is.
    """
    fields = ("mean", "low", "high", "count")
    probability = table.probability if table.compares else ""
    heads = [
        "run",
        "model",
        "row",
        "short",
        "source",
        "probability",
        "interval",
        "measured",
        "of",
        "failures",
        "disabling",
        "seconds",
    ]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*heads, *(f"{column.name}_{field}" for column in table.columns for field in fields)])
    for row in _all(table):
        names = (unformulated(printable(name)) for name in (str(row.run), row.model, row.name, row.short))
        cells = [*names, row.source, probability, table.interval, row.measured, row.of]
        cells += [row.failures, row.disabling, row.seconds]
        for column in table.columns:
            found = row.values.get(column.name)
            numbers = [getattr(found, field) if found else None for field in fields]
            cells += [None if number is None or not math.isfinite(number) else number for number in numbers]
        writer.writerow(cells)
    return written.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """A table as JSON-able values; null where absent."""

    def row(each: Row) -> dict[str, Any]:
        values = {name: _nulled(found) for name, found in each.values.items()}
        marks = {"strong": sorted(each.strong), "fails": sorted(each.fails)}
        return {**asdict(each), "run": str(each.run), "values": values, **marks}

    return {
        "kind": table.task.name,
        "probability": table.probability,
        "interval": table.interval,
        "legend": table.legend(),
        "columns": [_column(column) for column in table.columns],
        "rows": [row(each) for block in table.blocks for each in block],
        "differences": [row(each) for each in table.differences],
    }


def _column(column: Column) -> dict[str, Any]:
    return {name: getattr(column, name) for name in ("name", "symbol", "group", "what", "unit", "scale", "own")}


def as_text(table: Table, kind: str) -> str:
    """A table as text in a format: "markdown", "latex", "csv" or "json"."""
    if kind == "json":
        return json.dumps(as_json(table), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return {"markdown": markdown, "latex": latex, "csv": as_csv}[kind](table)


# ---------------------------------------------------------------------------------------------
# Panels


def _blocks(
    table: Table, cells: Callable[[Row], tuple[Cell, ...]], sources: tuple[Source, ...]
) -> tuple[tuple[str, tuple[Line, ...]], ...]:
    def lines(rows: Iterable[Row]) -> tuple[Line, ...]:
        return tuple(Line(printable(row.label), row.source, cells(row)) for row in rows if row.source in sources)

    blocks = [(_heading(table, block[0]), lines(block)) for block in table.blocks]
    blocks += [(_heading(table, row), lines([row])) for row in table.differences]
    return tuple(blocks)


def _heading(table: Table, row: Row) -> str:
    if len(table.blocks) == 1:
        return ""
    same = sum(block[0].model == row.model for block in table.blocks) > 1
    return printable(f"{row.model}, {row.run}" if same else row.model)


def _cell(row: Row, column: Column, interval: Method) -> Cell:
    found = row.values.get(column.name)
    if found is None:
        return Cell(_NONE)
    marks = column.name in row.strong, column.name in row.fails
    return Cell(column.shown(found.mean), _spread(found, column, interval), *marks)


def _spread(found: Estimate, column: Column, interval: Method) -> str:
    if math.isnan(found.low):
        return ""
    if interval == "normal":
        return f"±{column.shown(found.high - found.mean)}"
    return f"[{column.shown(found.low)}, {column.shown(found.high)}]"


def _counts(row: Row) -> tuple[Cell, ...]:
    records = str(row.measured) if row.complete else f"{row.measured} of {row.of}"
    seconds = _NONE if row.seconds is None else f"{row.seconds:.3g}"
    failed, disabling = (_NONE if each is None else str(each) for each in (row.failures, row.disabling))
    return Cell(records), Cell(failed), Cell(disabling), Cell(seconds)


def _groups(columns: list[Column]) -> tuple[tuple[str, int], ...]:
    if not any(column.group for column in columns):
        return ()
    return tuple((name, len(list(some))) for name, some in groupby(column.group for column in columns))


# ---------------------------------------------------------------------------------------------
# Words


def _notes(table: Table, marks: str) -> str:
    return " ".join([*table.legend(), marks])


def _piped(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _unpiped(text: str) -> str:
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*_`\[\]~$])", r"\\\1", plain)


def _rules(panel: Panel) -> Iterator[str]:
    begin = 2
    for _, width in panel.groups:
        yield rf"\cmidrule(lr){{{begin}-{begin + width - 1}}}"
        begin += width


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "ᶜ": "$^c$",
}


def _escaped(text: str) -> str:
    r"""Text for LaTeX; with {} in front where the \\ or \midrule before it would take its head for an argument."""
    plain = printable(" ".join(text.split()))
    return ("{}" if plain[:1] in {"[", "*"} else "") + "".join(_LATEX.get(sign, sign) for sign in plain)


# ---------------------------------------------------------------------------------------------
# Values


def _all(table: Table) -> Iterator[Row]:
    for block in (*table.blocks, table.differences):
        yield from block


def _nulled(found: Estimate) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(found).items()
    }
