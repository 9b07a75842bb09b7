"""Tables of facts: read line by line from .csv, .tsv, .jsonl or .json, so that a bad line does not affect the others.

| column | is |
|---|---|
| `subject` | what the fact is about |
| `prompt` | a sentence up to the object, with `{}` for the subject, or with the subject itself, once |
| `template` | instead of a prompt; or the beginning of a filled prompt, to tell where the subject stands |
| one of `OBJECTS`, such as `object` or `answer` | what completes the sentence; may be left out |
| `separator` | what stands between prompt and object: white space, or `none` or `space`; left out, the text decides |
| `relation` or `relation_id` | facts of one relation have answers of one kind; may be left out |
| `name`, `known_id` or `case_id` | name of the row; optional |

In any format the names of columns may be written in capitals, and with a space or hyphen for `_`. Other columns are not
read (`unread` names them), so the known facts of the published code (`known_1000.json`) are such a table as they are,
and CounterFact as it is prepared for tracing (`target_true`); a column that looks like a misspelt one is refused. White
space around a field is dropped, but not before an object, or a line's end after a prompt. Files are UTF-8.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import io
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from errata.base.display import is_torn
from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.facts import SLOT, Fact, require_characters
from errata.base.files import content, written_whole

COLUMNS = ("subject", "prompt", "object", "relation", "name")
OBJECTS = ("object", "attribute", "answer", "target", "target_true", "ground_truth")  # names of a fact's object
LISTS = ("ground_truth",)  # fields that may hold a list, of which the first text counts
_SEPARATORS = {"none": "", "space": " "}
_ALIKE = 0.8  # from this likeness on, by difflib, an unknown name is taken to be a misspelt one
MOST_BROKEN = 100  # lines; each costs a pass over all that follow, in search of a whole one
MAX_FIELD = 2**24  # characters of one field of a .csv or .tsv file; it may go over several lines
_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}  # comma or tab, quotes doubled

Row = TypeVar("Row")


@dataclass(frozen=True)
class FactRow:
    """One fact of a table.

    Attributes:
        line: the line on which it begins, from 1; in a .json list, the number of the entry, from 1.
        fact: the fact; its object may be empty.
        relation: name of the relation, or "".
        name: the row's name in the table; `line` if it has none.
    """

    line: int
    fact: Fact
    relation: str
    name: str


@dataclass(frozen=True)
class BadLine:
    """A line or entry that is not a fact, with the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class FactTable:
    """The bytes of a file.

    Attributes:
        rows: the facts, in order.
        bad: the lines that are none, in order.
        unit: the unit of `line`: "line" or "entry".
        digest: sha256 of the file's bytes, in hex.
        unread: names of its columns that mean nothing here.
    """

    rows: tuple[FactRow, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableKind(Generic[Row]):
    """Kind of lines in a table.

    Attributes:
        noun: what one is called, such as "fact".
        needed: groups of names of columns, of each of which one must be there.
        optional: groups of names of which one may be there.
        beside: names that published files have and that mean nothing here; they are not told of.
        columns: what columns it needs and may have, for the message where they are missing.
        parse: a row from its line and fields; it raises FactError where they make none.
        identity: what two rows have in common that are the same.
        apart: the rows of an entry that may hold several, and whether they may stand in other entries too.
    """

    noun: str
    needed: tuple[tuple[str, ...], ...]
    columns: str
    parse: Callable[[int, Mapping[str, Any]], Row]
    identity: Callable[[Row], Hashable]
    optional: tuple[tuple[str, ...], ...] = ()
    beside: tuple[str, ...] = ()
    apart: Callable[[Mapping[str, Any]], tuple[list[Mapping[str, Any]], bool]] = lambda found: ([found], False)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of column names with the same meaning."""
        return (*self.needed, *self.optional)


def read_facts(path: str | Path) -> FactTable:
    """The facts of a table and its bad lines. If a fact is listed twice, the first is kept.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl, .json.
        ResultFileError: if it is missing, lacks the columns, is another kind of file, or has no fact.
    """
    return FactTable(*read_rows(path, FACTS))


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """Rows of any kind, bad lines, unit, digest and unread columns, as of a `FactTable`."""

    rows: tuple[Row, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str
    unread: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        """In that order."""
        return iter((self.rows, self.bad, self.unit, self.digest, self.unread))


def read_rows(path: str | Path, kind: TableKind[Row]) -> Rows[Row]:
    """The rows of a table of any kind.

    Raises:
        ConfigError, ResultFileError: as `read_facts`.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ConfigError(
            f"{path} is not a table of {kind.noun}s by its ending: it must be one of {', '.join(_READERS)}"
        )
    stored = content(path, f"{kind.noun}s")
    # A byte that is not UTF-8 becomes half a character, which is told of its own line alone.
    entries = read(path, stored.decode("utf-8-sig", "surrogateescape"), kind)
    return parsed(path, entries, kind, "entry" if path.suffix.lower() == ".json" else "line", stored)


def parsed(path: Path, entries: Iterable[Entry], kind: TableKind[Row], unit: str, stored: bytes) -> Rows[Row]:
    """The rows that entries make.

    Raises:
        ResultFileError: if none does.
    """
    rows: list[Row] = []
    bad: list[BadLine] = []
    first: dict[Hashable, int] = {}
    unread: dict[str, None] = {}
    for line, found in entries:
        try:
            fields = named(_whole(found))
            several, again = kind.apart(fields)
            unread |= dict.fromkeys(_unread(several[0], kind) if several else ())
            for each in several:
                row = kind.parse(line, each)
                identity = kind.identity(row)
                if identity not in first:
                    first[identity] = line
                    rows.append(row)
                elif not again:
                    raise FactError(f"the same {kind.noun} as {unit} {first[identity]}")
        except FactError as error:
            bad.append(BadLine(line, str(error)))
    if not rows:
        why = f": {unit} {bad[0].line}: {bad[0].reason}" if bad else ": it is empty"
        raise ResultFileError(f"there is no {kind.noun} in {path}{why}")
    return Rows(tuple(rows), tuple(bad), unit, hashlib.sha256(stored).hexdigest(), tuple(unread))


def column_name(name: str) -> str:
    """A column's name in the form used for look-ups: small letters, `_` for spaces and hyphens."""
    return "_".join(name.strip().casefold().replace("-", " ").split())


def named(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by `column_name`.

    Raises:
        FactError: if two have one name.
    """
    fields = {column_name(name): value for name, value in found.items()}
    if len(fields) < len(found):
        names = [column_name(name) for name in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise FactError(f"two of its fields are called {shortened(twice)}, and one would replace the other: leave one")
    return fields


def _unread(fields: Mapping[str, Any], kind: TableKind[Any]) -> list[str]:
    """Names of fields that mean nothing in a table of this kind.

    Raises:
        FactError: if one looks like a misspelling of a name that is missing.
    """
    unknown = [name for name in fields if not any(name in group for group in (*kind.groups, kind.beside))]
    missing = [name for group in kind.groups if fields.keys().isdisjoint(group) for name in group]
    for name in unknown:
        if meant := difflib.get_close_matches(name, missing, 1, _ALIKE):
            raise FactError(
                f"a table of {kind.noun}s has no column {shortened(name)}, which is like {meant[0]!r}: write that, or "
                "give it a name that is not so alike"
            )
    return unknown


def unread_message(unread: Sequence[str], kind: TableKind[Any]) -> str:
    """A message that names columns that are not read, each with the most similar known name, if there is one."""
    known = [name for group in kind.groups for name in group]
    shown = []
    for name in unread:
        near = difflib.get_close_matches(name, known, 1)
        shown.append(shortened(name) + (f" (the nearest that is: {near[0]!r})" if near else ""))
    return f"columns that are not read: {', '.join(shown)}; a table of {kind.noun}s has {kind.columns}"


def write_facts(path: str | Path, rows: Iterable[FactRow]) -> None:
    """Write a table atomically; `read_facts` reads it back, except for line numbers.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl.
        OutputError: if it cannot be written.
    """
    path = Path(path)
    require_table_ending(path)
    fields = [
        {
            **dict(zip(COLUMNS, (r.fact.subject, r.fact.prompt, r.fact.object, r.relation, r.name), strict=True)),
            **between,
        }
        for r in rows
        for between in [{} if r.fact.separator is None else {"separator": r.fact.separator}]
    ]
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() in _DIALECTS:
            columns = (*COLUMNS, *(["separator"] if any("separator" in each for each in fields) else []))
            words = {separator: word for word, separator in _SEPARATORS.items()}
            writer = csv.DictWriter(file, columns, dialect=_DIALECTS[path.suffix.lower()], restval="")
            writer.writeheader()
            writer.writerows(
                {key: words.get(value, value) if key == "separator" else value for key, value in each.items()}
                for each in fields
            )
        else:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in fields)


def require_table_ending(path: Path) -> None:
    """Check that a path has the ending of a table format.

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
    columns = [] if isinstance(header, str) else [column_name(column) for column in header]
    mark = "tab" if dialect == "excel-tab" else "comma"
    if text.strip() and any(set(columns).isdisjoint(names) for names in kind.needed):
        raise ResultFileError(
            f"the first line of {path} names no columns of {kind.noun}s ({shortened(str(header))}): it needs "
            f"{kind.columns}, with a {mark} between them"
        )
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise ResultFileError(f"{path} has two columns {twice[0]!r}, and one would replace the other: leave one")
    for line, fields in records:
        if isinstance(fields, str):
            yield line, fields
        elif len(fields) != len(columns):
            yield line, f"{len(fields)} fields for {len(columns)} columns: put a field with a {mark} in it in quotes"
        else:
            # An empty field says nothing; what is to be nothing is called so.
            yield line, {c: f for c, f in zip(columns, fields, strict=True) if c and (f or c != "separator")}


def _records(lines: list[str], dialect: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields or an error) of each record that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    begin = broken = 0
    while begin < len(lines):
        if broken == MOST_BROKEN:
            yield begin + 1, f"{len(lines) - begin:,} lines from here on are not read, after {broken} that are broken"
            return
        reader = csv.reader(islice(lines, begin, None), dialect, strict=True)
        start = begin
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield start + 1, fields
                start = begin + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, f"cannot be taken apart ({error}): write a quote within quotes twice, and close quotes"
            broken += 1
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
        raise ResultFileError(f"{path} is not JSON ({error}): mend or fetch it again") from error
    if not isinstance(values, list):
        raise ResultFileError(
            f"{path} is not a list of {kind.noun}s: a table of {kind.noun}s in .json is [{{...}}, {{...}}, ...]"
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
    name = field_text(found, "name", "known_id", "case_id", number=True)
    require_characters("relation", relation)
    require_characters("name", name)
    return FactRow(line, field_fact(found, *OBJECTS), relation, name or str(line))


def field_fact(found: Mapping[str, Any], *objects: str) -> Fact:
    """The fact that fields tell: subject, prompt or template, separator, and an object by any of these names.

    Raises:
        FactError: if they tell none.
    """
    subject, template = field_text(found, "subject"), field_prompt(found, "template")
    prompt = with_slot(subject, field_prompt(found, "prompt") or template, template)
    return Fact(subject, prompt, field_object(found, *objects), separator_in(found))


def field_prompt(found: Mapping[str, Any], name: str) -> str:
    """A prompt: the end of a line after it is a part of it."""
    text = field_text(found, name)
    value = found.get(name)
    return text and str(value).lstrip().rstrip(" ")


def field_object(found: Mapping[str, Any], *names: str) -> str:
    """An object: white space before it is a part of it; where a list may stand, its first text."""
    found = {**found, **{name: _first(found[name]) for name in names if name in LISTS and name in found}}
    text = field_text(found, *names)
    value = next((found[name] for name in names if isinstance(found.get(name), str) and found[name].strip()), "")
    return text and str(value).rstrip()


def _first(value: Any) -> Any:
    """The first of a list, or of a list in it; "" of an empty one."""
    while isinstance(value, list):
        value = value[0] if value else ""
    return value


def separator_in(found: Mapping[str, Any]) -> str | None:
    """The separator that fields name; None if they name none.

    Raises:
        FactError: if it is neither white space nor one of the words for it.
    """
    value = found.get("separator")
    if isinstance(value, str):
        value = _SEPARATORS.get(value.casefold(), value)
    if value is not None and (not isinstance(value, str) or value.strip()):
        raise FactError(f"its separator is {value!r}: it is white space, or one of {', '.join(_SEPARATORS)}")
    return value


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
    """A filled prompt with `{}` in place of the subject; a template is the beginning of a filled prompt.

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
    """A text for a message, quoted and shortened."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


FACTS = TableKind(
    noun="fact",
    needed=(("subject",), ("prompt", "template")),
    columns="subject and prompt, and may have object, separator, relation and name",
    parse=_row,
    optional=(OBJECTS, ("separator",), ("relation", "relation_id"), ("name", "known_id", "case_id")),
    beside=("prediction", *["relation_prefix", "relation_suffix", "target_true_id", "target_false_id", "target_false"]),
    identity=lambda row: row.fact,
)
