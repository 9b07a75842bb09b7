"""Sets of benchmark records, read from `.json` or `.jsonl` in any of four schemas, which the entries show themselves:
CounterFact nested or flat (`counterfact.py`), zsRE, or flat questions (`zsre.py`). A bad entry is told of and spoils no
other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.seeds import derive
from errata.benchmarks import snippets as snippet_file
from errata.benchmarks.counterfact import flat_record, nested_record
from errata.benchmarks.entries import NoEntry, named_through, read_json
from errata.benchmarks.fact_table import BadLine, column_name
from errata.benchmarks.records import Record, ZsreRecord
from errata.benchmarks.snippets import Snippets, read_snippets
from errata.benchmarks.zsre import flat_question, zsre_record

FILES = (
    "counterfact.json",
    "multi_counterfact.json",
    "zsre_mend_eval.json",
    "zsre.json",
)  # what a folder is looked through for

Schema = Literal["nested", "flat", "zsre", "questions"]
Some = TypeVar("Some", Record, ZsreRecord)

_SCHEMAS: dict[Schema, frozenset[str]] = {  # keys of which any one shows the schema
    "nested": frozenset({"paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"}),
    "flat": frozenset({"rephrase_prompt", "locality_prompt"}),
    "zsre": frozenset({"src", "loc", "loc_ans"}),
    "questions": frozenset(),  # flat, but no old object in any entry
}
_QUESTIONS = ("zsre", "questions")
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
    """What a file of records holds, as far as it was asked for.

    Attributes:
        kind: "counterfact", with `Record`s, or "zsre", with `ZsreRecord`s.
        records: the records, by case id.
        bad: the entries that are no records, of the whole file, numbered from 1, and why.
        digest: sha256 of the file's bytes, in hex.
        snippets: texts on subjects that have the new objects, if they stand beside the records.
    """

    kind: Literal["counterfact", "zsre"]
    records: tuple[Record, ...] | tuple[ZsreRecord, ...]
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
        path: the file, `.json` or `.jsonl`; or a folder with one of `FILES`.
        limit: only so many records, the first by case id; all if there are fewer.
        sample: (n, seed): only n records drawn at random from those; all if there are fewer. A smaller sample of the
            same seed is part of a larger one.
        with_snippets: whether to read the `attribute_snippets.json` that may stand beside records of CounterFact; the
            published one takes seconds and gigabytes.

    Raises:
        ConfigError: if `limit` or `sample` is not positive.
        ResultFileError: if there is no such file, it is too large or broken, of another schema, or has no good record.
    """
    _require_positive(limit, sample)
    file = _file(Path(path))
    value, digest = read_json(file, "records")
    entries = _entries(file, value)
    schema = _schema(file, entries)
    found: dict[int, Record | ZsreRecord] = {}
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
    records: Any = _chosen([found[case] for case in sorted(found)], limit, sample)
    beside = file.with_name(snippet_file.FILE)
    wanted = with_snippets and schema not in _QUESTIONS and beside.is_file()
    return RecordSet(
        "zsre" if schema in _QUESTIONS else "counterfact",
        records,
        tuple(bad),
        digest,
        read_snippets(beside) if wanted else None,
    )


def what_is_in(path: str | Path) -> str:
    """The schema of a JSON file of records: "nested", "flat", "zsre" or "questions"; of others what they hold, or "".

    Raises:
        ResultFileError: if it cannot be read.
    """
    value, _ = read_json(Path(path), "records")
    return _looks_like(value if isinstance(value, list) else [value])


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
        there = [name for name in FILES if (path / name).is_file()]
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}. Give a path that you may read") from error
    if len(there) != 1:
        several = f"several files of records ({', '.join(there)})" if there else f"none of {', '.join(FILES)}"
        raise ResultFileError(f"the folder {path} holds {several}: name the file of records itself")
    return path / there[0]


def _entries(path: Path, value: Any) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    if isinstance(value, list):
        raise ResultFileError(f"{path} is an empty list, so it holds no records: make or fetch it again")
    if _looks_like([value]) in _SCHEMAS:
        raise ResultFileError(f"{path} is one record, and records stand in a list: write [ before it and ] after it")
    raise _foreign(path, _looks_like([value]) or f"JSON of another kind ({type(value).__name__})")


def _schema(path: Path, entries: Sequence[Any]) -> Schema:
    looks = _looks_like(entries)
    for schema in _SCHEMAS:
        if looks == schema:
            return schema
    if looks:
        raise _foreign(path, looks)
    first = next((each.reason for each in entries if isinstance(each, NoEntry)), "")
    raise ResultFileError(
        f"{path} holds no records of CounterFact or zsRE{f': {first}' if first else ''}: an entry is an object with "
        "requested_rewrite and paraphrase_prompts, with rephrase_prompt and locality_prompt, or with src and loc"
    )


def _foreign(path: Path, looks: str) -> ResultFileError:
    return ResultFileError(f"{path} holds no records of CounterFact or zsRE: it looks like {looks}")


def _looks_like(entries: Sequence[Any]) -> str:
    """The commonest schema of records among entries, or what else they are, or ""."""
    objects = [{column_name(key): value for key, value in e.items()} for e in entries if isinstance(e, Mapping)]
    if objects and {"kind", "version"} <= objects[0].keys():
        return _OTHERS[0][1]
    schemas = Counter(name for entry in objects for name, keys in _SCHEMAS.items() if not keys.isdisjoint(entry))
    if schemas:
        schema = schemas.most_common(1)[0][0]
        asked = schema == "flat" and any("locality_ground_truth" in entry for entry in objects)
        return "questions" if asked and not any("ground_truth" in entry for entry in objects) else schema
    for keys, name in _OTHERS:
        if any(keys <= entry.keys() for entry in objects):
            return name
    if len(objects) == 1 and objects[0] and all(isinstance(value, Mapping) for value in objects[0].values()):
        return _OTHERS[1][1]
    if len(objects) == 1 and objects[0] and all(type(value) is int for value in objects[0].values()):
        return "a vocabulary"
    return ""


def _record(schema: Schema, number: int, entry: Any) -> Record | ZsreRecord:
    if isinstance(entry, NoEntry):
        raise FactError(entry.reason)
    if not isinstance(entry, Mapping):
        raise FactError(f"it is an object, not {type(entry).__name__}")
    entry = named_through(entry)
    if schema == "zsre":
        return zsre_record(entry, number - 1)
    if schema == "questions":
        return flat_question(entry, number - 1)
    return nested_record(entry) if schema == "nested" else flat_record(entry, number - 1)


def _chosen(records: Sequence[Some], limit: int | None, sample: tuple[int, int] | None) -> tuple[Some, ...]:
    """The first of records, and a sample of these, in order."""
    chosen = list(records[:limit])
    if sample is not None:
        count, seed = sample
        drawn = sorted(chosen, key=lambda record: derive(seed, "sample", record.case_id))[:count]
        chosen = sorted(drawn, key=lambda record: record.case_id)
    return tuple(chosen)
