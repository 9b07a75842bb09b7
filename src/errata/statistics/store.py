"""Second moments on disk: safetensors files that say all that their numbers depend on.

A stored second moment is used only if its fingerprint is what it should be now: another model, tokenizer,
corpus or setting makes it stale. The cache folder is `statistics` in $ERRATA_HOME, or in ~/.cache/errata.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata.base.errors import ConfigError, ResultFileError, StaleStatistics
from errata.base.files import require_writable
from errata.base.tensor_files import read_tensors, write_tensors
from errata.models.model import Model
from errata.statistics.collect import (
    MAX_TOKENS,
    Progress,
    checked_layers,
    checked_length,
    collect,
    fingerprints,
)
from errata.statistics.corpus import Corpus
from errata.statistics.second_moment import SecondMoment

VERSION = 1
KIND = "second moment"


def save(moment: SecondMoment, path: str | Path) -> None:
    """Write a second moment, whole or not at all.

    Raises:
        OutputError: if the file cannot be written.
    """
    header = {"count": moment.count, "layer": moment.layer, "fingerprint": dict(moment.fingerprint)}
    write_tensors(path, KIND, VERSION, header, {"matrix": moment.matrix.cpu()})


def load(path: str | Path, fingerprint: Mapping[str, Any] | None = None) -> SecondMoment:
    """A stored second moment; with `fingerprint`, only if it is of that.

    Raises:
        ResultFileError: if the file is missing, cut short or not ours.
        StaleStatistics: if it was collected on something else than `fingerprint` says; the message names
        what.
    """
    header, tensors = read_tensors(path, KIND, VERSION, ResultFileError)
    try:
        moment = SecondMoment(tensors["matrix"], int(header["count"]), header["layer"], dict(header["fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise ResultFileError(f"{path} is a broken second moment: {error}. Collect it again") from error
    if fingerprint is not None:
        different = sorted(
            name
            for name in {*fingerprint, *moment.fingerprint}
            if fingerprint.get(name) != moment.fingerprint.get(name)
        )
        if different:
            raise StaleStatistics(
                f"{path} was collected with another {', '.join(different)}, so its numbers are not of this "
                "model and corpus. Collect them again"
            )
    return moment


def cache_folder() -> Path:
    """Where statistics are kept: `statistics` in $ERRATA_HOME, or else in ~/.cache/errata."""
    home = os.environ.get("ERRATA_HOME")
    base = (
        Path(home).expanduser()
        if home
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "errata"
    )
    return base / "statistics"


def cache_path(model: Model, fingerprint: Mapping[str, Any], folder: str | Path | None = None) -> Path:
    """The file of a second moment with this fingerprint, there or not."""
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-.") or "model"
    base = cache_folder() if folder is None else Path(folder)
    return base / f"{name}-layer{fingerprint['layer']}-{digest}.safetensors"


def collect_cached(
    model: Model,
    layers: Iterable[int],
    corpus: Corpus,
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    folder: str | Path | None = None,
) -> dict[int, SecondMoment]:
    """As `collect`, but layers that are in the cache folder already are read from there, and new ones put
    there.

    Raises:
        ConfigError: as `collect`, and if `corpus` is not a `Corpus`, whose digest is known before it is read.
        OutputError: if the cache folder cannot be written to.
    """
    if not isinstance(corpus, Corpus):
        raise ConfigError("cached statistics need a Corpus, whose digest is known: use Corpus.of or Corpus.from_files")
    wanted = checked_layers(model, layers)
    length = checked_length(model, max_tokens, max_length)
    prints = fingerprints(model, wanted, corpus.name, corpus.digest, max_tokens, length)
    paths = {layer: cache_path(model, prints[layer], folder) for layer in wanted}
    found: dict[int, SecondMoment] = {}
    for layer in wanted:
        try:
            found[layer] = load(paths[layer], prints[layer])
        except (ResultFileError, StaleStatistics):
            continue  # not there, or not whole: collected anew below
    missing = [layer for layer in wanted if layer not in found]
    if missing:
        for layer in missing:
            require_writable(paths[layer])
        for layer, moment in collect(model, missing, corpus, max_tokens, length, batch_size, progress).items():
            save(moment, paths[layer])
            found[layer] = moment
    return {layer: found[layer] for layer in wanted}
