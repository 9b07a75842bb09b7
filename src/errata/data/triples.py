"""Tables of bare facts (s, r, o) and of texts about subjects: .csv, .tsv, .jsonl, .json or .parquet.

| column | is |
|---|---|
| `subject` | what the fact is about |
| `relation` or `relation_id` | name of the relation |
| `object` or `attribute` | what the subject has |
| `text` | a text about the subject; may be left out |

Names of columns are read as in tables of facts (`fact_table.py`). Two names that differ only in white space, letter
case or Unicode form are one name. A subject may have several objects of one relation: all of them are true.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base.errors import FactError, ResultFileError
from errata.base.extras import needed
from errata.base.facts import require_characters
from errata.base.files import content
from errata.data.fact_table import BadLine, Row, Rows, TableKind, column_name, field_text, parsed, read_rows


@dataclass(frozen=True)
class Triple:
    """A subject, a relation and an object, by their names; runs of white space are one space.

    Raises:
        FactError: if one is blank, or no whole text.
    """

    subject: str
    relation: str
    object: str

    def __post_init__(self) -> None:
        for name in ("subject", "relation", "object"):
            value = " ".join(getattr(self, name).split())
            if not value:
                raise FactError(f"it has no {name}: a fact has a subject, a relation and an object")
            require_characters(name, value)
            object.__setattr__(self, name, value)

    @property
    def names(self) -> tuple[str, str, str]:
        """All three."""
        return self.subject, self.relation, self.object

    @property
    def identity(self) -> tuple[str, str, str]:
        """Key that is equal for two equal facts."""
        return folded(self.subject), folded(self.relation), folded(self.object)


@dataclass(frozen=True)
class TripleRow:
    """A line of a table: its number, from 1, its fact, and the text about its subject, or ""."""

    line: int
    triple: Triple
    text: str


@dataclass(frozen=True)
class TripleTable:
    """The bytes of a file.

    Attributes:
        rows: the facts, in order.
        bad: the lines that are none, in order.
        unit: the unit of `line`: "line", "entry" or "row".
        digest: sha256 of the file's bytes, in hex.
        unread: names of its columns that mean nothing here.
    """

    rows: tuple[TripleRow, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str
    unread: tuple[str, ...] = ()

    @property
    def texts(self) -> dict[str, str]:
        """The texts about each subject, in order and joined."""
        return _joined((row.triple.subject, row.text) for row in self.rows)


def folded(name: str) -> str:
    """Normal form of a name, equal for all its spellings."""
    plain = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
    return unicodedata.normalize("NFC", plain)  # folding may take a letter and its accent apart


def uniform(facts: Iterable[Triple], relations: Iterable[str] = ()) -> tuple[Triple, ...]:
    """Every fact once, in an order independent of the table's, with every name in its most frequent spelling.

    Args:
        facts: any, in any order.
        relations: names of relations as they are to be written.
    """
    facts = list(facts)
    subjects, objects = (_spellings(getattr(f, name) for f in facts) for name in ("subject", "object"))
    named = _spellings(f.relation for f in facts) | {folded(name): name for name in relations}
    return tuple(Triple(subjects[s], named[r], objects[o]) for s, r, o in sorted({fact.identity for fact in facts}))


def read_triples(path: str | Path) -> TripleTable:
    """The facts of a table and its bad lines. If a fact is listed twice, the first is kept.

    Raises:
        ConfigError: if the file's ending is none of a table's.
        ResultFileError: if it is missing, lacks the columns, is another kind of file, or has no fact.
        MissingExtra: if it is Parquet and pyarrow is not installed.
    """
    return TripleTable(*_read(Path(path), TRIPLES))


def read_texts(path: str | Path) -> tuple[dict[str, str], tuple[BadLine, ...], str, str]:
    """Texts by subject, joined for each subject; then bad lines, unit and digest, as in a `TripleTable`.

    Raises:
        ConfigError, ResultFileError, MissingExtra: as `read_triples`.
    """
    rows, bad, unit, digest, _ = _read(Path(path), _TEXTS)
    return _joined(rows), bad, unit, digest


def _read(path: Path, kind: TableKind[Row]) -> Rows[Row]:
    """Like `read_rows`, and Parquet too."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return read_rows(path, kind)
    return parsed(path, enumerate(_parquet(path, kind), 1), kind, "row", content(path, f"{kind.noun}s"))


def _parquet(path: Path, kind: TableKind[Any]) -> Sequence[Mapping[str, Any]]:
    """The rows of a Parquet file."""
    arrow, parquet = needed("pyarrow", "tables"), needed("pyarrow.parquet", "tables")
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise ResultFileError(f"{path} is not a whole Parquet file: {error}. Fetch or make it again") from error
    columns = {column_name(name) for name in table.column_names}
    if any(columns.isdisjoint(names) for names in kind.needed):
        raise ResultFileError(
            f"{path} has not the columns of {kind.noun}s ({', '.join(table.column_names)}): it needs {kind.columns}"
        )
    rows: Sequence[Mapping[str, Any]] = table.to_pylist()
    return rows


def _triple(line: int, found: Mapping[str, Any]) -> TripleRow:
    subject, relation, its_object = (
        field_text(found, *names, number=True)
        for names in (("subject",), ("relation", "relation_id"), ("object", "attribute"))
    )
    text = field_text(found, "text")
    require_characters("text", text)
    return TripleRow(line, Triple(subject, relation, its_object), text)


def _text(line: int, found: Mapping[str, Any]) -> tuple[str, str]:
    subject, text = field_text(found, "subject", number=True), field_text(found, "text")
    if not (subject and text):
        raise FactError("it has no subject, or no text")
    require_characters("subject", subject)
    require_characters("text", text)
    return subject, text


def _joined(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The different texts of each subject, however its name is written, as one."""
    of: dict[str, dict[str, None]] = defaultdict(dict)
    for subject, text in texts:
        of[folded(subject)].setdefault(text)
    return {subject: text for subject, several in of.items() if (text := " ".join(filter(None, several)))}


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """The most frequent spelling of each name, by its normal form."""
    ways: dict[str, Counter[str]] = defaultdict(Counter)
    for name, count in Counter(names).items():
        ways[folded(name)][name] = count
    return {name: min(counts, key=lambda way: (-counts[way], way)) for name, counts in ways.items()}


TRIPLES = TableKind(
    noun="fact",
    needed=(("subject",), ("relation", "relation_id"), ("object", "attribute")),
    columns="subject, relation and object, and may have text",
    parse=_triple,
    optional=(("text",),),
    identity=lambda row: row.triple.identity,
)
_TEXTS = TableKind(
    noun="text",
    needed=(("subject",), ("text",)),
    columns="subject and text",
    parse=_text,
    identity=lambda row: row,
)
