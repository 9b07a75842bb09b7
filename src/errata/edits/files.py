"""Edits on disk: a safetensors file with a JSON header in its metadata, under the key "errata".

The tensors are called "<number of the delta>.<part>", such as "0.write" and "0.read". A rank-one edit of
GPT-2 XL takes 33 KB. Loading executes nothing, checks shapes and numbers, and recomputes the edit's id: a
file in which a bit of the content has changed is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from errata.base.errors import EditFileError
from errata.base.parsing import of_type, taking_apart
from errata.base.tensor_files import read_tensors, write_tensors
from errata.edits.delta import KINDS, Delta

VERSION = 2
SINCE = {"low_rank": 2}  # kinds that are younger than format 1: a file names the oldest format that can hold it


def write(path: str | Path, header: dict[str, Any], deltas: tuple[Delta, ...]) -> None:
    """Write an edit's header and deltas atomically.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors = {f"{i}.{part}": t for i, delta in enumerate(deltas) for part, t in delta.tensors().items()}
    kinds = [{"kind": delta.kind, "weight": delta.weight} for delta in deltas]
    version = max(SINCE.get(delta.kind, 1) for delta in deltas)
    write_tensors(path, "edit", version, {**header, "deltas": kinds}, tensors)


def read(path: str | Path) -> tuple[dict[str, Any], tuple[Delta, ...]]:
    """The header and deltas of a saved edit.

    Raises:
        EditFileError: if the file is missing, cut short, not a saved edit, of a newer format, or holds tensors
            that can be no change of a weight (shapes, NaN).
    """
    header, tensors = read_tensors(path, "edit", VERSION, EditFileError)
    with taking_apart(path, "a whole edit", EditFileError, "Its tensors are not what its header says: save it again"):
        deltas = tuple(_delta(i, entry, tensors) for i, entry in enumerate(header.pop("deltas")))
        if {f"{i}.{part}" for i, delta in enumerate(deltas) for part in delta.tensors()} != set(tensors):
            raise KeyError("tensors that belong to no delta")
    return header, deltas


def _delta(number: int, entry: dict[str, str], tensors: dict[str, Tensor]) -> Delta:
    prefix = f"{number}."
    parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return KINDS[entry["kind"]](of_type(entry["weight"], str), **parts)
