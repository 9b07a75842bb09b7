"""Second moments on disk: safetensors files that record everything that their numbers depend on.

A stored second moment is used only if its fingerprint matches: with another model, tokenizer, corpus or setting it is
stale. The cache folder is `statistics` in $ERRATA_HOME, or in ~/.cache/errata. During collection, the sums are there in
a file that ends in .unfinished.safetensors, from which a stopped run continues.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError
from typing_extensions import NotRequired, TypedDict

from errata.base import cache
from errata.base.errors import ConfigError, OutputError, ResultFileError, StaleStatistics
from errata.base.files import require_writable
from errata.base.parsing import format_of, load_json, of_type, taking_apart
from errata.base.tensor_files import KEY, opened, read_tensors, write_tensors
from errata.models.model import Model
from errata.statistics import sums
from errata.statistics.collect import MAX_TOKENS, Progress, checked_layers, checked_length, collect
from errata.statistics.corpus import Corpus
from errata.statistics.fingerprint import different, fingerprints, model_fingerprints, short
from errata.statistics.published import load_published
from errata.statistics.second_moment import Halves, SecondMoment

VERSION = 2  # 1 had neither ridge nor halves
KIND = "second moment"


class _Halves(TypedDict):
    cosine: float
    difference: float
    keys: int


class _Header(TypedDict):
    """Header of a second moment's file."""

    count: Annotated[int, Field(ge=0)]
    layer: int | None
    fingerprint: dict[str, Any]
    ridge: NotRequired[float]
    halves: NotRequired[_Halves | None]


@dataclass(frozen=True)
class Stored:
    """Header of a file in a folder of statistics.

    Attributes:
        path: the file.
        problem: why it cannot be used as a second moment; "" if it can.
        fingerprints: of the layers in it: one, or several of an unfinished collection; none if it cannot be read.
        count: number of tokens.
        halves: how far C⁻¹k moves between halves of the tokens, if that was measured.
    """

    path: Path
    problem: str
    fingerprints: tuple[Mapping[str, Any], ...] = ()
    count: int = 0
    halves: Halves | None = None


def save(moment: SecondMoment, path: str | Path) -> None:
    """Write a second moment atomically.

    Raises:
        OutputError: if the file cannot be written; one that was there stays as it was.
    """
    header = {
        "count": moment.count,
        "layer": moment.layer,
        "fingerprint": dict(moment.fingerprint),
        "ridge": moment.asked_ridge,
        "halves": asdict(moment.halves) if moment.halves else None,
    }
    write_tensors(path, KIND, VERSION, header, {"matrix": moment.matrix.cpu()})


def load(path: str | Path, fingerprint: Mapping[str, Any] | None = None) -> SecondMoment:
    """A stored second moment; with `fingerprint`, only if it matches.

    Raises:
        ResultFileError: if the file is missing, cut short or not errata's.
        StaleStatistics: if its fingerprint differs from `fingerprint`; the message names the difference.
    """
    header, tensors = read_tensors(path, KIND, VERSION, ResultFileError)
    with taking_apart(path, "a whole second moment", advice="Collect it again"):
        of_type(header, _Header)
        moment = SecondMoment(
            tensors["matrix"],
            header["count"],
            header["layer"],
            dict(header["fingerprint"]),
            float(header.get("ridge", 0.0)),
            Halves(**header["halves"]) if header.get("halves") else None,
        )
    if fingerprint is not None:
        _require_same(path, different(moment.fingerprint, fingerprint))
    return moment


def load_any(path: str | Path, layer: int, model: Model | None = None) -> SecondMoment:
    """A second moment from any file: errata's, or one in the format of ROME's authors (.npz).

    Args:
        path: the file.
        layer: the layer that it is to be of. A published file does not say; it is taken to be.
        model: what it is to be used on. Of a file of ours all that it says of the model must be true of this one; a
            published file can only be of the right size.

    Raises:
        ResultFileError: if the file is missing, cut short, or holds no second moment.
        StaleStatistics: if it is of another layer or model.
    """
    published = Path(path).suffix.lower() == ".npz"
    moment = load_published(path, layer) if published else load(path)
    if moment.layer not in (layer, None):
        raise StaleStatistics(f"{path} is of layer {moment.layer}, not {layer}: collect that layer, or edit this one")
    if model is not None:
        if moment.size != model.d_mlp:
            raise StaleStatistics(
                f"{path} is of keys with {moment.size} features, and those of {model.name} have {model.d_mlp}: it is "
                "of another model. Collect it on this one"
            )
        if moment.fingerprint and not published:
            wanted = model_fingerprints(model, [layer])[layer]
            _require_same(path, different(moment.fingerprint, wanted, partly=True))
    return moment


def stored(folder: str | Path | None = None) -> list[Stored]:
    """All statistics in a folder (None: the cache folder), by name, without reading their numbers."""
    base = cache_folder() if folder is None else Path(folder)
    files = (path for path in base.glob("*.safetensors") if not path.name.startswith("."))
    return [_stored(path) for path in sorted(files)]


def cache_folder() -> Path:
    """Folder of stored statistics: `statistics` in $ERRATA_HOME, or else in ~/.cache/errata."""
    return cache.cache_folder("statistics")


def cache_path(model: Model, fingerprint: Mapping[str, Any], folder: str | Path | None = None) -> Path:
    """Path of the second moment with this fingerprint, whether it exists or not."""
    base = cache_folder() if folder is None else Path(folder)
    return base / f"{_file_name(model)}-layer{fingerprint['layer']}-{short(fingerprint)}.safetensors"


def collect_cached(
    model: Model,
    layers: Iterable[int],
    corpus: Corpus,
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    *,
    which: str = "all",
    progress: Progress | None = None,
    folder: str | Path | None = None,
) -> dict[int, SecondMoment]:
    """Like `collect`, but layers in the cache folder are read from it, and new ones are stored in it.

    If it is stopped, the same call continues.

    Raises:
        ConfigError: as `collect`, and if `corpus` is not a `Corpus`, whose digest is known before it is read.
        OutputError: if the cache folder cannot be written to.
    """
    if not isinstance(corpus, Corpus):
        raise ConfigError("cached statistics need a Corpus, whose digest is known: use Corpus.of or Corpus.open")
    wanted = checked_layers(model, layers)
    length = checked_length(model, max_tokens, max_length, which)
    prints = fingerprints(model, wanted, corpus.name, corpus.digest, max_tokens, length, which)
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
        # Named for all layers that were asked for: a run that is killed between two of its last files finds it.
        every = short({str(layer): short(prints[layer]) for layer in wanted})
        unfinished = paths[missing[0]].with_name(f"{_file_name(model)}-{every}.unfinished.safetensors")
        collected = collect(
            model, missing, corpus, max_tokens, length, which=which, progress=progress, checkpoint=unfinished
        )
        for layer, moment in collected.items():
            save(moment, paths[layer])
            found[layer] = moment
        unfinished.unlink(missing_ok=True)
    return {layer: found[layer] for layer in wanted}


def known_second_moment(model: Model, layer: int, progress: Progress | None = None) -> SecondMoment | None:
    """A layer's C without a named corpus: that of the model's own corpus, or else the cached one with the most tokens.

    None if there is neither.
    """
    if model.own_corpus is not None:
        corpus = model.own_corpus()
        try:
            return collect_cached(model, [layer], corpus, progress=progress)[layer]
        except OutputError:  # the cache cannot be written to
            return collect(model, [layer], corpus, progress=progress)[layer]
    wanted: Mapping[str, Any] | None = None
    for one in sorted(stored(), key=lambda one: -one.count):
        if one.problem or one.fingerprints[0].get("layer") != layer:
            continue
        wanted = wanted or model_fingerprints(model, [layer])[layer]
        if not different(one.fingerprints[0], wanted, partly=True):
            return load(one.path)
    return None


def _stored(path: Path) -> Stored:
    try:
        with opened(path) as file:
            header = load_json((file.metadata() or {})[KEY])
        if header["kind"] == sums.KIND:
            prints = tuple(of_type(header["fingerprints"], dict[str, dict[str, Any]]).values())
            return Stored(path, "unfinished: the command that began it goes on with it", prints, sum(header["counts"]))
        if header["kind"] != KIND:
            raise KeyError(header["kind"])
        if format_of(header) > VERSION:
            return Stored(path, "written by a newer errata")
        of_type(header, _Header)
        halves = Halves(**header["halves"]) if header.get("halves") else None
        return Stored(path, "", (header["fingerprint"],), header["count"], halves)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return Stored(path, "broken, or no second moment of ours")


def _require_same(path: str | Path, names: list[str]) -> None:
    if names:
        raise StaleStatistics(
            f"{path} was collected with another {', '.join(names)}, so its numbers are not of this "
            "model and corpus. Collect them again"
        )


def _file_name(model: Model) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-.") or "model"
