"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errata.base.errors import OutputError


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which takes the place of `path` if the block succeeds.

    The folder is made if need be. After an exception nothing is left behind and `path` is as it was.

    Raises:
        OutputError: if the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Choose a folder that you may write to"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder. Name a file in it")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Make sure, before long work, that a file can be written at `path`; nothing is left there.

    Raises:
        OutputError: if it cannot.
    """
    with contextlib.suppress(_Tried), written_whole(path):
        raise _Tried


class _Tried(Exception):
    """The temporary file could be made; that was the question."""


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
