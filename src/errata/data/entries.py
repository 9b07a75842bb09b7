"""JSON files as lists of entries: a `.json` file holds a list, a `.jsonl` file one entry on each line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from errata.base.display import is_torn
from errata.base.errors import FactError, ResultFileError
from errata.base.facts import require_characters
from errata.base.files import MAX_BYTES, content
from errata.data.fact_table import named

MAX_LINE = 2**24  # characters of one entry of a .jsonl file


@dataclass(frozen=True)
class NoEntry:
    """A line that is not JSON, with the reason."""

    reason: str


def read_json(path: Path, what: str, max_bytes: int = MAX_BYTES) -> tuple[Any, str]:
    """Content of a JSON file, and the sha256 of its bytes in hex. For `.jsonl` a list, with a `NoEntry` for
    each line that is not JSON; blank lines are not counted.

    Bytes that are no UTF-8 become halves of characters, so that they spoil only the entry that they stand in.

    Args:
        path: the file.
        what: it should hold, for messages, such as "records".
        max_bytes: a larger file is refused before it is read.

    Raises:
        ResultFileError: if there is no such file, it is empty, too large, or no JSON.
    """
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ResultFileError(f"{path} holds no {what} by its ending: give a file that ends in .json or .jsonl")
    stored = content(path, what, max_bytes)
    text = stored.decode("utf-8-sig", "surrogateescape")
    if not text.strip():
        raise ResultFileError(f"{path} is empty, so it holds no {what}: make or fetch it again")
    digest = hashlib.sha256(stored).hexdigest()
    if path.suffix.lower() == ".jsonl":
        return [_line(line) for line in text.split("\n") if line.strip()], digest
    try:
        return json.loads(text), digest
    except (ValueError, RecursionError) as error:
        advice = "name it .jsonl if each line is an entry" if "Extra data" in str(error) else "mend or fetch it again"
        raise ResultFileError(f"{path} is not JSON ({error}), so it holds no {what}: {advice}") from error


def named_through(value: Any) -> Any:
    """A JSON value with the keys of all its objects as `column_name` writes them.

    Raises:
        FactError: if two keys of an object have one name.
    """
    if isinstance(value, Mapping):
        return {name: named_through(inner) for name, inner in named(value).items()}
    return [named_through(each) for each in value] if isinstance(value, list) else value


def require_keys(entry: Mapping[str, Any], *keys: str) -> None:
    """Check that an entry has these keys, with non-empty values.

    Raises:
        FactError: if not; the message names all that are missing.
    """
    missing = [key for key in keys if entry.get(key) is None]
    if missing:
        near = {key: get_close_matches(key, [other for other in entry if other not in keys], 1) for key in missing}
        told = (f"{key} (the nearest that it has: {near[key][0]!r})" if near[key] else key for key in missing)
        raise FactError(f"it has no {', '.join(told)}")


def text_in(entry: Mapping[str, Any], key: str) -> str:
    """The text under a key, unchanged.

    Raises:
        FactError: if there is none, or it is blank or not made of whole characters.
    """
    return whole_text(entry.get(key), key)


def optional_text(entry: Mapping[str, Any], key: str) -> str:
    """The text under a key, or "" if there is none.

    Raises:
        FactError: if there is something else, or a text not made of whole characters.
    """
    return text_in(entry, key) if entry.get(key) not in (None, "") else ""


def texts_in(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The texts under a key, unchanged; a single text counts as a list of one.

    Raises:
        FactError: if there is no list of texts, or one is blank or not made of whole characters.
    """
    value = entry.get(key)
    if isinstance(value, str):
        return (whole_text(value, key),)
    if not isinstance(value, list):
        raise FactError(f"its {key} is a list of texts, not {type(value).__name__}")
    return tuple(whole_text(each, f"{key}[{index}]") for index, each in enumerate(value))


def case_id(entry: Mapping[str, Any]) -> int:
    """The number of a record.

    Raises:
        FactError: if it is not a whole number, 0 or larger.
    """
    found = entry["case_id"]
    if type(found) is not int:
        raise FactError(f"its case_id is a whole number, not {type(found).__name__}")
    if found < 0:
        raise FactError(f"its case_id is {found}, and they count from 0")
    return found


def whole_text(value: Any, name: str, may_be_blank: bool = False) -> str:
    """A value, unchanged, after a check that it is a text.

    Raises:
        FactError: if it is none, or blank where that will not do, or not made of whole characters.
    """
    if not isinstance(value, str):
        raise FactError(f"its {name} is text, not {type(value).__name__}")
    if not (may_be_blank or value.strip()):
        raise FactError(f"its {name} is empty")
    if not value.isascii():
        if is_torn(value):
            raise FactError(f"there are bytes in its {name} that are no UTF-8: save the file as UTF-8")
        require_characters(name, value)
    return value


def _line(text: str) -> Any:
    if len(text) > MAX_LINE:
        return NoEntry(f"it has {len(text):,} characters, and a line is read up to {MAX_LINE:,}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return NoEntry(f"no JSON: {error}")
