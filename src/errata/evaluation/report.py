"""The paper's Tables 1 and 2, from run folders: numbers with 95 % intervals; the best and the failing ones are marked.

A table consists of blocks, one for each run: the unedited model, then its editors, each with the paper's own row below
it where the paper has one. Differences between two rows are paired: over the same records.

A number **fails** where its whole interval (its mean, where it has none) is beyond the bound of its column
(`tasks.task.Column.fails`). The **best** of a column is the best mean among a run's editors, where there are several.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from errata.base.display import printable
from errata.base.errors import ConfigError
from errata.base.files import resolved
from errata.evaluation.results import UNEDITED, Results, Run
from errata.metrics.summary import Estimate, Method, paired, paired_harmonic
from errata.tasks.task import Column, PaperRow, Probability, Task, estimates

Source = Literal["run", "paper", "difference"]
Numbers = Mapping[str, Mapping[int, float | None]]

_BOUNDS = {
    "below half": "below 50",
    "below zero": "below 0",
    "below unedited": "below the unedited model's interval",
    "below 95 %": "below 95 % of the unedited model's",
    "above twice": "above twice the unedited model's",
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the editor's, or "unedited"; of a difference, both.
        source: "run"; "paper" of a published row; "difference" of one row minus another.
        model: the run's.
        run: its folder, as it was given.
        values: by the columns' names, fractions (GE: bits; essence: perplexity); without those that it has not.
        measured: how many records it is over.
        of: how many it is to be over.
        failures: edits that could not be made; None of the unedited model and of the paper.
        disabling: edits that make the model say other things of everything; None if that was not measured.
        seconds: a record, on the mean; None if not known.
        strong: names of columns: best of the editors; of a difference, those with 0 outside of the interval.
        fails: names of columns.
        short: a short name if the name is too long for display; the legend has its settings.
    """

    name: str
    source: Source
    model: str
    run: Path
    values: Mapping[str, Estimate]
    measured: int
    of: int
    failures: int | None = None
    disabling: int | None = None
    seconds: float | None = None
    strong: frozenset[str] = frozenset()
    fails: frozenset[str] = frozenset()
    short: str = ""

    @property
    def complete(self) -> bool:
        """Whether all records were measured."""
        return self.measured >= self.of

    @property
    def label(self) -> str:
        """Label of the row."""
        if self.source == "paper":
            return f"{self.name}, paper"
        name = self.short or self.name
        return name if self.complete else f"{name} ({self.measured} of {self.of})"


@dataclass(frozen=True)
class Table:
    """Table 1 (zsRE) or Table 2 (CounterFact) of some runs.

    Attributes:
        task: the task of all runs.
        probability: the definition of P.
        interval: how intervals were made.
        columns: that some row has a number for, in the paper's order.
        blocks: rows of each run.
        differences: between two rows, of each run that has both.
        sets: names of the runs' record sets.
    """

    task: Task
    probability: Probability
    interval: Method
    columns: tuple[Column, ...]
    blocks: tuple[tuple[Row, ...], ...]
    differences: tuple[Row, ...] = ()
    sets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Title of the table."""
        name = self.task.title
        others = [each for each in self.sets if Path(each).stem.casefold() != name.casefold()]
        if others:
            name = f"{name}'s numbers on {', '.join(others)}"
        models = list(dict.fromkeys(block[0].model for block in self.blocks))
        return f"{name}: {', '.join(models)}"

    def legend(self) -> list[str]:
        """Meaning of the columns and marks, in sentences."""
        symbols = "; ".join(f"{each.symbol}, {each.what}" for each in self.columns)
        ways = {"normal": "the normal approximation", "bootstrap": "10,000 resamples of the records"}
        plain = [column.symbol.lower() for column in self.columns if column.scale == 1]
        said = [f"{symbols}. All × 100" + (f" but {', '.join(plain)}." if plain else ".")]
        if self.compares:
            mean = "exp of the mean log-probability per token" if self.probability == "per_token" else "of all tokens"
            said.append(f"P is the object's probability, {mean}.")
        said.append(
            f"Intervals are of 95 %, over records, from {ways[self.interval]}. An edit that could not be made counts "
            "as the unedited model."
        )
        if any(row.source == "paper" for block in self.blocks for row in block):
            said.append("Rows of the paper are as Meng et al. (2022) print them.")
        if self.differences:
            said.append("Differences are paired: over the records that both rows have.")
        long = {row.short: row.name for block in self.blocks for row in block if row.short}
        if long:
            said.append(printable("; ".join(f"{short} is {name}" for short, name in long.items()) + "."))
        bounds = {bound: [column.symbol for column in self.columns if column.fails == bound] for bound in _BOUNDS}
        fails = "; ".join(f"{_listed(names)} {_BOUNDS[bound]}" for bound, names in bounds.items() if names)
        if fails:
            said.append(f"Fails, the whole interval: {fails}.")
        return said

    @property
    def compares(self) -> bool:
        """Whether the task compares probabilities of two objects."""
        return bool(self.task.preferred)


def table(
    runs: Sequence[Run],
    probability: Probability = "per_token",
    interval: Method = "normal",
    compare: tuple[str, str] | None = None,
    seed: int = 0,
) -> Table:
    """The table of one or more runs of one task.

    Args:
        runs: each becomes a block.
        probability: the definition of P in CounterFact's numbers.
        interval: how intervals are made.
        compare: names of two rows, to tell the first minus the second.
        seed: seed of the bootstrap.

    Raises:
        ConfigError: if there is no run, or one twice, they are of different tasks, or no run has the rows to compare.
    """
    _require_together(runs)
    columns = runs[0].task.columns
    blocks = [_block(run, columns, probability, interval, seed) for run in runs]
    short = _short_names(row.name for block in blocks for row in block if row.source == "run")
    blocks = [tuple(replace(row, short=short.get(row.name, "")) for row in block) for block in blocks]
    differences = _differences(runs, compare, columns, probability, interval, seed) if compare else []
    if compare and short.keys() & set(compare):
        differences = [replace(row, short=_minus(*(short.get(name, name) for name in compare))) for row in differences]
    there = {name for block in blocks for row in block for name in row.values}
    kept = tuple(column for column in columns if column.name in there)
    sets = (str(run.settings.get("records", {}).get("source", "")) for run in runs)
    named = tuple(dict.fromkeys(filter(None, sets)))
    return Table(runs[0].task, probability, interval, kept, tuple(blocks), tuple(differences), named)


# ---------------------------------------------------------------------------------------------
# Rows


_LONGEST_NAME = 20  # characters that every format has room for


def _short_names(rows: Iterable[str]) -> dict[str, str]:
    """Short names of rows that have long automatic ones: ft-l#2 for ft-l-layer=2,epsilon=0.0005."""
    names = dict.fromkeys(rows)
    short: dict[str, str] = {}
    for name in names:
        automatic = re.match(r"(.+?)-[a-z_]+=", name)
        if automatic and len(name) > _LONGEST_NAME:
            number = 2
            while f"{automatic[1]}#{number}" in (*names, *short.values()):
                number += 1
            short[name] = f"{automatic[1]}#{number}"
    return short


def _require_together(runs: Sequence[Run]) -> None:
    if not runs:
        raise ConfigError("there is no run to report: name at least one run folder")
    folders = [resolved(run.folder) for run in runs]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise ConfigError(f"{runs[place].folder} is named twice, and would stand in the table twice: name it once")
    for run in runs:
        if run.task.name != runs[0].task.name:
            raise ConfigError(
                f"{runs[0].folder} is of {runs[0].task.title} and {run.folder} of {run.task.title}, whose numbers do "
                "not compare: report each by itself"
            )


def _block(
    run: Run, columns: Sequence[Column], probability: Probability, interval: Method, seed: int
) -> tuple[Row, ...]:
    def row(results: Results) -> Row:
        numbers = {name: list(by_case.values()) for name, by_case in run.numbers(results, probability).items()}
        return _row(run, results, _there(estimates(columns, numbers, interval, seed)))

    unedited = row(run.unedited)
    editors = _marked([row(results) for results in run.edited.values()], unedited, columns)
    methods = {results.name: str(results.settings.get("editor", "")) for results in run.edited.values()}
    papers = _beside(run.task, unedited.model, methods)
    rows = [unedited, *_paper(unedited, run.task.paper_row(unedited.model))]
    for each in editors:
        rows += [each, *_paper(each, papers.get(each.name))]
    return tuple(rows)


def _row(run: Run, results: Results, values: Mapping[str, Estimate]) -> Row:
    refused = {case for case, each in run.unedited.by_case.items() if each.answers is None}  # by the model itself
    found = [each for each in results.by_case.values() if each.case not in refused]
    # An edit that failed before the unedited model was asked has no numbers yet.
    measured = sum(each.answers is not None or each.case in run.unedited.by_case for each in found)
    health = [each.health for each in found if each.health is not None]
    edited = results.name != UNEDITED
    return Row(
        name=results.name,
        source="run",
        model=str(run.settings.get("model", "")),
        run=run.folder,
        values=values,
        measured=measured,
        of=len(run.records),
        failures=sum(each.answers is None for each in found) if edited else None,
        disabling=sum(bool(each.get("disabling")) for each in health) if health else None,
        seconds=fmean(sum(each.seconds.values()) for each in found) if any(each.seconds for each in found) else None,
    )


def _there(found: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: each for name, each in found.items() if not math.isnan(each.mean)}


def _paper(row: Row, found: PaperRow | None) -> list[Row]:
    if found is None:
        return []
    values = {
        name: Estimate(round(number / 100, 5), math.nan, math.nan, found.records)
        for name, number in found.numbers.items()
    }
    name = found.editor or UNEDITED
    return [Row(name, "paper", row.model, row.run, values, found.records, found.records)]


def _beside(task: Task, model: str, rows: Mapping[str, str]) -> dict[str, PaperRow]:
    """The paper's rows for the table, each once, found by the name of our row or else of its editor.

    Args:
        task, model: as of `Task.paper_row`.
        rows: by the names of rows, in order, those of their editors; "" where it is not known.
    """
    found: dict[str, PaperRow] = {}
    for row, name in [*((row, row) for row in rows), *rows.items()]:
        paper = task.paper_row(model, name) if name else None
        if row not in found and paper and paper not in found.values():
            found[row] = paper
    return found


def _marked(rows: Sequence[Row], unedited: Row, columns: Sequence[Column]) -> list[Row]:
    """The rows with the best of each column and what fails."""
    best: dict[str, float] = {}
    for column in columns if len(rows) > 1 else ():
        means = [row.values[column.name].mean for row in rows if column.name in row.values]
        if means:
            best[column.name] = min(means) if column.lower_is_better else max(means)
    return [
        replace(
            row,
            strong=frozenset(name for name, found in row.values.items() if found.mean == best.get(name)),
            fails=frozenset(
                column.name
                for column in columns
                if column.name in row.values
                and _fails(column, row.values[column.name], unedited.values.get(column.name))
            ),
        )
        for row in rows
    ]


def _fails(column: Column, found: Estimate, unedited: Estimate | None) -> bool:
    """Whether the whole interval is beyond the column's bound; False where that cannot be told."""
    low, high = _ends(found)
    if column.fails == "below half":
        return high < 0.5
    if column.fails == "below zero":
        return high < 0
    if unedited is None:
        return False
    if column.fails == "below unedited":
        return high < _ends(unedited)[0]
    if column.fails == "below 95 %":
        return high < 0.95 * unedited.mean
    return column.fails == "above twice" and low > 2 * unedited.mean


def _listed(names: Sequence[str]) -> str:
    """A, B or C."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _ends(found: Estimate) -> tuple[float, float]:
    return (found.mean, found.mean) if math.isnan(found.low) else (found.low, found.high)


# ---------------------------------------------------------------------------------------------
# Differences


def _differences(
    runs: Sequence[Run],
    names: tuple[str, str],
    columns: Sequence[Column],
    probability: Probability,
    interval: Method,
    seed: int,
) -> list[Row]:
    _require_rows(runs, names)
    both = [run for run in runs if all(name in _rows(run) for name in names)]
    if not both:
        raise ConfigError(
            f"no run has both {names[0]} and {names[1]}, and differences are of one model on the same records: "
            "evaluate both into one folder"
        )
    return [_difference(run, names, columns, probability, interval, seed) for run in both]


def _difference(
    run: Run,
    names: tuple[str, str],
    columns: Sequence[Column],
    probability: Probability,
    interval: Method,
    seed: int,
) -> Row:
    one, other = (run.numbers(_rows(run)[name], probability) for name in names)
    found = {}
    for column in columns:
        name = column.name
        if column.harmonic:
            ours, theirs = ({part: numbers[part] for part in column.harmonic} for numbers in (one, other))
            found[name] = paired_harmonic(ours, theirs, interval, seed)
        else:
            found[name] = paired(one[name], other[name], interval, seed)
    values = _there(found)
    apart = frozenset(name for name, each in values.items() if each.low > 0 or each.high < 0)
    common = len(next(iter(one.values())).keys() & next(iter(other.values())).keys())
    model = str(run.settings.get("model", ""))
    return Row(_minus(*names), "difference", model, run.folder, values, common, len(run.records), strong=apart)


def _minus(one: str, other: str) -> str:
    return f"{one} − {other}"


def _rows(run: Run) -> dict[str, Results]:
    return {UNEDITED: run.unedited, **run.edited}


def _require_rows(runs: Sequence[Run], names: Iterable[str]) -> None:
    known: dict[str, Any] = {name: None for run in runs for name in _rows(run)}
    first, second = names
    for name in (first, second):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"there is no row {name!r} to compare: {hint}")
    if first == second:
        raise ConfigError(f"{first} compared with itself differs in nothing: name two rows")
