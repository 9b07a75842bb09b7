"""Records of tasks, read from `.json` or `.jsonl` files. The task and schema are recognised from the entries.

A bad entry is reported and does not affect the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.seeds import derive
from errata.data import snippets as snippet_file
from errata.data.entries import NoEntry, named_through, read_json
from errata.data.fact_table import BadLine, column_name
from errata.data.snippets import Snippets, read_snippets
from errata.tasks.registry import tasks
from errata.tasks.task import Case, Schema, Task

Some = TypeVar("Some", bound=Case)

_OTHERS: tuple[tuple[set[str], str], ...] = (  # keys that all stand in an entry, and what it is then
    ({"kind", "version"}, "a result of errata"),
    ({"target_id", "samples"}, "attribute snippets, which stand beside records"),
    ({"known_id"}, "known facts"),
    ({"requested_rewrite"}, "rewrite requests"),
    ({"edit", "example_type"}, "edits of RippleEdits, which `errata edit --requests` reads"),
    ({"subject", "target"}, "rewrite requests"),
    ({"subject", "target_new"}, "rewrite requests"),
    ({"subject", "new_object"}, "rewrite requests"),
    ({"subject", "to"}, "rewrite requests"),
    ({"subject", "prompt"}, "a table of facts"),
    ({"subject", "template"}, "a table of facts"),
    ({"subject", "relation"}, "a table of facts"),
)
FACTS = frozenset({"known facts", "a table of facts"})


@dataclass(frozen=True)
class RecordSet:
    """The requested records of a file.

    Attributes:
        task: the task that they belong to.
        records: the records, by case id.
        bad: entries of the whole file that make no record, numbered from 1, and why.
        digest: sha256 of the file's bytes, in hex.
        snippets: texts about subjects that have the new objects, if they lie beside the records.
    """

    task: Task
    records: tuple[Any, ...]
    bad: tuple[BadLine, ...]
    digest: str
    snippets: Snippets | None


def read_records(
    path: str | Path,
    limit: int | None = None,
    sample: tuple[int, int] | None = None,
    *,
    with_snippets: bool = True,
) -> RecordSet:
    """The records of a file, or of the one file of records in a folder.

    Args:
        path: the file, `.json` or `.jsonl`; or a folder with one file of a task's `files`.
        limit: only so many records, the first by case id; all if there are fewer.
        sample: (n, seed): only n records drawn at random from those; all if there are fewer. A smaller sample of the
            same seed is part of a larger one.
        with_snippets: whether to read the `attribute_snippets.json` that may lie beside records of CounterFact; the
            published one takes seconds and gigabytes.

    Raises:
        ConfigError: if `limit` or `sample` is not positive.
        ResultFileError: if there is no such file, it is too large or broken, of another schema, or has no good record.
    """
    _require_positive(limit, sample)
    file = _file(Path(path))
    value, digest = read_json(file, "records")
    entries = _entries(file, value)
    task, schema = _schema(file, entries)
    found: dict[int, Case] = {}
    numbers: dict[int, int] = {}
    bad: list[BadLine] = []
    for number, entry in enumerate(entries, 1):
        try:
            record = _record(schema, number, entry)
            if record.case_id in found:
                raise FactError(f"the same case_id, {record.case_id}, as entry {numbers[record.case_id]}")
        except FactError as error:
            bad.append(BadLine(number, str(error)))
        else:
            found[record.case_id] = record
            numbers[record.case_id] = number
    if not found:
        raise ResultFileError(f"there is no good record in {file}: entry {bad[0].line}: {bad[0].reason}")
    records = _chosen([found[case] for case in sorted(found)], limit, sample)
    beside = file.with_name(snippet_file.FILE)
    wanted = with_snippets and task.snippets and beside.is_file()
    return RecordSet(task, records, tuple(bad), digest, read_snippets(beside) if wanted else None)


def what_is_in(path: str | Path) -> str:
    """Name of the schema of a JSON file of records; for other files a description of their content, or "".

    Raises:
        ResultFileError: if it cannot be read.
    """
    value, _ = read_json(Path(path), "records")
    entries = value if isinstance(value, list) else [value]
    found = _commonest(entries)
    return found[1].name if found else _looks_like(entries)


def _require_positive(limit: int | None, sample: tuple[int, int] | None) -> None:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(f"limit is {limit!r}, and some records are needed: give a number from 1 on, or None for all")
    if sample is not None and (len(sample) != 2 or any(type(each) is not int for each in sample) or sample[0] < 1):
        raise ConfigError(f"sample is {sample!r}: give (how many records, from 1 on; a seed), such as (100, 0)")


def _file(path: Path) -> Path:
    """The file of records that a path names."""
    try:
        if not path.is_dir():
            return path
        files = tuple(dict.fromkeys(name for task in tasks().values() for name in task.files))
        there = [name for name in files if (path / name).is_file()]
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}. Give a path that you may read") from error
    if len(there) != 1:
        several = f"several files of records ({', '.join(there)})" if there else f"none of {', '.join(files)}"
        raise ResultFileError(f"the folder {path} holds {several}: name the file of records itself")
    return path / there[0]


def _entries(path: Path, value: Any) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    if isinstance(value, list):
        raise ResultFileError(f"{path} is an empty list, so it holds no records: make or fetch it again")
    if _commonest([value]):
        raise ResultFileError(f"{path} is one record, and records stand in a list: write [ before it and ] after it")
    raise _foreign(path, _looks_like([value]) or f"JSON of another kind ({type(value).__name__})")


def _schema(path: Path, entries: Sequence[Any]) -> tuple[Task, Schema]:
    found = _commonest(entries)
    if found:
        return found
    looks = _looks_like(entries)
    if looks:
        raise _foreign(path, looks)
    first = next((each.reason for each in entries if isinstance(each, NoEntry)), "")
    forms = "; ".join(
        f"{task.title}: {' or '.join(sorted(schema.keys | schema.needs))}"
        for task in tasks().values()
        for schema in task.schemas
    )
    raise ResultFileError(
        f"{path} holds no records of a known task{f': {first}' if first else ''}. An entry is an object with these "
        f"keys ({forms})"
    )


def _foreign(path: Path, looks: str) -> ResultFileError:
    titles = ", ".join(task.title for task in tasks().values())
    return ResultFileError(f"{path} holds no records of a known task ({titles}): it looks like {looks}")


def _objects(entries: Sequence[Any]) -> list[dict[str, Any]]:
    return [{column_name(key): value for key, value in e.items()} for e in entries if isinstance(e, Mapping)]


def _commonest(entries: Sequence[Any]) -> tuple[Task, Schema] | None:
    """The task and schema that most entries fit, the more specific one of two; None if no entry fits any."""
    objects = _objects(entries)
    if not objects or {"kind", "version"} <= objects[0].keys():
        return None
    known = {(task.name, schema.name): (task, schema) for task in tasks().values() for schema in task.schemas}
    counts = Counter(name for entry in objects for name, (_, schema) in known.items() if schema.fits(entry))
    if not counts:
        return None
    name = max(counts, key=lambda name: (counts[name], len(known[name][1].needs | known[name][1].lacks)))
    return known[name]


def _looks_like(entries: Sequence[Any]) -> str:
    """Name of what entries are that fit no schema, or ""."""
    objects = _objects(entries)
    if objects and {"kind", "version"} <= objects[0].keys():
        return _OTHERS[0][1]
    for keys, name in _OTHERS:
        if any(keys <= entry.keys() for entry in objects):
            return name
    if len(objects) == 1 and objects[0] and all(isinstance(value, Mapping) for value in objects[0].values()):
        return _OTHERS[1][1]
    if len(objects) == 1 and objects[0] and all(type(value) is int for value in objects[0].values()):
        return "a vocabulary"
    return ""


def _record(schema: Schema, number: int, entry: Any) -> Case:
    if isinstance(entry, NoEntry):
        raise FactError(entry.reason)
    if not isinstance(entry, Mapping):
        raise FactError(f"it must be an object, not {type(entry).__name__}")
    record: Case = schema.read(named_through(entry), number - 1)
    return record


def _chosen(records: Sequence[Some], limit: int | None, sample: tuple[int, int] | None) -> tuple[Some, ...]:
    """The first of records, and a sample of these, in order."""
    chosen = list(records[:limit])
    if sample is not None:
        count, seed = sample
        drawn = sorted(chosen, key=lambda record: derive(seed, "sample", record.case_id))[:count]
        chosen = sorted(drawn, key=lambda record: record.case_id)
    return tuple(chosen)
