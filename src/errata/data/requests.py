"""Tables of rewrite requests: .csv, .tsv, .jsonl or .json, read line by line; a bad line does not affect the others.

| column | is |
|---|---|
| `subject` | what the fact is about |
| `prompt` | a sentence up to the object, with `{}` for the subject, or with the subject itself, once |
| one of `NEW`, such as `new_object` or `to` | the answer that the model should give |
| one of `OLD`, such as `object` or `from` | the previous answer; optional |
| `separator` | what stands between prompt and object: white space, or `none` or `space`; left out, the text decides |
| `name` or `case_id` | name of the row; optional |

In JSON an object may stand as `{"str": "football"}`, as in the requests of the published code, and a request within
`requested_rewrite`, as in CounterFact, or several, as in MQuAKE, each of which is a row; of one that stands in several
entries the first is kept. Read as they are, too: KnowEdit (whose `ground_truth` is a list), FastEdit (`target`),
CounterFact as it is prepared for tracing (`target_false`), and RippleEdits, where subject and objects are extracted
from the sentences. The further questions of these sets are not read. Names of columns are read as in tables of facts
(`fact_table.py`). Files are UTF-8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base.errors import FactError
from errata.base.facts import Rewrite, require_characters
from errata.data.fact_table import (
    BadLine,
    TableKind,
    field_fact,
    field_object,
    field_text,
    named,
    read_rows,
)
from errata.data.ripple_edits import is_ripple_edit, ripple_edit

NEW = ("new_object", "to", "target_new", "target", "target_false")
_BESIDE = (
    *("relation", "relation_id", "relation_prefix", "relation_suffix", "target_true_id", "target_false_id"),
    *("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts", "pararel_idx"),
    *("rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    *("rephrase", "portability", "locality", "cond"),  # KnowEdit
    "queries",  # FastEdit
    *("question", "questions", "answer", "answer_alias", "new_answer", "new_answer_alias", "single_hops"),  # MQuAKE
    *("new_single_hops", "orig"),
)
OLD = ("object", "from", "target_true", "ground_truth", "attribute")


@dataclass(frozen=True)
class RequestRow:
    """One request of a table.

    Attributes:
        line: the line on which it begins, from 1; in a .json list, the number of the entry, from 1.
        rewrite: the fact and its new object; the old object may be empty.
        name: the row's name in the table; `line` if it has none.
    """

    line: int
    rewrite: Rewrite
    name: str


@dataclass(frozen=True)
class RequestTable:
    """The bytes of a file.

    Attributes:
        rows: the requests, in order.
        bad: the lines that are none, in order.
        unit: the unit of `line`: "line" or "entry".
        digest: sha256 of the file's bytes, in hex.
        unread: names of its columns that mean nothing here.
    """

    rows: tuple[RequestRow, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str
    unread: tuple[str, ...] = ()

    @property
    def contradictions(self) -> tuple[tuple[RequestRow, ...], ...]:
        """Groups of rows that request different new objects for the same subject and prompt."""
        alike: dict[tuple[str, str], list[RequestRow]] = defaultdict(list)
        for row in self.rows:
            alike[row.rewrite.subject, row.rewrite.prompt].append(row)
        return tuple(tuple(rows) for rows in alike.values() if len({row.rewrite.new_object for row in rows}) > 1)


def read_requests(path: str | Path) -> RequestTable:
    """The requests of a table and its bad lines. If a request is listed twice, the first is kept.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl, .json.
        ResultFileError: if it is missing, lacks the columns, is another kind of file, or has no request.
    """
    return RequestTable(*read_rows(path, REQUESTS))


def _apart(found: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], bool]:
    """The requests of an entry, each with the entry's own fields, and whether others may have them too."""
    if is_ripple_edit(found):
        return [ripple_edit(found)], False
    if "requested_rewrite" not in found:
        return [found], False
    outer = {key: value for key, value in found.items() if key != "requested_rewrite"}
    several = found["requested_rewrite"]
    inner = several if isinstance(several, list) else [several]
    for each in inner:
        if not isinstance(each, Mapping):
            raise FactError(f"its requested_rewrite is an object with the request, not {type(several).__name__}")
    name = field_text(outer, "name", "case_id", number=True)
    rows: list[Mapping[str, Any]] = [{**outer, **named(each)} for each in inner]
    if len(rows) > 1 and name:
        rows = [{**row, "name": f"{name}.{number}"} for number, row in enumerate(rows, 1)]
    return rows, isinstance(several, list)


def _row(line: int, found: Mapping[str, Any]) -> RequestRow:
    fields = {name: _unwrapped(value) for name, value in found.items()}
    name = field_text(fields, "name", "case_id", number=True)
    require_characters("name", name)
    return RequestRow(line, field_fact(fields, *OLD).rewrite(field_object(fields, *NEW)), name or str(line))


def _unwrapped(value: Any) -> Any:
    """The text of `{"str": text}`."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


REQUESTS = TableKind(
    noun="request",
    needed=(("subject",), ("prompt", "template"), NEW),
    columns="subject, prompt and new_object, and may have object, separator and name",
    parse=_row,
    apart=_apart,
    optional=(OLD, ("separator",), ("name", "case_id")),
    beside=_BESIDE,
    identity=lambda row: (row.rewrite.subject, row.rewrite.prompt, row.rewrite.new_object),
)
