"""Tables of facts: read from .csv, .tsv, .jsonl or .json, line by line, so that one bad line spoils no other.

| column | is |
|---|---|
| `subject` | what the fact is about |
| `prompt` | a sentence up to the object, with `{}` for the subject, or with the subject itself, once |
| `template` | instead of a prompt; or the beginning of a filled prompt, to tell where the subject stands |
| `object` or `attribute` | what completes the sentence; may be left out |
| `relation` or `relation_id` | facts of one relation have answers of one kind; may be left out |
| `name` or `known_id` | what to call the row; may be left out |

Other columns are not read, so the known facts of the published code (`known_1000.json`) are such a table as they are.
White space around a field is dropped. Files are UTF-8.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.facts import SLOT, Fact, require_characters
from errata.base.files import content, written_whole

COLUMNS = ("subject", "prompt", "object", "relation", "name")
MAX_FIELD = 2**24  # characters of one field of a .csv or .tsv file; it may go over several lines
_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}  # comma or tab, quotes doubled

Row = TypeVar("Row")


@dataclass(frozen=True)
class FactRow:
    """One fact of a table.

    Attributes:
        line: where it stands: the line it begins on, from 1; in a .json list, the number of the entry, from 1.
        fact: the fact; its object may be empty.
        relation: name of the relation, or "".
        name: what the table calls the row; if nothing, `line`.
    """

    line: int
    fact: Fact
    relation: str
    name: str


@dataclass(frozen=True)
class BadLine:
    """A line, or entry, that is no fact, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class FactTable:
    """What a file holds.

    Attributes:
        rows: the facts, in order.
        bad: the lines that are none, in order.
        unit: what `line` counts: "line" or "entry".
        digest: sha256 of the file's bytes, in hex.
    """

    rows: tuple[FactRow, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str


@dataclass(frozen=True)
class TableKind(Generic[Row]):
    """What the lines of a table are.

    Attributes:
        noun: what one is called, such as "fact".
        needed: groups of names of columns, of each of which one must be there.
        columns: what columns it needs and may have, for the message where they are missing.
        parse: a row from its line and fields; it raises FactError where they make none.
        identity: what two rows have in common that are the same.
    """

    noun: str
    needed: tuple[tuple[str, ...], ...]
    columns: str
    parse: Callable[[int, Mapping[str, Any]], Row]
    identity: Callable[[Row], Hashable]


def read_facts(path: str | Path) -> FactTable:
    """The facts of a table and its bad lines. Of a fact that stands there twice, the first is kept.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl, .json.
        ResultFileError: if it is missing, has not the columns, is no such file at all, or has no fact.
    """
    return FactTable(*read_rows(path, _FACTS))


def read_rows(path: str | Path, kind: TableKind[Row]) -> tuple[tuple[Row, ...], tuple[BadLine, ...], str, str]:
    """Rows, bad lines, unit and digest, as of a `FactTable`, of a table of any kind.

    Raises:
        ConfigError, ResultFileError: as `read_facts`.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"{path} is no table of {kind.noun}s by its ending: it must be one of {', '.join(_READERS)}")
    stored = content(path, f"{kind.noun}s")
    unit = "entry" if path.suffix.lower() == ".json" else "line"
    rows: list[Row] = []
    bad: list[BadLine] = []
    first: dict[Hashable, int] = {}
    # A byte that is no UTF-8 becomes half a character, which is told of its own line alone.
    for line, found in read(path, stored.decode("utf-8-sig", "surrogateescape"), kind):
        try:
            row = kind.parse(line, _whole(found))
            identity = kind.identity(row)
            if identity in first:
                raise FactError(f"the same {kind.noun} as {unit} {first[identity]}")
        except FactError as error:
            bad.append(BadLine(line, str(error)))
        else:
            first[identity] = line
            rows.append(row)
    if not rows:
        why = f": {unit} {bad[0].line}: {bad[0].reason}" if bad else ": it is empty"
        raise ResultFileError(f"there is no {kind.noun} in {path}{why}")
    return tuple(rows), tuple(bad), unit, hashlib.sha256(stored).hexdigest()


def write_facts(path: str | Path, rows: Iterable[FactRow]) -> None:
    """Write a table that `read_facts` reads back, line numbers aside; whole or not at all.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl.
        OutputError: if it cannot be written.
    """
    path = Path(path)
    require_table_ending(path)
    fields = [(r.fact.subject, r.fact.prompt, r.fact.object, r.relation, r.name) for r in rows]
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() in _DIALECTS:
            csv.writer(file, _DIALECTS[path.suffix.lower()]).writerows([COLUMNS, *fields])
        else:
            file.writelines(
                json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False) + "\n" for values in fields
            )


def require_table_ending(path: Path) -> None:
    """Make sure that a path ends as a table that can be written.

    Raises:
        ConfigError: if it does not.
    """
    endings = (*_DIALECTS, ".jsonl")
    if path.suffix.lower() not in endings:
        raise ConfigError(f"cannot write a table of facts to {path}: its ending must be one of {', '.join(endings)}")


Entry = tuple[int, "Mapping[str, Any] | str"]  # where it stands, and its fields, or why it has none


def _lines_of_columns(dialect: str, path: Path, text: str, kind: TableKind[Any]) -> Iterator[Entry]:
    """The rows of a .csv or .tsv file by its header."""
    records = _records(list(io.StringIO(text, newline="")), dialect)
    line, header = next(records, (1, []))
    columns = [] if isinstance(header, str) else [column.strip().casefold() for column in header]
    mark = "tab" if dialect == "excel-tab" else "comma"
    if text.strip() and any(set(columns).isdisjoint(names) for names in kind.needed):
        raise ResultFileError(
            f"the first line of {path} names no columns of {kind.noun}s ({shortened(str(header))}): it needs "
            f"{kind.columns}, with a {mark} between them"
        )
    for line, fields in records:
        if isinstance(fields, str):
            yield line, fields
        elif len(fields) != len(columns):
            yield line, f"{len(fields)} fields for {len(columns)} columns: put a field with a {mark} in it in quotes"
        else:
            yield line, dict(zip(columns, fields, strict=True))


def _records(lines: list[str], dialect: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields or why there are none) of each record that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    begin = 0
    while begin < len(lines):
        reader = csv.reader(lines[begin:], dialect, strict=True)
        start = begin
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield start + 1, fields
                start = begin + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, f"cannot be taken apart ({error}): write a quote within quotes twice, and close quotes"
            begin = start + 1  # an open quote has swallowed lines that may be good


def _lines_of_json(path: Path, text: str, kind: TableKind[Any]) -> Iterator[Entry]:
    """The objects of a .jsonl file."""
    for line, entry in enumerate(text.split("\n"), 1):
        if not entry.strip():
            continue
        try:
            value = json.loads(entry)
        except (ValueError, RecursionError) as error:
            yield line, f"no JSON: {error}"
        else:
            yield line, value if isinstance(value, dict) else "no JSON object"


def _entries_of_json(path: Path, text: str, kind: TableKind[Any]) -> Iterator[Entry]:
    """The objects of a .json file, which is a list of them."""
    try:
        values = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ResultFileError(f"{path} is no JSON ({error}): mend or fetch it again") from error
    if not isinstance(values, list):
        raise ResultFileError(
            f"{path} is no list of {kind.noun}s: a table of {kind.noun}s in .json is [{{...}}, {{...}}, ...]"
        )
    for number, value in enumerate(values, 1):
        yield number, value if isinstance(value, dict) else "no JSON object"


_READERS: dict[str, Callable[[Path, str, TableKind[Any]], Iterator[Entry]]] = {
    **{ending: functools.partial(_lines_of_columns, dialect) for ending, dialect in _DIALECTS.items()},
    ".jsonl": _lines_of_json,
    ".json": _entries_of_json,
}


def _whole(found: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """The fields of a line.

    Raises:
        FactError: if it has none, or there are bytes in them that are no UTF-8.
    """
    if isinstance(found, str):
        raise FactError(found)
    if any(isinstance(value, str) and is_torn(value) for value in found.values()):
        raise FactError("there are bytes in it that are no UTF-8: save the file as UTF-8")
    return found


def _row(line: int, found: Mapping[str, Any]) -> FactRow:
    relation = field_text(found, "relation", "relation_id", number=True)
    name = field_text(found, "name", "known_id", number=True)
    require_characters("relation", relation)
    require_characters("name", name)
    return FactRow(line, field_fact(found, "object", "attribute"), relation, name or str(line))


def field_fact(found: Mapping[str, Any], *objects: str) -> Fact:
    """The fact that fields tell: subject, prompt or template, and an object by any of these names.

    Raises:
        FactError: if they tell none.
    """
    subject, template = field_text(found, "subject"), field_text(found, "template")
    prompt = with_slot(subject, field_text(found, "prompt") or template, template)
    return Fact(subject, prompt, field_text(found, *objects))


def is_torn(text: str) -> bool:
    """Whether there are halves of characters in a text that stand for single bytes."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def field_text(found: Mapping[str, Any], *names: str, number: bool = False) -> str:
    """The first of these fields that holds something, or "".

    Raises:
        FactError: if one holds no text; nor, where that will do, a whole number.
    """
    for name in names:
        value = found.get(name)
        if number and type(value) is int:
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise FactError(f"its {name} is text, not {type(value).__name__}")
        if value and value.strip():
            return value.strip()
    return ""


def with_slot(subject: str, prompt: str, template: str = "") -> str:
    """The prompt with `{}` in place of the subject, if it is filled; a template is the beginning of a filled prompt.

    Raises:
        FactError: if the subject stands in a filled prompt not at all, or more than once.
    """
    if SLOT in prompt or not subject or not prompt:
        return prompt  # what is still wrong with it, Fact tells
    filled = template.replace(SLOT, subject)
    if SLOT in template and prompt.startswith(filled):
        return template + prompt[len(filled) :]
    place = prompt.find(subject)
    if place < 0 or place != prompt.rfind(subject):
        raise FactError(
            f"the prompt {shortened(prompt)} has no {{}}, and the subject {shortened(subject)} does not stand in it "
            "exactly once: write {} where the subject stands"
        )
    return prompt[:place] + SLOT + prompt[place + len(subject) :]


def shortened(text: str, length: int = 80) -> str:
    """A text for a message, in quotes and not too long."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


_FACTS = TableKind(
    noun="fact",
    needed=(("subject",), ("prompt", "template")),
    columns="subject and prompt, and may have object, relation and name",
    parse=_row,
    identity=lambda row: row.fact,
)
