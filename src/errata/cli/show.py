"""Results as tables and lines on the terminal, or as JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from errata.base.display import printable
from errata.base.files import require_there
from errata.cli import progress_lines
from errata.plots.drawing import part_name
from errata.tracing.result import ROLES

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.tracing.average import AverageEffects
    from errata.tracing.result import CausalTrace


def console() -> Console:
    """Standard output, as wide as it is now."""
    return Console()


def as_json(value: Any) -> None:
    """Print one JSON object; control characters, and characters that the terminal's encoding lacks, are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    plain = str(sys.stdout.encoding).casefold().replace("-", "") == "utf8"
    sys.stdout.write(re.sub(_NO_TEXT if plain else r"[^\n -~]", _json_escape, text) + "\n")


_NO_TEXT = "[\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if found[0] != "\x7f" else "\\u007f"


@contextlib.contextmanager
def progress(what: str, unit: str = "") -> Iterator[Any]:
    """A bar on standard error, with time left; call what it yields with (done, of). No terminal: a line a minute."""
    errors = Console(stderr=True)
    columns = (
        TextColumn(f"{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Time left is judged by the last hour: steps that take minutes must count too.
    with (
        progress_lines.stage(what) as stages,
        Progress(
            *columns, console=errors, transient=True, disable=not errors.is_terminal, speed_estimate_period=3600
        ) as bar,
    ):
        task = bar.add_task(what, total=None)

        def tell(done: int, of: int | None) -> None:
            bar.update(task, completed=done, total=of)
            stages[-1] = f"{what}: {done}{'' if of is None else f' of {of}'} {unit}".rstrip()

        yield tell


@contextlib.contextmanager
def going_on(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Like `progress`, for work that is saved as it is done: Ctrl-C exits with code 130 and says how far it got."""
    come = 0, 0
    try:
        with progress(what, unit) as bar:

            def tell(done: int, of: int) -> None:
                nonlocal come
                come = done, of
                bar(done, of)

            yield tell
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {come[0]} of {come[1]} {unit} are there, and the same command goes on", err=True)
        raise typer.Exit(130) from None


def line(text: str) -> None:
    """Print a sentence, wrapped."""
    console().print(printable(text), highlight=False, markup=False)


def written(*paths: Path | None) -> None:
    """Print the names of the written files.

    Raises:
        OutputError: if one is not there any more.
    """
    for path in filter(None, paths):
        require_there(path)
        line(f"written: {path}")


def percent(probability: float) -> str:
    """A probability as text, in percent."""
    return f"{100 * probability:.1f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table of texts, wrapped."""
    console().print(_table(columns, rows, title))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    shown = Table(
        title=None if title is None else Text(printable(title), style="italic"),
        title_justify="left",
        header_style="bold",
    )
    for column in columns:
        shown.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown


def side_by_side(
    build: Callable[[Sequence[int]], Table], groups: Sequence[Sequence[int]], room: int
) -> list[tuple[int, ...]]:
    """Columns of each table when a table is split so that none is wider than the terminal.

    Tables are as few as can be, and then the widest of them is as narrow as can be.

    Args:
        build: the table of some of the columns.
        groups: columns that stay together.
        room: the terminal's width.
    """
    unlimited = Console(width=10**4).options

    @functools.cache
    def width(columns: tuple[int, ...]) -> int:
        return Measurement.get(console(), unlimited, build(columns)).maximum

    def divided(room: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for group in map(tuple, groups):
            if found and width(found[-1] + group) <= room:
                found[-1] += group
            else:
                found.append(group)
        return found

    found = divided(room)
    while len(narrower := divided(max(map(width, found), default=0) - 1)) <= len(found) and narrower != found:
        found = narrower
    return found


def effects(trace: CausalTrace) -> None:
    """Print the indirect effects of the first part in percentage points: tokens as rows, layers as columns."""
    part = next(iter(trace.restored))
    values = 100 * trace.indirect_effect(part)
    best = _best(trace)[:2]
    shown = Table(
        title=f"Indirect effects of {part_name(part)}: points of probability\n(tokens × layers; * is the subject)",
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
        name = Text(printable(token.strip()) or repr(token)) + ("*" if first <= index <= last else "")
        cells = [Text(_points(line[i]), style="bold reverse" if (index, i) == best else "") for i in chosen]
        shown.add_row(name, *cells)
    console().print(shown)


def trace_summary(trace: CausalTrace) -> str:
    """Summary of a trace, in one sentence."""
    begin = (
        f"The model answers “{trace.answer.strip()}” with {percent(trace.clean)}; with the subject corrupted, that "
        f"becomes {percent(trace.corrupted)}. "
    )
    if trace.total_effect < 0.01:
        return begin + "The answer hardly depends on the subject, so there is little to trace."
    token, layer, effect = _best(trace)
    whose = "subject's" if trace.subject[0] <= token <= trace.subject[1] else "traced"
    return begin + (
        f"Of the {whose} {part_name(next(iter(trace.restored)))}, the one at “{trace.tokens[token].strip()}” "
        f"({trace.roles[token]}) at layer {layer} restores most: {100 * effect:+.1f} points of "
        f"{100 * trace.total_effect:.1f}."
    )


def _best(trace: CausalTrace) -> tuple[int, int, float]:
    """Token, layer and effect of the best site of the first part: of the subject's, if one of them was traced."""
    part = next(iter(trace.restored))
    first, last = trace.subject
    in_subject = not np.isnan(trace.restored[part][first : last + 1]).all()
    return trace.best(part, in_subject=in_subject)


def health_summary(edit: Edit) -> str:
    """Exactness and side effects of an edit, in two sentences."""
    notes, health = edit.notes, edit.notes.get("health")
    exact = ""
    if "residual" in notes:
        exact = f"Ŵk* = v* holds to {notes['residual']:.1e}"
        if notes["rounding"] > 1e-4:
            exact += f" (the weight's dtype rounds {percent(notes['rounding'])} of the change away)"
        exact += ". "
    if health is None:
        return exact.rstrip()
    drift, ppl = health["drift"], (health["perplexity_before"], health["perplexity_after"])
    if drift is None:
        return f"{exact}What it says of its own texts is not a number any more: a disabling edit."
    return (
        f"{exact}Of texts of its own the model speaks differently by {drift:.2g} nats per token (perplexity "
        f"{ppl[0]:.3g} before, {ppl[1]:.3g} after)" + (": a disabling edit." if health["disabling"] else ".")
    )


def averages(found: AverageEffects, parts: Sequence[str] | None = None, label: str | None = None) -> None:
    """AIE of each role, at the best layer of each part.

    Args:
        found: the averages.
        parts: the columns; those that were not traced stay empty. None: the traced ones.
        label: a first line of the title.
    """
    parts = list(found.mean) if parts is None else parts
    rows = []
    for row, role in enumerate(ROLES):
        cells = []
        for part in parts:
            mean = found.mean.get(part)
            if mean is None or np.isnan(mean[row]).all():
                cells.append("–")
                continue
            layer = int(np.nanargmax(mean[row]))
            half = found.interval[part][row, layer]
            spread = "" if np.isnan(half) else f" ±{_points(100 * half)}"
            cells.append(f"{_points(100 * mean[row, layer])}{spread} at {layer}")
        rows.append([f"{role} ({found.counts[row]})", *cells])
    heads = ("token (facts)", *(part.replace("_", " ") for part in parts))

    def some(columns: Sequence[int], title: str | None = None) -> Table:
        chosen = (0, *columns)
        return _table([heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows], title)

    title = "Average indirect effect: points of probability\n(at the layer where it is highest, ± 95 % interval)"
    if label:
        title = f"{label}\n{title}"
    for number, columns in enumerate(side_by_side(some, [[i + 1] for i in range(len(parts))], console().width)):
        console().print(some(columns, title if number == 0 else None))


def averages_summary(found: AverageEffects) -> str:
    """Summary of the facts in an average, in one sentence."""
    total = found.means["total_effect"]
    spread = "" if total.high is None or total.mean is None else f" ± {100 * (total.high - total.mean):.1f}"
    left_out = ", ".join(f"{count} ({reason})" for reason, count in found.left_out.items() if count)
    return (
        f"{found.facts} facts: the answer has {percent(found.clean)}, with the subject corrupted "
        f"{percent(found.corrupted)}; average total effect {100 * found.total_effect:.1f}{spread} points."
        + (f" Left out: {left_out}." if left_out else "")
    )


def averages_as_json(found: AverageEffects) -> dict[str, Any]:
    """Averages as JSON-able values: probabilities and their differences, not percentage points; null where absent."""
    return {
        "model": found.model,
        "facts": found.facts,
        "means": {name: asdict(mean) for name, mean in found.means.items()},
        "sites": {
            part: {
                role: {name: nulled(column[row]) for name, column in columns.items()} for row, role in enumerate(ROLES)
            }
            for part, columns in found.sites.items()
        },
        "best": {part: {scope: asdict(best) for scope, best in of.items()} for part, of in found.best.items()},
        "left_out": dict(found.left_out),
        "criteria": dict(found.criteria),
        "settings": dict(found.settings),
    }


def nulled(values: np.ndarray) -> list[Any]:
    """An array as lists, with null for NaN, which JSON does not have."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def _points(points: float) -> str:
    return "–" if np.isnan(points) else f"{round(points, 1) + 0.0:.1f}"  # no -0.0
