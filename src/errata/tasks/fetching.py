"""Download of published sets: only on request, resumed where it stopped, verified, and not repeated.

A partial file is `counterfact.part.json`, with the server's version tag in `counterfact.part.json.version`; if the tag
has changed, the download starts again. A complete file has its sha256 beside it, in `counterfact.json.sha256` (for
`sha256sum -c`), so that later changes are noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from errata.base.cache import cache_folder
from errata.base.errors import ErrataError, OutputError, ResultFileError
from errata.base.files import write_text
from errata.data.entries import read_json
from errata.data.fact_table import read_facts
from errata.data.snippets import read_snippets
from errata.data.sources import Source
from errata.tasks.records import read_records

if TYPE_CHECKING:
    import httpx2

Progress = Callable[[int, int | None], None]
State = Literal["absent", "unfinished", "here", "changed"]

_SECONDS = 30.0  # without a byte, after which a connection counts as lost


class NotFetched(ErrataError, ConnectionError):
    """A file that could not be downloaded."""


def place(source: Source, folder: str | Path | None = None) -> Path:
    """Path of a source's file, existing or not: in a folder, or (None) in `data` of the cache folder."""
    return (cache_folder("data") if folder is None else Path(folder)) / source.file


def state(source: Source, folder: str | Path | None = None) -> State:
    """Whether the file of a source exists and is still what was fetched."""
    target = place(source, folder)
    if not target.is_file():
        return "unfinished" if _part(target).is_file() else "absent"
    expected = _receipt(target) or source.sha256
    return "here" if expected in (None, _digest(target)) else "changed"


def fetch(source: Source, folder: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The file of a source, fetched if it does not exist. The next call continues a stopped one.

    Args:
        source: which one.
        folder: where to put it; None is `data` in the cache folder.
        progress: called often with (bytes so far, total bytes or None).

    Raises:
        NotFetched: if it cannot be reached, or the transfer stopped.
        ResultFileError: if the downloaded or existing file is not the expected one.
        OutputError: if it cannot be written.
    """
    target = place(source, folder)
    part = _part(target)
    try:
        if target.exists():
            _require_unchanged(source, target)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(source.url, part, target, progress)
        digest = _checked(source, part, f"what came from {source.url}")
        write_text(_beside(target, ".sha256"), f"{digest}  {target.name}\n")
        os.replace(part, target)
        _beside(part, ".version").unlink(missing_ok=True)
    except ResultFileError:
        part.unlink(missing_ok=True)  # what is wrong with it does not mend by going on
        raise
    except ErrataError:
        raise
    except OSError as error:
        raise OutputError(f"cannot read or write {target}: {error.strerror}. Make room, or name another folder") from (
            error
        )
    return target


def _require_unchanged(source: Source, target: Path) -> None:
    """Check that an existing file is the one that was fetched. A file from elsewhere is verified like a new one."""
    receipt = _receipt(target)
    if not receipt:
        digest = _checked(source, target, f"{target}")
        write_text(_beside(target, ".sha256"), f"{digest}  {target.name}\n")
    elif receipt != _digest(target):
        raise ResultFileError(
            f"{target} is not what was fetched any more (its sha256 was {receipt}): remove it to fetch it again, or "
            f"{_beside(target, '.sha256').name} to keep it as it is"
        )


def _checked(source: Source, path: Path, name: str) -> str:
    """The digest of a file that is what the source says, or else can be read as such."""
    size, digest = path.stat().st_size, _digest(path)
    if source.size not in (None, size):
        raise ResultFileError(f"{name} has {size:,} bytes, and {source.file} has {source.size:,}: fetch it again")
    if source.sha256:
        if digest != source.sha256:
            raise ResultFileError(
                f"{name} is not {source.file} as it is known: its sha256 is {digest}, not {source.sha256}. It was "
                "changed or damaged on the way: fetch it again"
            )
        return digest
    try:
        count = _READERS[source.schema](path)
    except ErrataError as error:
        raise ResultFileError(f"{name} is no {source.file}: {error}") from error
    if source.count not in (None, count):
        raise ResultFileError(f"{name} has {count:,} entries, and {source.file} has {source.count:,}: fetch it again")
    return digest


def _count_records(path: Path) -> int:
    found = read_records(path, with_snippets=False)
    return len(found.records) + len(found.bad)


def _count_facts(path: Path) -> int:
    table = read_facts(path)
    return len(table.rows) + len(table.bad)


def _count_words(path: Path) -> int:
    words, _ = read_json(path, "words")
    if not isinstance(words, dict) or any(type(number) is not int for number in words.values()):
        raise ResultFileError("a vocabulary is an object with a number for each word")
    return len(words)


def _count_numbers(path: Path) -> int:
    from errata.base.arrays import read_array

    array = read_array(path)
    if array.ndim != 1 or array.dtype.kind != "f":
        raise ResultFileError("it is not a row of numbers")
    return len(array)


_READERS: dict[str, Callable[[Path], int]] = {
    "records": _count_records,
    "facts": _count_facts,
    "snippets": lambda path: len(read_snippets(path).groups),
    "vocabulary": _count_words,
    "array": _count_numbers,
}


def _download(url: str, part: Path, target: Path, progress: Progress | None) -> None:
    """Bring a file in, going on with what is there of it. A lost connection is tried again as long as that helps."""
    import httpx2

    while True:
        before = _size(part)
        try:
            _transfer(url, part, progress)
            return
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            if isinstance(error, httpx2.TransportError) and _size(part) > before:
                continue
            reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
            raise NotFetched(
                f"could not fetch {url} ({reason}): try again, for the {_size(part):,} bytes that came are kept, or "
                f"get the file elsewhere and put it at {target}"
            ) from error


def _transfer(url: str, part: Path, progress: Progress | None) -> None:
    """One request, for what is missing."""
    import httpx2

    version = _beside(part, ".version")
    begin = _size(part) if version.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # ranges are of the file's own bytes
    if begin:
        headers |= {"Range": f"bytes={begin}-", "If-Range": version.read_text(encoding="utf-8")}
    with httpx2.stream("GET", url, headers=headers, follow_redirects=True, timeout=_SECONDS) as response:
        if begin and response.status_code == 416:  # nothing comes after what is there
            if response.headers.get("Content-Range") != f"bytes */{begin}":
                part.unlink()
                _transfer(url, part, progress)
            return
        response.raise_for_status()
        if response.status_code != 206:
            begin = 0
            _keep_version(response, version)
        length = response.headers.get("Content-Length", "")
        total = begin + int(length) if length.isdecimal() else None
        with open(part, "ab" if begin else "wb") as file:
            for block in response.iter_raw():
                begin += file.write(block)
                if progress:
                    progress(begin, total)


def _keep_version(response: httpx2.Response, version: Path) -> None:
    """Store the server's version tag of the file, if it has one: only with it can a partial download be continued."""
    tag = response.headers.get("ETag", "")
    name = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")
    if name:
        write_text(version, name)
    else:
        version.unlink(missing_ok=True)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.stem}.part{target.suffix}")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _receipt(target: Path) -> str:
    """The sha256 that stands beside a file, or ""."""
    try:
        return (_beside(target, ".sha256").read_text(encoding="utf-8").split() or [""])[0]
    except (OSError, ValueError):
        return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
