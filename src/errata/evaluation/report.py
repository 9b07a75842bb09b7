"""The paper's Tables 1 and 2, from run folders: rows of numbers with 95 % intervals, and what is best and what fails.

A table is made of blocks, one a run: the unedited model, then its editors, each with the paper's own row below it where
the paper has one. Differences between two rows are paired: over the same records.

A number **fails** where its whole interval (its mean, where it has none) is

- below one half: ES, PS, NS; zsRE's efficacy and paraphrase: most go the wrong way;
- below 0: EM, PM, NM: on average the wrong object is the more probable one;
- below the unedited model's interval: S, RS: not editing does better;
- below 95 % of the unedited model's: GE, zsRE's specificity;
- above twice the unedited model's: essence.

The **best** of a column is the highest mean among a run's editors, where there are several; of essence, a perplexity,
the lowest.
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
from errata.evaluation.published import Published, beside, published
from errata.evaluation.results import UNEDITED, Results, Run
from errata.metrics.counterfact import Probability
from errata.metrics.summary import Estimate, Method, estimate, harmonic_score, paired, paired_harmonic

Source = Literal["run", "paper", "difference"]
Numbers = Mapping[str, Mapping[int, float | None]]

PARTS = ("es", "ps", "ns")  # of S


@dataclass(frozen=True)
class Column:
    """A number of the tables.

    Attributes:
        name: as in `evaluation.results`; "s" for S.
        symbol: at the head of its column.
        group: the paper's word for what it tells of.
        what: it is, in words.
        unit: of what tables show.
        scale: what tables multiply it by.
        own: whether the paper's table has it not.
    """

    name: str
    symbol: str
    group: str
    what: str
    unit: str = "%"
    scale: int = 100
    own: bool = False

    def shown(self, value: float) -> str:
        """A value as tables show it; "–" if there is none."""
        if not math.isfinite(value):
            return "–"
        scaled = round(value * self.scale, 1) + 0.0  # no -0.0
        return f"{scaled:.1f}".replace("-", "−") if abs(scaled) < 1e5 else f"{scaled:.1e}"


COUNTERFACT = (
    Column("s", "S", "Score", "harmonic mean of ES, PS and NS"),
    Column("es", "ES", "Efficacy", "rewrite prompts with P[o*] > P[oᶜ]"),
    Column("em", "EM", "Efficacy", "P[o*] − P[oᶜ] after rewrite prompts", "points"),
    Column("ps", "PS", "Generalization", "paraphrases with P[o*] > P[oᶜ]"),
    Column("pm", "PM", "Generalization", "P[o*] − P[oᶜ] after paraphrases", "points"),
    Column("ns", "NS", "Specificity", "neighborhood prompts with P[oᶜ] > P[o*]"),
    Column("nm", "NM", "Specificity", "P[oᶜ] − P[o*] after neighborhood prompts", "points"),
    Column("ge", "GE", "Fluency", "entropy of bi- and trigrams of generated texts", "bits × 100"),
    Column("rs", "RS", "Consistency", "cosine of TF-IDF vectors of generated and reference texts", "× 100"),
    Column("ats", "AS", "Attribute", "attribute prompts with P[o*] > P[oᶜ]", own=True),
    Column("atm", "AM", "Attribute", "P[o*] − P[oᶜ] after attribute prompts", "points", own=True),
    Column("essence", "Essence", "Essence", "perplexity of what is known of the subject", "perplexity", 1, own=True),
)
ZSRE = (
    Column("efficacy", "Efficacy", "", "target tokens of edited questions that are the most probable"),
    Column("paraphrase", "Paraphrase", "", "target tokens of paraphrased questions that are the most probable"),
    Column("specificity", "Specificity", "", "target tokens of other questions that are the most probable"),
)

LEGEND_FAILS = {
    "counterfact": "ES, PS or NS below 50; EM, PM or NM below 0; S or RS below the unedited model's interval; GE below "
    "95 % of the unedited model's; essence above twice the unedited model's",
    "zsre": "efficacy or paraphrase below 50; specificity below 95 % of the unedited model's",
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
        short: what stands for a name that is too long to be shown; the legend tells its settings.
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
        """What stands before the row."""
        if self.source == "paper":
            return f"{self.name}, paper"
        name = self.short or self.name
        return name if self.complete else f"{name} ({self.measured} of {self.of})"


@dataclass(frozen=True)
class Table:
    """Table 1 (zsRE) or Table 2 (CounterFact) of some runs.

    Attributes:
        kind: "counterfact" or "zsre".
        probability: what P is.
        interval: how intervals were made.
        columns: that some row has a number for, in the paper's order.
        blocks: rows of each run.
        differences: between two rows, of each run that has both.
        sets: what the records of the runs are called.
    """

    kind: str
    probability: Probability
    interval: Method
    columns: tuple[Column, ...]
    blocks: tuple[tuple[Row, ...], ...]
    differences: tuple[Row, ...] = ()
    sets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What it is a table of."""
        name = "CounterFact" if self.kind == "counterfact" else "zsRE"
        others = [each for each in self.sets if Path(each).stem.casefold() != name.casefold()]
        if others:
            name = f"{name}'s numbers on {', '.join(others)}"
        models = list(dict.fromkeys(block[0].model for block in self.blocks))
        return f"{name}: {', '.join(models)}"

    def legend(self) -> list[str]:
        """What the columns and the marks say, in sentences."""
        symbols = "; ".join(f"{each.symbol}, {each.what}" for each in self.columns)
        ways = {"normal": "the normal approximation", "bootstrap": "10,000 resamples of the records"}
        said = [f"{symbols}. All × 100" + (" but essence." if "essence" in self._names else ".")]
        if self.kind == "counterfact":
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
        said.append(f"Fails, the whole interval: {LEGEND_FAILS[self.kind]}.")
        return said

    @property
    def _names(self) -> set[str]:
        return {each.name for each in self.columns}


def table(
    runs: Sequence[Run],
    probability: Probability = "per_token",
    interval: Method = "normal",
    compare: tuple[str, str] | None = None,
    seed: int = 0,
) -> Table:
    """The table of one or several runs, of one kind.

    Args:
        runs: each becomes a block.
        probability: what P is in CounterFact's numbers.
        interval: how intervals are made.
        compare: names of two rows, to tell the first minus the second.
        seed: of the bootstrap.

    Raises:
        ConfigError: if there is no run, or one twice, they are of different kinds, or no run has the rows to compare.
    """
    _require_together(runs)
    columns = COUNTERFACT if runs[0].kind == "counterfact" else ZSRE
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
    return Table(runs[0].kind, probability, interval, kept, tuple(blocks), tuple(differences), named)


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
        if run.kind != runs[0].kind:
            raise ConfigError(
                f"{runs[0].folder} is of {runs[0].kind} and {run.folder} of {run.kind}, whose numbers have no column "
                "in common: report each by itself"
            )


def _block(
    run: Run, columns: Sequence[Column], probability: Probability, interval: Method, seed: int
) -> tuple[Row, ...]:
    def row(results: Results) -> Row:
        numbers = run.numbers(results, probability)
        return _row(run, results, _estimates(numbers, columns, interval, seed))

    unedited = row(run.unedited)
    editors = _marked([row(results) for results in run.edited.values()], unedited)
    methods = {results.name: str(results.settings.get("editor", "")) for results in run.edited.values()}
    papers = beside(run.kind, unedited.model, methods)
    rows = [unedited, *_paper(unedited, published(run.kind, unedited.model))]
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


def _estimates(numbers: Numbers, columns: Sequence[Column], interval: Method, seed: int) -> dict[str, Estimate]:
    found = {}
    for name in (column.name for column in columns):
        if name == "s":
            found[name] = harmonic_score({part: list(numbers[part].values()) for part in PARTS}, interval, seed)
        else:
            found[name] = estimate(list(numbers[name].values()), interval, seed)
    return _there(found)


def _there(found: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: each for name, each in found.items() if not math.isnan(each.mean)}


def _paper(row: Row, found: Published | None) -> list[Row]:
    if found is None:
        return []
    values = {
        name: Estimate(round(number / 100, 5), math.nan, math.nan, found.records)
        for name, number in found.numbers.items()
    }
    name = found.editor or UNEDITED
    return [Row(name, "paper", row.model, row.run, values, found.records, found.records)]


def _marked(rows: Sequence[Row], unedited: Row) -> list[Row]:
    best: dict[str, float] = {}
    for row in rows if len(rows) > 1 else ():
        for name, found in row.values.items():
            better = min if name == "essence" else max
            best[name] = better(best.get(name, found.mean), found.mean)
    return [
        replace(
            row,
            strong=frozenset(name for name, found in row.values.items() if found.mean == best.get(name)),
            fails=frozenset(
                name for name, found in row.values.items() if _fails(name, found, unedited.values.get(name))
            ),
        )
        for row in rows
    ]


def _fails(name: str, found: Estimate, unedited: Estimate | None) -> bool:
    """By the rules that the head of this file states; what cannot be told is no failure."""
    low, high = _ends(found)
    if name in {"es", "ps", "ns", "efficacy", "paraphrase"}:
        return high < 0.5
    if name in {"em", "pm", "nm"}:
        return high < 0
    if unedited is None:
        return False
    if name in {"s", "rs"}:
        return high < _ends(unedited)[0]
    if name in {"ge", "specificity"}:
        return high < 0.95 * unedited.mean
    return name == "essence" and low > 2 * unedited.mean


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
    for name in (column.name for column in columns):
        if name == "s":
            ours, theirs = ({part: numbers[part] for part in PARTS} for numbers in (one, other))
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
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(known)}"
            raise ConfigError(f"there is no row {name!r} to compare: {hint}")
    if first == second:
        raise ConfigError(f"{first} compared with itself differs in nothing: name two rows")
