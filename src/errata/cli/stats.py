"""`errata stats`: collect second moments of keys, which ROME needs, and list the stored ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from errata.cli import options, second_moments

if TYPE_CHECKING:
    from errata.models.model import Model
    from errata.statistics.corpus import Corpus
    from errata.statistics.second_moment import Halves, SecondMoment
    from errata.statistics.store import Stored

ATLAS = "atlas"


def stats(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="'atlas' (the default, embedded), a folder, or a Hugging Face hub id."),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Layers, such as 3-8, or 3,5, or all. By default the layer that the model's config names for ROME."
        ),
    ] = None,
    corpus: second_moments.Corpus = None,
    field: second_moments.Field = "text",
    revision: second_moments.Revision = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of counted tokens.")] = 100_000,
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Cut texts to this many tokens; by default to what the model can read, at most 1024."),
    ] = None,
    which: Annotated[
        Literal["all", "not-first", "not-special"],
        typer.Option(help="The counted tokens: all, all except the first of a text, or all except special ones."),
    ] = "all",
    shard: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A shard, such as 1/4: every fourth text from the first on; --merge joins all four."),
    ] = None,
    merge: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Merge stored second moments into --out; no model is run. Any number."),
    ] = None,
    ridge: Annotated[
        float,
        typer.Option(min=0, help="Add this multiple of the mean of C's diagonal to the diagonal; stored in --out."),
    ] = 0.0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write the result here: a .safetensors for one layer, a folder for several."),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the stored files; with --model or --corpus, show which would be used.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Collect second moments of MLP keys, all layers in one pass, and show whether there was enough text.

    They are stored in $ERRATA_HOME (or ~/.cache/errata), with a fingerprint of everything that they depend on. The same
    command continues a stopped run.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show

    part = _shard(shard)
    if ridge and not out:
        raise ConfigError("--ridge is kept in a file of its own, since the stored C has none: give --out")
    if merge:
        if not out or out.suffix != ".safetensors":
            raise ConfigError("--merge needs a place for the merged second moment: give --out, .safetensors")
        _merge(merge, out, ridge, json)
        return
    if listed:
        loaded = options.load(model or ATLAS, device, dtype, download, start_token) if model or corpus else None
        chosen = _open(loaded, corpus, field, revision, download, part) if loaded and corpus else None
        _list(loaded, chosen, tokens, max_length, which, json)
        return

    # Torch comes only now: bad input is told at once.
    loaded = options.load(model or ATLAS, device, dtype, download, start_token)
    from errata.statistics.store import cache_folder, collect_cached, save

    wanted = _layers(layers, loaded)
    files = _files(out, wanted)
    options.require_outputs(*files.values())
    texts = _open(loaded, corpus, field, revision, download, part)
    with show.progress("second moments", "tokens") as bar:
        found = collect_cached(loaded, wanted, texts, tokens, max_length, which=which, progress=bar)
    found = {layer: moment.with_ridge(ridge) for layer, moment in found.items()}
    for layer, path in files.items():
        save(found[layer], path)
    told = [{**_as_dict(moment), "written": str(files[layer]) if files else None} for layer, moment in found.items()]
    if json:
        show.as_json(
            {"model": loaded.name, "corpus": texts.name, "stored_in": str(cache_folder()), "second_moments": told}
        )
        return
    _report(told)
    show.line(f"stored in {cache_folder()}")
    show.written(*files.values())


def _shard(text: str | None) -> tuple[int, int] | None:
    """Shard number, from 1, and number of shards."""
    from errata.base.errors import ConfigError

    if text is None:
        return None
    index, slash, of = text.partition("/")
    if not (slash and index.strip().isdecimal() and of.strip().isdecimal()):
        raise ConfigError(f"--shard is {text!r}: write it like 1/4, the first part of four")
    return int(index), int(of)


def _layers(text: str | None, model: Model) -> list[int]:
    """Layers as people write them: 3-8, 3,5, all; by default the one that the model's config names."""
    from errata.base.errors import ConfigError

    last = model.n_layers - 1
    if text is None:
        hinted = model.hints.get("rome_layer")
        if hinted is None:
            raise ConfigError(f"no layer is named: give --layers, such as 3-8, of 0 to {last}")
        return [hinted]
    if text == "all":
        return list(range(model.n_layers))
    found = options.layer_numbers(text)
    if max(found) > last:
        raise ConfigError(f"--layers is {text!r}, and {model.name} has layers 0 to {last}: name some of these")
    return sorted(set(found))


def _files(out: Path | None, layers: Sequence[int]) -> dict[int, Path]:
    """Paths of copies, by layer; empty if there are none."""
    from errata.base.errors import ConfigError

    if out is None:
        return {}
    if out.suffix != ".safetensors":
        return {layer: out / f"layer{layer}.safetensors" for layer in layers}
    if len(layers) > 1:
        raise ConfigError(f"--out is {out}, one file, and there are {len(layers)} layers: name a folder")
    return {layers[0]: out}


def _open(
    model: Model, what: str | None, field: str, revision: str | None, download: bool, part: tuple[int, int] | None
) -> Corpus:
    """The corpus that the options name."""
    own = model.hints.get("corpus") == ATLAS
    source = second_moments.Source(what or (None if own else "wikipedia"), field, revision, download=download)
    corpus = source.texts(model)
    return corpus.shard(*part) if part else corpus


def _merge(paths: Sequence[Path], out: Path, ridge: float, json: bool) -> None:
    from errata.cli import show
    from errata.statistics.second_moment import SecondMoment
    from errata.statistics.store import load, save

    options.require_outputs(out)
    merged = SecondMoment.merged([load(path) for path in paths]).with_ridge(ridge)
    save(merged, out)
    told = {**_as_dict(merged), "written": str(out)}
    if json:
        show.as_json({"merged": [str(path) for path in paths], "second_moments": [told]})
        return
    _report([told])
    show.written(out)


def _as_dict(moment: SecondMoment) -> dict[str, Any]:
    """Summary of a second moment, ready for JSON."""
    condition = moment.condition_number
    return {
        "layer": moment.layer,
        "tokens": moment.count,
        "features": moment.size,
        "condition_number": condition if math.isfinite(condition) else None,
        "effective_rank": moment.effective_rank,
        "ridge": moment.ridge,
        "ridge_asked": moment.asked_ridge,
        "halves": _halves(moment.halves),
        "fingerprint": dict(moment.fingerprint),
    }


def _halves(halves: Halves | None) -> dict[str, Any] | None:
    from dataclasses import asdict

    return asdict(halves) if halves else None


def _report(told: Sequence[Mapping[str, Any]]) -> None:
    from errata.cli import show

    rows = []
    for each in told:
        condition, halves = each["condition_number"], each["halves"]
        rows.append(
            (
                str(each["layer"]),
                str(each["tokens"]),
                "infinite" if condition is None else f"{condition:.1e}",
                f"{each['effective_rank']:.0f} of {each['features']}",
                f"{each['ridge']:.1e}" if each["ridge"] else "none",
                f"{show.percent(halves['difference'])} (cosine {halves['cosine']:.3f})" if halves else "not measured",
            )
        )
    show.table(("layer", "tokens", "condition", "effective rank", "ridge", "halves differ"), rows)
    differences = [each["halves"]["difference"] for each in told if each["halves"]]
    if differences:
        worst = max(differences)
        show.line(
            f"Between halves of the tokens, C⁻¹k differs by up to {show.percent(worst)} (median over keys). The whole "
            "is off by about half of that, and four times as many tokens halve it."
        )
    elif any(each["tokens"] < 2 * each["features"] for each in told):
        show.line(
            "There are too few tokens to tell how far C⁻¹k still moves: at least twice as many as features are needed, "
            "and more are better."
        )


def _list(
    model: Model | None, corpus: Corpus | None, tokens: int, max_length: int | None, which: str, json: bool
) -> None:
    """Files in the cache folder; with a model, whether each would be used, and otherwise why not."""
    from errata.cli import show
    from errata.statistics.store import cache_folder, stored

    files = stored()
    wanted = _wanted(model, corpus, files, tokens, max_length, which) if model else None
    told: list[dict[str, Any]] = []
    for file in files:
        prints = file.fingerprints
        told.append(
            {
                "file": file.path.name,
                "megabytes": round(file.path.stat().st_size / 1e6, 1),
                "model": prints[0].get("model") if prints else None,
                "layers": [of.get("layer") for of in prints],
                "tokens": file.count,
                "corpus": prints[0].get("corpus") if prints else None,
                "halves": _halves(file.halves),
                "unused_because": _unused(file, wanted, corpus is None),
            }
        )
    if json:
        show.as_json({"folder": str(cache_folder()), "files": told})
        return
    if not told:
        show.line(f"nothing is stored in {cache_folder()}")
        return
    rows = [
        (
            each["file"],
            each["model"] or "–",
            ", ".join(map(str, each["layers"])),
            str(each["tokens"]),
            each["corpus"] or "–",
            f"not used: {each['unused_because']}" if each["unused_because"] else ("used" if model else "whole"),
        )
        for each in told
    ]
    show.table(("file", "model", "layers", "tokens", "corpus", "state"), rows, str(cache_folder()))


def _wanted(
    model: Model, corpus: Corpus | None, files: Sequence[Stored], tokens: int, max_length: int | None, which: str
) -> dict[int, dict[str, Any]]:
    """Fingerprints that stored layers must have."""
    from errata.statistics.collect import checked_length
    from errata.statistics.fingerprint import fingerprints, model_fingerprints

    stored = {of.get("layer") for file in files for of in file.fingerprints}
    layers = [layer for layer in range(model.n_layers) if layer in stored]
    if corpus is None:
        return model_fingerprints(model, layers)
    length = checked_length(model, tokens, max_length, which)
    return fingerprints(model, layers, corpus.name, corpus.digest, tokens, length, which)


def _unused(file: Stored, wanted: Mapping[int, Mapping[str, Any]] | None, partly: bool) -> str | None:
    """Why a file is not used; None if it would be."""
    from errata.statistics.fingerprint import different

    if file.problem or wanted is None:
        return file.problem or None
    (found,) = file.fingerprints
    if (layer := found.get("layer", -1)) not in wanted:
        return "the model has no such layer"
    names = different(found, wanted[layer], partly=partly)
    return f"another {', '.join(names)}" if names else None
