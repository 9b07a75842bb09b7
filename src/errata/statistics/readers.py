"""Texts from files as a stream, with bounded memory for files, texts and lines."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from errata.base.errors import ConfigError
from errata.base.extras import needed

TYPES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
FIELD = "text"

_LONGEST_TEXT = 1 << 20  # characters of a paragraph; what follows is a text of its own
_LONGEST_LINE = 1 << 26  # characters of a JSON line; a longer one is refused


def type_of(path: Path) -> str | None:
    """The type of a file of texts, by its ending; None if it is none."""
    return next((ending for ending in TYPES if path.name.lower().endswith(ending)), None)


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file, in order.

    Raises:
        ConfigError: if it is not text in UTF-8, not of its type, or a record has no such field or no text in it.
        MissingExtra: if it needs pyarrow, which is not installed.
    """
    kind = type_of(path)
    if kind == ".parquet":
        yield from _columns(path, field)
        return
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if kind in (".txt.gz", ".jsonl.gz")
            else path.open(encoding="utf-8-sig") as stream
        ):
            yield from (_paragraphs(stream, path) if kind in (".txt", ".txt.gz") else _records(stream, path, field))
    except (UnicodeDecodeError, OSError, zlib.error, EOFError) as error:
        raise ConfigError(f"{path} is not text in UTF-8, or its compression is broken: {error}") from error


def text_of(record: Any, field: str, where: str) -> str | None:
    """The text in a field of a record; None if the field is there and empty.

    Raises:
        ConfigError: if there is no such field, or no text in it.
    """
    if not isinstance(record, dict) or field not in record:
        fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
        raise ConfigError(f'{where}: not an object with a field "{field}". Name one that is there (--field): {fields}')
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f'{where}: the field "{field}" is not text. Name one that is (--field)')
    return text


def _paragraphs(stream: TextIO, path: Path) -> Iterator[str]:
    """Runs of lines without an empty one between them."""
    held: list[str] = []
    length = 0
    while line := stream.readline(_LONGEST_TEXT):
        if "\0" in line:
            raise ConfigError(f"{path} is not text: it holds bytes that are zero. Give a file of plain text")
        blank = not line.strip()
        if held and (blank or length + len(line) > _LONGEST_TEXT):
            yield "".join(held).strip()
            held, length = [], 0
        if not blank:
            held.append(line)
            length += len(line)
    if held:
        yield "".join(held).strip()


def _records(stream: TextIO, path: Path, field: str) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) == _LONGEST_LINE:
            raise ConfigError(f"{where}: longer than {_LONGEST_LINE} characters. Split it, or take its texts out")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not a JSON object. Each line is to be one") from error
        text = text_of(record, field, where)
        if text is not None:
            yield text


def _columns(path: Path, field: str) -> Iterator[str]:
    arrow = needed("pyarrow", "tables")
    parquet = needed("pyarrow.parquet", "tables")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ConfigError(
                    f'{path} has no column "{field}". Name one that is there (--field): {", ".join(names)}'
                )
            number = 0
            for rows in file.iter_batches(batch_size=256, columns=[field]):
                for value in rows.column(0).to_pylist():
                    number += 1
                    text = text_of({field: value}, field, f"{path}, row {number}")
                    if text is not None:
                        yield text
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a whole Parquet file: {error}. Fetch or make it again") from error
