"""File access: reads are limited in size, and writes are atomic.

A file is written in a hidden folder beside its place, `.NAME.XXXXXXXX.unwritten`, and renamed once it is whole. The
writer holds a lock in that folder; a folder whose lock is free was left by a writer that was killed, and the next
writer to the same place removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from errata.base.errors import ConfigError, OutputError, ResultFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 512 * 2**20  # ten times CounterFact; what is made of a file takes several times as much memory


def content(path: str | Path, what: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file.

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


def expanded(path: str | Path) -> Path:
    """A path with ~ replaced by the user's home folder.

    Raises:
        ConfigError: if it begins with ~ and the name of nobody on this machine.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with ~, and there is no such user here: write the folder out") from error


def resolved(path: str | Path) -> Path:
    """The absolute path with all links resolved. It need not exist.

    Raises:
        OSError: if links lead in a circle.
    """
    found = os.path.realpath(path)
    try:
        os.stat(found)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return Path(found)


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes the place of `path` if the block succeeds.

    The folder is made if need be. After an exception nothing is left behind and `path` is as it was. A link is
    followed: what it leads to is replaced. The file's permissions are those of any new file (umask), whatever the
    block did to write it.

    Raises:
        OutputError: if the folder cannot be made or written to, was removed or moved meanwhile, or what stands at
            `path` is not a file.
    """
    target = _place(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside(target) as (folder, mode):
            temporary = folder / f"new{target.suffix}"
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield temporary
            os.chmod(temporary, mode)  # some writers put a file of their own there, which others may not read
            os.replace(temporary, target)
        require_there(path)
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def aside(target: Path) -> Iterator[tuple[Path, int]]:
    """Yield a hidden folder beside `target` and the permissions of a new file there; the folder is removed afterwards.

    Folders that killed writers left there are removed first.

    Raises:
        OSError: if the folder cannot be made.
    """
    _remove_leftovers(target.parent)
    name = os.fsencode(target.name)[:150].decode(errors="ignore")  # a hidden name has a longest length too
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_ENDING, dir=target.parent))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locked(lock) is not False and (folder / _LOCK).exists():
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # taken for a leftover in the moment before it was locked
    try:
        os.write(lock, os.fsencode(target.name))
        yield folder, stat.S_IMODE(os.fstat(lock).st_mode)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def require_there(path: str | Path) -> None:
    """Check that a path still leads to the file that was written there.

    Raises:
        OutputError: if it does not.
    """
    if not Path(path).exists():
        raise OutputError(
            f"{path} was written, but has been removed since, or its folder has been moved: write it again to a place "
            "that stays"
        )


def require_writable(path: str | Path) -> None:
    """Check, before long work, that a file can be written at `path`; nothing is left behind.

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
    """Write UTF-8 text atomically. A lone surrogate, as in a file name that is not UTF-8, becomes an escape.

    Raises:
        OutputError: if the file cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


_ENDING, _LOCK = ".unwritten", "lock"
_OLD = 3600.0  # seconds after which a folder without a lock counts as left behind


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder. An old version that one had moved away is put back."""
    with contextlib.suppress(OSError):
        for left in [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(_ENDING)]:
            if not left.name.startswith("."):
                continue
            with contextlib.suppress(OSError):
                _remove_leftover(left)


def _remove_leftover(left: Path) -> None:
    try:
        lock = os.open(left / _LOCK, os.O_RDWR)
    except FileNotFoundError:  # its writer is about to make it, or was killed before
        if time.time() - left.stat().st_mtime > _OLD:
            shutil.rmtree(left)
        return
    try:
        free = _locked(lock)
        if time.time() - os.fstat(lock).st_mtime > _OLD if free is None else free:
            target = left.parent / os.fsdecode(os.read(lock, 1000) or b".")
            if (left / "old").exists() and not target.exists():
                os.replace(left / "old", target)
            shutil.rmtree(left)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool | None:
    """Whether a lock on an open file could be had, and is this process's now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # a file system without locks, or Windows
        return None
    return True


class _Tried(Exception):
    """The temporary file could be made; that was the question."""


def _place(path: str | Path) -> Path:
    try:
        target = resolved(path)
        if target.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder. Name a file in it")
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is not an ordinary file, and would be replaced by one")
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return target


def _cannot_write(path: str | Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write {path}: {reason}. Choose a place that you may write to")
