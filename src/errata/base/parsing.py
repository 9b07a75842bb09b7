"""Parsing of untrusted files: anything that goes wrong becomes a one-line error about the file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from errata.base.display import shown
from errata.base.errors import ErrataError, MissingExtra, ResultFileError


@contextlib.contextmanager
def taking_apart(
    path: str | Path,
    what: str,
    error: type[ErrataError] = ResultFileError,
    advice: str = "Fetch or make it again",
) -> Iterator[None]:
    """Context that turns every exception into one error about the file. Errors of the class `error` pass unchanged.

    The block must only turn the content of the file into values. Then any exception, of whatever type a library raises
    on unexpected bytes, is the file's fault.

    Args:
        path: the file.
        what: its expected content, for the message, such as "a saved edit".
        error: the class to raise.
        advice: advice for the user.

    Raises:
        error: if the block raises anything else.
    """
    try:
        yield
    except (error, MissingExtra):
        raise
    except MemoryError as cause:
        raise error(f"{path} is broken, or not {what}: it announces more than fits into memory. {advice}") from cause
    except Exception as cause:
        raise error(f"{path} is broken, cut short, or not {what}: {reason_of(cause)}. {advice}") from cause


def reason_of(cause: BaseException) -> str:
    """Message of an exception, in one line."""
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    said = " ".join(str(cause).split()).rstrip(".")
    if isinstance(cause, KeyError):
        return f"it has no {said}"
    return said or type(cause).__name__


def load_json(text: str | bytes) -> Any:
    """A JSON value. Numbers are finite, as JSON has them, and nesting is limited.

    Raises:
        ValueError: if it is none.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def of_type(value: Any, kind: Any) -> Any:
    """A value from a file, unchanged, after a check that it is of a type such as `list[int]` or a TypedDict.

    Types are exact: neither True nor "3" counts as an int. An object may have further keys.

    Raises:
        ValueError: if it is of another; the message says where.
    """
    with _in_one_line():
        _adapter(kind).validate_python(value, strict=True)
    return value


def instance_of(value: Any, kind: Any) -> Any:
    """An instance of a type with dataclasses and tuples, made from a JSON value; as strict as `of_type`.

    Raises:
        ValueError: if the value is of another type; the message says where.
    """
    with _in_one_line():
        return _adapter(kind).validate_json(json.dumps(value, allow_nan=False), strict=True)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Say in one line where a value is of another type."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(shown(f"{where + ': ' if where else ''}{first['msg']}")) from None


def format_of(header: dict[str, Any]) -> int:
    """The format number in a header.

    Raises:
        ValueError: if it has none: a positive whole number.
    """
    version = header["version"]
    if type(version) is not int or not 1 <= version < 2**31:
        raise ValueError("its format is not a number")
    return version


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    except Exception:  # a TypedDict brings its own config
        return TypeAdapter(kind)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is out of range")
    return number
