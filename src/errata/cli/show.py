"""Results as tables and lines on the terminal, or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from errata.tracing.result import CausalTrace

console = Console()
errors = Console(stderr=True)


def as_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress(what: str, unit: str = "") -> Iterator[Any]:
    """A bar on standard error, with time left; call what it yields with (done, of)."""
    columns = (
        TextColumn(f"{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def percent(probability: float) -> str:
    """A probability as people read it."""
    return f"{100 * probability:.1f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts, which wrap."""
    shown = Table(header_style="bold")
    for column in columns:
        shown.add_column(Text(column), overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def effects(trace: CausalTrace, part: str = "state") -> None:
    """The indirect effects of a part, a row a token, a column a layer, in percentage points."""
    values = 100 * trace.indirect_effect(part)
    early = trace.best(part)[:2]
    shown = Table(
        title=f"Indirect effect of one {part}: points of probability\n(tokens × layers; * is the subject)",
        title_justify="left",
        header_style="bold",
    )
    shown.add_column("token")
    # Every layer in a narrow model; evenly spaced ones, first and last included, where they do not fit.
    layers = range(values.shape[1])
    step = max(1, -(-len(layers) // 12))
    chosen = sorted({*layers[::step], layers[-1]})
    for layer in chosen:
        shown.add_column(str(layer), justify="right")
    first, last = trace.subject
    for index, (token, line) in enumerate(zip(trace.tokens, values, strict=True)):
        name = Text(token.strip() or repr(token)) + ("*" if first <= index <= last else "")
        cells = [
            Text(f"{round(line[i], 1) + 0.0:.1f}", style="bold reverse" if (index, i) == early else "") for i in chosen
        ]
        shown.add_row(name, *cells)
    console.print(shown)


def trace_summary(trace: CausalTrace) -> str:
    """What a trace says, in one sentence."""
    token, layer, effect = trace.best()
    begin = (
        f"The model answers “{trace.answer.strip()}” with {percent(trace.clean)}; with the subject corrupted, that "
        f"becomes {percent(trace.corrupted)}. "
    )
    if trace.total_effect < 0.01:
        return begin + "The answer hardly depends on the subject, so there is little to trace."
    return begin + (
        f"Of the subject's states, the one at “{trace.tokens[token].strip()}” ({trace.roles[token]}) after layer "
        f"{layer} restores most: {100 * effect:+.1f} points of {100 * trace.total_effect:.1f}."
    )
