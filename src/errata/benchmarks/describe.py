"""What a set is made of, as in the paper's Table 3: how much there is in all, by relation and by record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from errata.benchmarks.fact_table import FactTable
from errata.benchmarks.sets import RecordSet


@dataclass(frozen=True)
class Item:
    """One kind of thing that a set has.

    Attributes:
        name: what it is, such as "paraphrase prompts".
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
    """What a set is made of.

    Attributes:
        kind: "counterfact", "zsre" or "facts".
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


Parts = dict[str, Callable[[Any], Iterable[Hashable]]]

_COUNTERFACT: Parts = {
    "subjects": lambda r: (r.rewrite.subject,),
    "objects": lambda r: (r.rewrite.fact.object,),
    "new objects": lambda r: (r.rewrite.new_object,),
    "counterfactual statements": lambda r: ((r.rewrite.text, r.rewrite.new_object),),
    "rewrite prompts": lambda r: (r.rewrite.text,),
    "paraphrase prompts": lambda r: r.paraphrase,
    "neighborhood prompts": lambda r: r.neighborhood,
    "attribute prompts": lambda r: r.attribute,
    "generation prompts": lambda r: r.generation,
}
_ZSRE: Parts = {
    "subjects": lambda r: (r.rewrite.subject,),
    "answers": lambda r: (r.rewrite.new_object,),
    "questions": lambda r: (r.rewrite.text,),
    "paraphrase prompts": lambda r: r.paraphrase,
    "locality prompts": lambda r: r.locality,
}
_FACTS: Parts = {
    "subjects": lambda r: (r.fact.subject,),
    "objects": lambda r: (r.fact.object,) if r.fact.object else (),
    "templates": lambda r: (r.fact.prompt,),
    "prompts": lambda r: (r.fact.text,),
}


def describe(found: RecordSet | FactTable) -> Composition:
    """What a set of records, or a table of facts, is made of."""
    if isinstance(found, FactTable):
        return _composition("facts", found.rows, [row.relation for row in found.rows], _FACTS, found)
    if found.kind == "zsre":
        return _composition("zsre", found.records, [""] * len(found.records), _ZSRE, found)
    return _composition(
        "counterfact", found.records, [getattr(r, "relation", "") for r in found.records], _COUNTERFACT, found
    )


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
