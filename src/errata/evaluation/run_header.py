"""Headers of runs over many records: provenance, settings and sha256 of inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.base.display import shown
from errata.base.errors import ConfigError, ResultFileError
from errata.base.fingerprint import tensor_digest
from errata.base.journal import read_journal
from errata.base.versions import library_versions
from errata.models.fingerprint import weights_digest
from errata.models.model import Model
from errata.statistics.second_moment import SecondMoment


def provenance(model: Model) -> dict[str, Any]:
    """Provenance of a run: its model, library versions, dtype and device, JSON-able."""
    return {
        "model": model.name,
        "fingerprint": weights_digest(model.hf),
        "versions": library_versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": model.hf.config._attn_implementation,
        **({"start_token": model.start_token} if model.start_token else {}),
    }


def header(model: Model, config: Mapping[str, Any], seed: int, **more: Any) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, JSON-able; `more` has what only this kind of run has."""
    return {**provenance(model), "config": dict(config), "seed": seed, **more}


def sha256(values: Any) -> str:
    """sha256, in hex, of JSON-able values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def moment_digest(second_moment: SecondMoment) -> str:
    """sha256, in hex, of a second moment's numbers."""
    return tensor_digest(second_moment.matrix)


def begun_with(path: str | Path, kind: str, version: int, key: str) -> Any:
    """A setting in the header of the run at `path`; None if there is no such run, or it does not name it."""
    with contextlib.suppress(ResultFileError):  # opening the file will say what is wrong
        return read_journal(path, kind, version)[0].get(key)
    return None


def require_no_more(path: str | Path, there: int, wanted: int, what: str) -> None:
    """Check that a run is not continued with fewer items than it already holds.

    Raises:
        ConfigError: if it is.
    """
    if there > wanted:
        raise ConfigError(
            f"{path} is a run over {there} {what}, and {wanted} are asked for: ask for {there} or more, which adds to "
            "it, or name another file"
        )


def broken(path: object, line: object) -> ResultFileError:
    """The error for a record that errata did not write."""
    text = json.dumps(line, ensure_ascii=False)
    return ResultFileError(
        f"{path} holds a record that does not fit its header ({shown(text[:80])}): it was changed by hand. "
        "Begin another file"
    )
