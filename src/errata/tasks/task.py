"""A task: a benchmark as one object, which knows how to read entries, which requests to score, and the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from errata.base.facts import Rewrite
from errata.metrics.requests import Request, Scores
from errata.metrics.summary import Estimate, Method, Values, estimate, harmonic_score

Probability = Literal["per_token", "total"]
Scored = Mapping[str, tuple[Scores, ...]]  # scores of each prompt's targets, by the kind of prompt


class Case(Protocol):
    """A record of any task."""

    @property
    def case_id(self) -> int:
        """The record's number in its set."""

    @property
    def rewrite(self) -> Rewrite:
        """The fact and its new object."""


class Measurement(Protocol):
    """The measurements of one record from which columns compute their numbers; `evaluation.results.Result` is one."""

    @property
    def answers(self) -> Scored | None:
        """Scores of the record's prompts; None if there was no edit."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Generated texts."""

    @property
    def entropy(self) -> float | None:
        """N-gram entropy of the texts, in bits."""

    @property
    def reference(self) -> float | None:
        """Similarity of the texts to the reference texts, 0 to 1."""

    @property
    def essence(self) -> float | None:
        """Perplexity of texts about the subject."""


Value = Callable[[Measurement, Probability], "float | None"]


@dataclass(frozen=True)
class Column:
    """A metric: a number for each record, its mean over records, and its display in tables.

    Attributes:
        name: its name in results.
        symbol: the head of its column.
        group: the paper's word for what it measures.
        what: its meaning, in words.
        value: computes it from one record's measurement; None (or NaN) where the record has no such number.
        unit: the unit in tables.
        scale: tables multiply by this.
        own: whether the paper's table does not have it.
        harmonic: names of columns; the number is the harmonic mean of their means, and `value` is not used.
        fails: when it fails, if its whole interval is so: "below half", "below zero", "below unedited" (the unedited
            model's interval), "below 95 %" of the unedited model's mean, "above twice" that.
        lower_is_better: whether the smallest mean is the best.
        axis: axis of its distribution on the page.
    """

    name: str
    symbol: str
    group: str
    what: str
    value: Value = field(default=lambda measurement, probability: None, compare=False)
    unit: str = "%"
    scale: int = 100
    own: bool = False
    harmonic: tuple[str, ...] = ()
    fails: Literal["", "below half", "below zero", "below unedited", "below 95 %", "above twice"] = ""
    lower_is_better: bool = False
    axis: Literal["share", "difference", "range", "log"] = "share"

    def shown(self, value: float) -> str:
        """A value as tables show it; "–" if there is none."""
        if not math.isfinite(value):
            return "–"
        scaled = round(value * self.scale, 1) + 0.0  # no -0.0
        return f"{scaled:.1f}".replace("-", "−") if abs(scaled) < 1e5 else f"{scaled:.1e}"


@dataclass(frozen=True)
class Schema:
    """One form of a task's entries.

    Attributes:
        name: its name, such as "nested".
        keys: an entry with any of these keys has this form ...
        needs: ... if it has all of these ...
        lacks: ... and none of these.
        read: makes a record of an entry and its place in the file, from 0; raises FactError if it makes none.
    """

    name: str
    keys: frozenset[str]
    read: Callable[[Mapping[str, Any], int], Any]
    needs: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()

    def fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry, with normalised keys, has this form."""
        return not self.keys.isdisjoint(entry) and self.needs <= entry.keys() and self.lacks.isdisjoint(entry)


@dataclass(frozen=True)
class PaperRows:
    """Rows of the paper's table of a task on one model.

    Attributes:
        records: how many records they are over, the first by case id.
        columns: names of the columns.
        rows: by editor, as the paper writes it ("" of the unedited model), the numbers as printed, × 100.
    """

    records: int
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table.

    Attributes:
        editor: as the paper writes it; "" of the unedited model.
        records: how many records it is over.
        numbers: numbers by column, as printed, × 100.
    """

    editor: str
    records: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """Training prompts for a trained editor, from one record.

    Attributes:
        equivalents: whole prompts after which the new object is to be said.
        others: complete prompts with the answers that should stay.
    """

    equivalents: tuple[str, ...]
    others: tuple[tuple[str, str], ...]


def estimates(
    columns: Iterable[Column], numbers: Mapping[str, Values], interval: Method = "normal", seed: int = 0
) -> dict[str, Estimate]:
    """The mean of every column over records, with its 95 % interval.

    Args:
        columns: which.
        numbers: of each column that is not a harmonic mean, the numbers of all records, in one order.
        interval: how intervals are made.
        seed: seed of the bootstrap.
    """
    return {
        column.name: harmonic_score({part: numbers[part] for part in column.harmonic}, interval, seed)
        if column.harmonic
        else estimate(numbers[column.name], interval, seed)
        for column in columns
    }


def _nothing(record: Any) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Task:
    """A benchmark.

    Attributes:
        name: its name in files and on the command line.
        title: its name in tables.
        record: the class of its records: a frozen dataclass with `case_id` and `rewrite`.
        schemas: the forms of its entries in files.
        prompts: a record's prompts with their targets, by kind; the first kind is "rewrite", with one prompt.
        columns: its numbers.
        training: training prompts for a trained editor, from a record.
        relation: name of a record's relation; "" if it has none.
        generation: openings of texts that the model is to write.
        titles: for kinds of prompts, their heading on the page.
        preferred: for kinds whose prompts have several targets, the index of the one that should win; 0 elsewhere.
        files: names of its files, which a folder is searched for.
        parts: what `errata data describe` counts: its name, and the parts of a record.
        paper: rows of the paper's table, by the last part of the model's name.
        snippets: whether texts about subjects (`attribute_snippets.json`) belong to its records.
    """

    name: str
    title: str
    record: type[Any]
    schemas: tuple[Schema, ...]
    prompts: Callable[[Any], Mapping[str, tuple[Request, ...]]]
    columns: tuple[Column, ...]
    training: Callable[[Any], Training]
    relation: Callable[[Any], str] = lambda record: ""
    generation: Callable[[Any], Sequence[str]] = _nothing
    titles: Mapping[str, str] = field(default_factory=dict)
    preferred: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    parts: Mapping[str, Callable[[Any], Iterable[Hashable]]] = field(default_factory=dict)
    paper: Mapping[str, PaperRows] = field(default_factory=dict)
    snippets: bool = False

    def requests(self, record: Any) -> list[Request]:
        """Scoring requests of a record, grouped by kind."""
        return [request for kind in self.prompts(record).values() for request in kind]

    def scored(self, record: Any, scores: Sequence[Scores]) -> Scored:
        """Scores of `requests`, by kind."""
        found, begin = {}, 0
        for kind, requests in self.prompts(record).items():
            found[kind] = tuple(scores[begin : begin + len(requests)])
            begin += len(requests)
        return found

    def numbers(self, measurement: Measurement, probability: Probability = "per_token") -> dict[str, float | None]:
        """Every number of one record, by column; None where it has none. Harmonic means exist only over records."""
        values = {column.name: column.value(measurement, probability) for column in self.columns if not column.harmonic}
        return {name: None if value is None or value != value else value for name, value in values.items()}

    def column(self, name: str) -> Column | None:
        """The column with this name."""
        return next((column for column in self.columns if column.name == name), None)

    def paper_row(self, model: str, editor: str = "") -> PaperRow | None:
        """The paper's row of a model and an editor; None if it has none.

        Args:
            model: a name, hub id or folder whose last part is the paper's name of a model: gpt2-xl, gpt-j-6b.
            editor: its name, or that of the row; "" is the unedited model. Case and signs do not matter: "ft_l" is
                FT+L.
        """
        paper = self.paper.get(re.split(r"[/\\]", model.rstrip("/\\"))[-1].casefold())
        names = {_letters(name): name for name in (paper.rows if paper else ())}
        found = names.get(_letters(editor))
        if paper is None or found is None or bool(found) != bool(editor):
            return None
        return PaperRow(found, paper.records, dict(zip(paper.columns, paper.rows[found], strict=True)))

    def with_columns(self, columns: Iterable[Column]) -> Task:
        """The task with more columns."""
        return replace(self, columns=(*self.columns, *columns))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
