"""Journals: results saved as they are computed, one JSON object a line after a header line; a kill does no harm.

A line is written at once and reaches the disk before `append` returns, so that a killed run loses at most the line
being written. The next run cuts that line off and continues. Floats are read back bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata.base.errors import OutputError, ResultFileError
from errata.base.files import content, written_whole
from errata.base.parsing import format_of, load_json
from errata.base.settings_diff import differing, flat

try:
    import fcntl
except ImportError:  # Windows: there two writers at once are not noticed
    fcntl = None  # type: ignore[assignment]


_DIGEST = re.compile(r"[0-9a-f]{32}(?:[0-9a-f]{32})?$")  # of 128 or 256 bits


class Journal:
    """A journal that is open for appending. Made by `Journal.open`.

    Attributes:
        path: where it is.
        records: the records that were there on opening; those appended later are not added.
    """

    def __init__(self, path: Path, descriptor: int, records: list[dict[str, Any]]):
        self.path = path
        self.records = records
        self._descriptor: int | None = descriptor

    @classmethod
    def open(
        cls,
        path: str | Path,
        kind: str,
        version: int,
        header: Mapping[str, Any],
        *,
        ignore: Iterable[str] = (),
        names: Mapping[str, str] | None = None,
    ) -> Journal:
        """Start a journal, or continue the existing one.

        The folder is made if need be. A line that a kill left half written at the end is cut off.

        Args:
            path: the file.
            kind: kind of its content, such as "evaluation".
            version: the format of its records.
            header: JSON-able settings that all its records depend on.
            ignore: keys of the header that may differ when going on, such as versions of libraries.
            names: what to call settings whose values are digests, by their keys, with dots for nested ones.

        Raises:
            ResultFileError: if the file is not of this kind, version and header, or is broken in the middle.
            OutputError: if it cannot be written, or another process is writing to it.
        """
        path = Path(path)
        descriptor = _locked(path)
        try:
            with open(descriptor, "rb", closefd=False) as stored:
                before = stored.read()
            found, records, whole = _parsed(path, before, kind)
            if found is not None:
                _require_same(
                    path, found, version, json.loads(json.dumps(header, allow_nan=False)), set(ignore), names or {}
                )
            if whole < len(before):
                os.ftruncate(descriptor, whole)
            journal = cls(path, descriptor, records)
            if found is None:
                journal.append({"kind": kind, "version": version, **header})
        except OSError as error:
            os.close(descriptor)
            raise error if isinstance(error, OutputError) else _cannot_write(path, error) from error
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a JSON-able record. When this returns, it is on disk; if this raises, nothing of it is in the file.

        Raises:
            OutputError: if it cannot be written, the journal was closed, or its file was removed or replaced.
            ValueError: if the record holds a number that is not finite.
        """
        if self._descriptor is None:
            raise OutputError(f"the journal {self.path} was closed: open it again to add to it")
        line = _line(record)
        self.require_there()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise _cannot_write(self.path, error) from error

    def require_there(self) -> None:
        """Check that the path still leads to the open file; otherwise later records would be lost.

        Raises:
            OutputError: if the file, or its folder, was removed, moved or replaced since the journal was opened.
        """
        if self._descriptor is None:
            return
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            there = False
        if not there:
            raise OutputError(
                f"{self.path} was removed, moved or replaced while it was being written, so what is added to it would "
                "be lost: put it back and start again to go on, or begin another file"
            )

    def close(self) -> None:
        """Release the file for other writers. Closing twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.require_there()
        finally:
            self.close()


def read_journal(path: str | Path, kind: str, version: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header, with its kind and version, and the records of a journal, which may still be growing.

    A line that is only half there at the end is left out.

    Raises:
        ResultFileError: if the file is missing, not ours, of another kind, broken, or of a newer format than
            `version`.
    """
    path = Path(path)
    header, records, _ = _parsed(path, content(path, kind, max_bytes=sys.maxsize), kind)
    if header is None:
        raise ResultFileError(f"{path} ends within its first line, so it holds no {kind}. Make or fetch it again")
    if header["version"] > version:
        raise ResultFileError(
            f"{path} is of format {header['version']}, newer than the {version} that this errata reads. Upgrade errata"
        )
    return header, records


def write_journal(
    path: str | Path, kind: str, version: int, header: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> None:
    """Write a complete journal atomically.

    Raises:
        OutputError: if the file cannot be written.
        ValueError: if something in it is a number that is not finite.
    """
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(_line({"kind": kind, "version": version, **header}))
        file.writelines(map(_line, records))


def _line(value: Mapping[str, Any]) -> bytes:
    # A lone surrogate, as in a file's name that is not UTF-8, becomes the escape that JSON has for it.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None if it is not one."""
    try:
        value = load_json(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parsed(path: Path, stored: bytes, kind: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header (None if the file is empty or ends within it), records, and how many bytes are whole."""
    *lines, tail = stored.split(b"\n")
    values = [_object(line) for line in lines]
    if values and values[-1] is None and not tail:  # cut short by the end of a machine, not of the process alone
        del values[-1]
    if not values:
        start = f'{{"kind": {json.dumps(kind, ensure_ascii=False)}, "version": '.encode()
        if not start.startswith(stored) and not stored.startswith(start):
            raise _foreign(path, kind)
        return None, [], 0
    header, *records = values
    if header is None or "kind" not in header:
        raise _foreign(path, kind)
    try:
        format_of(header)
    except (KeyError, ValueError):
        raise _foreign(path, kind) from None
    if header["kind"] != kind:
        raise ResultFileError(f"{path} holds {header['kind']!r}, not {kind!r}: give a file that was saved as {kind!r}")
    if None in records:
        raise ResultFileError(
            f"line {records.index(None) + 2} of {path} is broken: what stands there is not JSON object. Remove the "
            "line if you know what damaged the file, or begin another"
        )
    whole = sum(len(line) + 1 for line in lines[: len(values)])
    return header, [record for record in records if record is not None], whole


def _require_same(
    path: Path, found: dict[str, Any], version: int, wanted: dict[str, Any], ignore: set[str], names: Mapping[str, str]
) -> None:
    """Check that a journal may be continued: same version, same header except for the keys in `ignore`."""
    if found["version"] != version:
        raise ResultFileError(
            f"{path} is of format {found['version']}, and this errata would go on in format {version}. Name another "
            "file, or finish this one with the errata that began it"
        )
    before, now = (
        flat({key: value for key, value in header.items() if key not in {"kind", "version", *ignore}})
        for header in (found, wanted)
    )
    different = differing(before, now, missing=...)
    if different:
        said = "; ".join(_difference(key, before, now, names) for key in different)
        raise ResultFileError(
            f"{path} was begun with other settings, so new records would not belong with its old ones: {said}. "
            "Give the same settings to go on with it, or name another file"
        )


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Difference of a setting: its old and new value; for digests, only that it differs."""
    digests = [value for value in (before.get(key), now.get(key)) if isinstance(value, str) and _DIGEST.match(value)]
    if len(digests) == 2:
        return f"{names.get(key, key)}: others than then"
    return f"{names.get(key, key)} was {_short(before, key)}, now is {_short(now, key)}"


def _short(header: Mapping[str, Any], key: str) -> str:
    if key not in header:
        return "not given"
    if isinstance(header[key], str) and _DIGEST.match(header[key]):
        return "given"
    text = json.dumps(header[key], ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _locked(path: Path) -> int:
    """A file descriptor for reading and writing that no other process has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: it is not an ordinary file. Name another")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{path} is being written by another process, and two would mix their records up: wait until it "
                "ends, or name another file"
            ) from None
        except OSError:  # a file system without locks
            pass
    return descriptor


def _foreign(path: Path, kind: str) -> ResultFileError:
    return ResultFileError(f"{path} was not written by errata: it has no header of ours. Give a file of {kind}")


def _cannot_write(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write {path}: {reason}. Make room, or choose a place that you may write to")
