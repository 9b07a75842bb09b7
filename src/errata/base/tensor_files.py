"""Tensors with a JSON header in one safetensors file: how edits and statistics are kept.

The header stands in the file's metadata under the key "errata" and says of which kind and format version the
file is. Reading runs no code from the file, whatever it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.base.errors import ErrataError, OutputError
from errata.base.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor

KEY = "errata"


def write_tensors(
    path: str | Path, kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a file of ours, whole or not at all. `header` must be JSON-able.

    Raises:
        OutputError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps({"kind": kind, "version": version, **header}, ensure_ascii=False, allow_nan=False)
    with written_whole(path) as temporary:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={KEY: text})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {error}. Make room, or choose another folder") from error


def read_tensors(
    path: str | Path, kind: str, version: int, error: type[ErrataError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file of ours.

    Raises:
        error: if the file is missing, cut short, not ours, of another kind, or of a newer format than
            `version`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise error(f"there is no file {path}. Give the path of a saved {kind}")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(
            f"{path} is no whole safetensors file ({cause}): cut short, or something else. Fetch or save it again"
        ) from cause
    try:
        header = json.loads(metadata[KEY])
        found, its_version = header["kind"], int(header["version"])
    except (KeyError, TypeError, ValueError) as cause:
        raise error(f"{path} was not written by errata: it has no header of ours. Give a saved {kind}") from cause
    if found != kind:
        raise error(f"{path} holds {found!r}, not {kind!r}: give a file that was saved as {kind!r}")
    if its_version > version:
        raise error(
            f"{path} is of format {its_version}, newer than the {version} that this errata reads. Upgrade errata"
        )
    return header, tensors
