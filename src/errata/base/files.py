"""Files: what is read fits into memory, and what is written is whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errata.base.errors import OutputError, ResultFileError

MAX_BYTES = 512 * 2**20  # ten times CounterFact; what is made of a file takes several times as much memory


def content(path: str | Path, what: str, max_bytes: int = MAX_BYTES) -> bytes:
    """What a file holds.

    Args:
        path: the file.
        what: it should hold, for messages, such as "records".
        max_bytes: a larger file is refused before it is read.

    Raises:
        ResultFileError: if there is no such file, or it cannot be read, is too large, or is UTF-16.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ResultFileError(f"there is no file {path}. Give the path of a file of {what}")
        size = path.stat().st_size
        if size > max_bytes:
            raise ResultFileError(
                f"{path} has {size / 1e6:,.0f} MB, and files of {what} are read up to {max_bytes / 1e6:,.0f} MB, for "
                "they must fit into memory: split it"
            )
        found = path.read_bytes()
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}. Give a file that you may read") from error
    if found[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ResultFileError(f"{path} is UTF-16, and files of {what} are UTF-8: save it again as UTF-8")
    return found


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which takes the place of `path` if the block succeeds.

    The folder is made if need be. After an exception nothing is left behind and `path` is as it was. A link is
    followed: what it leads to is replaced.

    Raises:
        OutputError: if the folder cannot be made or written to, or what stands at `path` is no file.
    """
    target = _place(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, target)
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Make sure, before long work, that a file can be written at `path`; nothing is left there.

    Raises:
        OutputError: if it cannot.
    """
    made = [folder for folder in _place(path).parents if not folder.exists()]
    with contextlib.suppress(_Tried), written_whole(path):
        raise _Tried
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all.

    Raises:
        OutputError: if the file cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Tried(Exception):
    """The temporary file could be made; that was the question."""


def _place(path: str | Path) -> Path:
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder. Name a file in it")
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is no ordinary file, and would be replaced by one")
    except OutputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return target


def _cannot_write(path: str | Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write {path}: {reason}. Choose a place that you may write to")
