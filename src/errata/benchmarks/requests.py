"""Tables of rewrite requests, in .csv, .tsv, .jsonl or .json: read line by line, so that one bad line spoils no other.

| column | is |
|---|---|
| `subject` | what the fact is about |
| `prompt` | a sentence up to the object, with `{}` for the subject, or with the subject itself, once |
| `new_object`, `to` or `target_new` | what the model is to answer |
| `object`, `from`, `target_true`, `ground_truth` or `attribute` | what the answer was; may be left out |
| `name` or `case_id` | what to call the row; may be left out |

In JSON an object may stand as `{"str": "football"}`, as in the requests of the published code, and a request within
`requested_rewrite`, as in CounterFact. Other columns are not read. Files are UTF-8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base.errors import FactError
from errata.base.facts import Rewrite, require_characters
from errata.benchmarks.fact_table import BadLine, TableKind, field_fact, field_text, read_rows

_NEW = ("new_object", "to", "target_new")
_OLD = ("object", "from", "target_true", "ground_truth", "attribute")


@dataclass(frozen=True)
class RequestRow:
    """One request of a table.

    Attributes:
        line: where it stands: the line it begins on, from 1; in a .json list, the number of the entry, from 1.
        rewrite: the fact and its new object; the old object may be empty.
        name: what the table calls the row; if nothing, `line`.
    """

    line: int
    rewrite: Rewrite
    name: str


@dataclass(frozen=True)
class RequestTable:
    """What a file holds.

    Attributes:
        rows: the requests, in order.
        bad: the lines that are none, in order.
        unit: what `line` counts: "line" or "entry".
        digest: sha256 of the file's bytes, in hex.
    """

    rows: tuple[RequestRow, ...]
    bad: tuple[BadLine, ...]
    unit: str
    digest: str

    @property
    def contradictions(self) -> tuple[tuple[RequestRow, ...], ...]:
        """Rows that want different new objects for one subject and prompt, those of one such pair together."""
        alike: dict[tuple[str, str], list[RequestRow]] = defaultdict(list)
        for row in self.rows:
            alike[row.rewrite.subject, row.rewrite.prompt].append(row)
        return tuple(tuple(rows) for rows in alike.values() if len({row.rewrite.new_object for row in rows}) > 1)


def read_requests(path: str | Path) -> RequestTable:
    """The requests of a table and its bad lines. Of a request that stands there twice, the first is kept.

    Raises:
        ConfigError: if the file's ending is none of .csv, .tsv, .jsonl, .json.
        ResultFileError: if it is missing, has not the columns, is no such file at all, or has no request.
    """
    return RequestTable(*read_rows(path, _REQUESTS))


def _row(line: int, found: Mapping[str, Any]) -> RequestRow:
    inner = found.get("requested_rewrite", {})
    if not isinstance(inner, Mapping):
        raise FactError(f"its requested_rewrite is an object with the request, not {type(inner).__name__}")
    fields = {name: _unwrapped(value) for name, value in {**found, **inner}.items()}
    name = field_text(fields, "name", "case_id", number=True)
    require_characters("name", name)
    return RequestRow(line, Rewrite(field_fact(fields, *_OLD), field_text(fields, *_NEW)), name or str(line))


def _unwrapped(value: Any) -> Any:
    """The text of `{"str": text}`."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


_REQUESTS = TableKind(
    noun="request",
    needed=(("subject",), ("prompt", "template"), _NEW),
    columns="subject, prompt and new_object, and may have object and name",
    parse=_row,
    identity=lambda row: (row.rewrite.subject, row.rewrite.prompt, row.rewrite.new_object),
)
