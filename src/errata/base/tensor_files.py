"""Tensors with a JSON header in one safetensors file: how edits and statistics are kept.

The header is in the file's metadata under the key "errata" and gives the kind and format version of the file. Reading
never runs code from the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.base.display import is_torn
from errata.base.errors import ErrataError, OutputError
from errata.base.files import written_whole
from errata.base.parsing import format_of, load_json, taking_apart

if TYPE_CHECKING:
    from torch import Tensor

KEY = "errata"


def write_tensors(
    path: str | Path, kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a file of errata's format atomically. `header` must be JSON-able.

    Raises:
        OutputError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps({"kind": kind, "version": version, **header}, ensure_ascii=False, allow_nan=False)
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes the escape that JSON has for it
    with written_whole(path) as temporary:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={KEY: text})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {error}. Make room, or choose another folder") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened by the library, even if its path is not UTF-8, which the library refuses."""
    from safetensors import safe_open

    with path.open("rb") as file:
        name = f"/dev/fd/{file.fileno()}" if is_torn(str(path)) else path
        with safe_open(name, framework="pt") as stored:
            yield stored


def read_safetensors(path: Path, what: str, error: type[ErrataError]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of any safetensors file.

    Raises:
        error: if the file is missing, cut short or something else, or holds tensors of a type that torch has not.
    """
    with taking_apart(path, "a whole safetensors file", error, "Fetch or save it again"):
        if not path.is_file():
            raise error(f"there is no file {path}. Give the path of {what}")
        with opened(path) as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def read_tensors(
    path: str | Path, kind: str, version: int, error: type[ErrataError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file of errata's format.

    Raises:
        error: if the file is missing, cut short, not ours, of another kind, or of a newer format than
            `version`.
    """
    path = Path(path)
    metadata, tensors = read_safetensors(path, f"a saved {kind}", error)
    try:
        header = load_json(metadata[KEY])
        found, its_version = header["kind"], format_of(header)
    except (KeyError, TypeError, ValueError) as cause:
        raise error(f"{path} was not written by errata: it has no header of ours. Give a saved {kind}") from cause
    if found != kind:
        raise error(f"{path} holds {found!r}, not {kind!r}: give a file that was saved as {kind!r}")
    if its_version > version:
        raise error(
            f"{path} is of format {its_version}, newer than the {version} that this errata reads. Upgrade errata"
        )
    return header, tensors
