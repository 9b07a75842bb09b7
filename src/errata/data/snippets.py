"""Attribute snippets: texts, such as Wikipedia's, about subjects that have a certain object of a relation.

The published `attribute_snippets.json` is a list of `{"relation_id": …, "target_id": …, "samples": [{"name": …, "text":
…}, …]}`; read as well is what the published code makes of it, `{relation: {target: [{"name": …, "text": …}, …]}}`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from errata.base.errors import FactError, ResultFileError
from errata.base.files import write_text
from errata.data.entries import read_json, require_keys, text_in, whole_text
from errata.data.fact_table import named
from errata.data.records import Record

FILE = "attribute_snippets.json"
MAX_BYTES = 2 * 2**30  # the published file has nearly half of that


@dataclass(frozen=True)
class Snippet:
    """A text about a subject.

    Attributes:
        name: the subject.
        text: the text about it.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Snippets:
    """Texts, by relation and object of their subjects.

    Attributes:
        groups: the texts on subjects that have an object of a relation, by the names that the set gives to relation and
            object, such as ("P131", "Q90").
        digest: sha256 of the file that they are from, in hex; "" if of none.
    """

    groups: Mapping[tuple[str, str], tuple[Snippet, ...]]
    digest: str = field(default="", compare=False)

    def of(self, record: Record) -> tuple[Snippet, ...]:
        """The texts about subjects that have the record's new object; an object without an id is looked up by name."""
        return self.groups.get((record.relation, record.object_ids[1] or record.rewrite.new_object), ())

    def about(self, record: Record) -> tuple[Snippet, ...]:
        """The texts about the record's own subject, its essence texts.

        As in the published code they are looked for among those of the new object; then among those of the old.
        """
        old = record.object_ids[0] or record.rewrite.fact.object
        groups = self.of(record), self.groups.get((record.relation, old), ())
        own = (tuple(each for each in group if each.name == record.rewrite.subject) for group in groups)
        return next(filter(None, own), ())

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All texts in order, repetitions included."""
        return tuple(snippet.text for group in self.groups.values() for snippet in group)


def read_snippets(path: str | Path) -> Snippets:
    """The snippets of a file, in either form; an error in any entry refuses the file.

    Raises:
        ResultFileError: if the file is missing or has no snippets, or an entry is not valid; the message has its
            number, from 1.
    """
    path = Path(path)
    value, digest = read_json(path, "attribute snippets", MAX_BYTES)
    groups: dict[tuple[str, str], list[Snippet]] = defaultdict(list)
    whole = 0
    try:
        for relation, target, snippets in _groups(value):
            groups[relation, target] += snippets
            whole += 1
    except FactError as error:
        raise ResultFileError(
            f"{path} holds no attribute snippets: entry {whole + 1}: {error}. Make or fetch it again"
        ) from error
    if not groups:
        raise ResultFileError(f"there are no attribute snippets in {path}: make or fetch it again")
    return Snippets({key: tuple(group) for key, group in groups.items()}, digest)


def write_snippets(path: str | Path, snippets: Snippets) -> None:
    """Write snippets in the published schema, atomically. `read_snippets` reads them back.

    Raises:
        OutputError: if the file cannot be written.
    """
    entries = (
        {
            "relation_id": relation,
            "target_id": target,
            "samples": [{"name": snippet.name, "text": snippet.text} for snippet in group],
        }
        for (relation, target), group in snippets.groups.items()
    )
    write_text(path, "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]\n")


def _groups(value: Any) -> Iterator[tuple[str, str, list[Snippet]]]:
    """(relation, object, snippets) of each entry of either form."""
    if isinstance(value, Mapping):
        for relation, targets in value.items():
            if not isinstance(targets, Mapping):
                raise FactError(f"what stands under {relation!r} is an object, not {type(targets).__name__}")
            for target, samples in targets.items():
                yield whole_text(relation, "relation"), whole_text(target, "object"), _snippets(samples)
    elif isinstance(value, list):
        for entry in value:
            _require_object(entry)
            entry = named(entry)
            require_keys(entry, "relation_id", "target_id", "samples")
            yield text_in(entry, "relation_id"), text_in(entry, "target_id"), _snippets(entry["samples"])
    else:
        raise FactError(f"it is a list, not {type(value).__name__}")


def _snippets(samples: Any) -> list[Snippet]:
    if not isinstance(samples, list):
        raise FactError(f"its samples are a list, not {type(samples).__name__}")
    for sample in samples:
        _require_object(sample)
    samples = [sample if sample.keys() >= {"name", "text"} else named(sample) for sample in samples]
    for sample in samples:
        require_keys(sample, "name", "text")
    return [
        Snippet(text_in(sample, "name"), whole_text(sample["text"], "text", may_be_blank=True)) for sample in samples
    ]


def _require_object(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise FactError(f"it is an object, not {type(value).__name__}")
