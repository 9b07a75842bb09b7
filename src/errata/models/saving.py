"""Saving of a `Model` to a folder that `from_pretrained` loads.

A folder is written beside its place and renamed once it is whole, so that a full disk leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.base.display import is_torn
from errata.base.errors import OutputError
from errata.base.files import aside, require_there, resolved
from errata.base.interrupt import unbroken

if TYPE_CHECKING:
    from errata.models.model import Model

NOTES = "errata.json"


def save_pretrained(model: Model, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write the current weights, config and tokenizer atomically, for `from_pretrained`.

    Weights are safetensors in the model's own dtype; tied ones are written once.

    Args:
        model: the model; left unchanged.
        folder: a new or an empty one.
        notes: what else to say of the model, JSON-able; it is written to errata.json in the folder.

    Raises:
        OutputError: if the folder holds something already, or cannot be written.
    """
    from safetensors import SafetensorError

    if is_torn(os.path.realpath(folder)):
        raise OutputError(
            f"cannot write the folder {folder}: transformers takes no path that is not UTF-8. Name another"
        )
    with written_folder(folder) as temporary:
        try:
            with _no_bars():
                model.hf.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OutputError(f"cannot write {folder}: {error}. Make room, or choose another place") from error
        if notes is not None:
            text = json.dumps(notes, ensure_ascii=False, indent=1, allow_nan=False)
            (temporary / NOTES).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_folder(path: str | Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `path` if the block succeeds.

    After an exception nothing is left behind and `path` is as it was. A folder that holds something is replaced
    only if `replaceable` says that it may be; of the old and the new, one is there at every moment, at worst (a
    kill between two renames) the old one under a hidden name beside its place, from where the next writer puts it back.

    Raises:
        OutputError: if the place is taken, or cannot be written to.
    """
    target = require_free(path, replaceable)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside(target) as (hidden, mode):
            new, old = hidden / "new", hidden / "old"
            new.mkdir()  # not the hidden folder itself, which only its owner may enter
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    file.chmod(mode)  # safetensors makes files that others may not read
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(new, target)
            except BaseException:
                if old.exists():
                    os.replace(old, target)
                raise
        require_there(path)
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def require_free(path: str | Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> Path:
    """Check, before long work, that a folder may be written at `path`; returns the resolved path.

    Raises:
        OutputError: if a file stands there, or a folder that holds something and is not `replaceable`.
    """
    try:
        target = resolved(path)
        if target.exists() and not target.is_dir():
            raise OutputError(f"cannot write the folder {path}: a file stands there. Name a new folder")
        if target.is_dir() and any(target.iterdir()) and not replaceable(target):
            raise OutputError(
                f"cannot write the folder {path}: it holds other things, which would be lost. Name a new one"
            )
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return target


@unbroken
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_write(path: str | Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write the folder {path}: {reason}. Make room, or choose another place")
