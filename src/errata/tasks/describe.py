"""Composition of a set, as in the paper's Table 3: counts in total, for each relation and for each record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from errata.data.fact_table import FactTable
from errata.tasks.records import RecordSet


@dataclass(frozen=True)
class Item:
    """Counts of one kind of item in a set.

    Attributes:
        name: name of the kind, such as "paraphrase prompts".
        all: how many there are, those counted again that stand there several times.
        total: how many different ones there are; this is what the paper counts.
        per_relation: mean number of different ones of a relation; None if the set names no relations.
        per_record: mean number of different ones of a record.
    """

    name: str
    all: int
    total: int
    per_relation: float | None
    per_record: float


@dataclass(frozen=True)
class Composition:
    """The composition of a set.

    Attributes:
        kind: name of the task, or "facts".
        records: how many good records (or facts) there are.
        bad: how many entries (or lines) are none.
        relations: how many relations are named.
        items: how much there is of everything.
        digest: sha256 of the file, in hex.
    """

    kind: str
    records: int
    bad: int
    relations: int
    items: tuple[Item, ...]
    digest: str


Parts = Mapping[str, Callable[[Any], Iterable[Hashable]]]

_FACTS: Parts = {
    "subjects": lambda r: (r.fact.subject,),
    "objects": lambda r: (r.fact.object,) if r.fact.object else (),
    "templates": lambda r: (r.fact.prompt,),
    "prompts": lambda r: (r.fact.text,),
}


def describe(found: RecordSet | FactTable) -> Composition:
    """The composition of a set of records, or of a table of facts."""
    if isinstance(found, FactTable):
        return _composition("facts", found.rows, [row.relation for row in found.rows], _FACTS, found)
    relations = [found.task.relation(record) for record in found.records]
    return _composition(found.task.name, found.records, relations, found.task.parts, found)


def _composition(
    kind: str, records: Sequence[Any], relations: Sequence[str], parts: Parts, found: RecordSet | FactTable
) -> Composition:
    named = set(relations) - {""}
    whole = "facts" if kind == "facts" else "records"
    count = len(records)
    items = [Item(whole, count, count, sum(map(bool, relations)) / len(named) if named else None, 1.0)]
    for name, part in parts.items():
        items.append(_item(name, [tuple(part(record)) for record in records], relations))
    return Composition(kind, count, len(found.bad), len(named), tuple(items), found.digest)


def _item(name: str, of_records: Sequence[tuple[Hashable, ...]], relations: Sequence[str]) -> Item:
    by_relation: dict[str, set[Hashable]] = defaultdict(set)
    for relation, values in zip(relations, of_records, strict=True):
        by_relation[relation].update(values)
    everything = set[Hashable]().union(*by_relation.values())
    by_relation.pop("", None)
    return Item(
        name,
        sum(map(len, of_records)),
        len(everything),
        fmean(map(len, by_relation.values())) if by_relation else None,
        fmean(len(set(values)) for values in of_records),
    )
