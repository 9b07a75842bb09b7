"""`errata sweep` and `errata sequence`: edits over many records."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from errata.base.display import tell as say
from errata.cli import moments, options, tables

if TYPE_CHECKING:
    from errata.base.facts import Fact, Rewrite
    from errata.benchmarks.fact_table import BadLine
    from errata.evaluation.sequence import SequenceScores
    from errata.evaluation.sites import SiteScores
    from errata.models.model import Model
    from errata.models.tokens import Role

Save = Annotated[Path, typer.Option(help="The results, .jsonl: each as soon as it is there, so a stopped run goes on.")]

_RESERVED = 100  # records of the atlas whose subjects are never among the untouched facts
_REASONS = 4  # told on the terminal: one a token


def sweep(
    save: Save,
    out: options.Picture = None,
    model: options.ModelName = "atlas",
    records: Annotated[int, typer.Option(min=1, help="How many records, of the atlas's own.")] = 20,
    layers: Annotated[Optional[str], typer.Option(help="Such as 0-7 or 2,4,6; all unless given.")] = None,  # noqa: UP045
    tokens: Annotated[
        str,
        typer.Option(
            help="Roles of the tokens, with commas between; subject_first, subject_last, subject_first_after and last "
            "unless given.",
            show_default=False,
        ),
    ] = "subject_first,subject_last,subject_first_after,last",
    corpus: moments.Corpus = None,
    field: moments.Field = "text",
    revision: moments.Revision = None,
    corpus_tokens: moments.Tokens = 100_000,
    identity: moments.Identity = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Edit records at every layer and token and score the edits, after Figure 5 of the paper.

    A run that was stopped goes on where it was if it is started again, and goes on with more --records.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show

    source = moments.Source(corpus, field, revision, corpus_tokens, None, identity, download)
    numbers = None if layers is None else options.layer_numbers(layers)
    _require_files(save, out)

    # Torch comes only now: bad input is told at once.
    from errata.atlas.records import records as records_of_the_atlas
    from errata.evaluation.sites import sweep_sites

    loaded = options.load(model, device, dtype, download, start_token)
    if not _is_atlas(loaded):
        raise ConfigError(
            f"a sweep scores edits by the prompts of records, and there are none yet for {loaded.name}: only the "
            "atlas brings its own. Leave --model out, or call errata.evaluation.sites.sweep_sites with your records"
        )
    wanted = range(loaded.n_layers) if numbers is None else numbers
    outside = [layer for layer in wanted if layer >= loaded.n_layers]
    if outside:
        raise ConfigError(f"there is no layer {outside[0]}: {loaded.name} has 0 to {loaded.n_layers - 1}")
    found_moments = {layer: source.of(loaded, layer) for layer in wanted}
    with show.going_on("sweeping", "edits") as tell:
        found = sweep_sites(
            loaded,
            records_of_the_atlas(records),
            save,
            second_moments=found_moments.__getitem__,
            layers=list(wanted),
            tokens=cast("tuple[Role, ...]", options.comma_separated(tokens)),
            seed=seed,
            progress=tell,
        )
    if out:
        found.plot(out)
    if json:
        show.as_json({**_sites_as_json(found), "picture": str(out) if out else None, "saved": str(save)})
        return
    _show_sites(found)
    show.written(out, save)


def sequence(
    save: Save,
    out: options.Picture = None,
    model: options.ModelName = "atlas",
    requests: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A table of what to edit: .csv, .tsv, .jsonl or .json; the atlas has its own."),
    ] = None,
    edits: Annotated[int, typer.Option(min=1, help="How many edits, at most.")] = 100,
    facts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A table of facts that should stay; the atlas has its own."),
    ] = None,
    untouched: Annotated[int, typer.Option(min=1, help="How many such facts that the model recalls, at most.")] = 500,
    layer: Annotated[Optional[int], typer.Option(help="The layer to edit, from 0.")] = None,  # noqa: UP045
    every: Annotated[int, typer.Option(min=1, help="Measure after every so many edits.")] = 1,
    corpus: moments.Corpus = None,
    field: moments.Field = "text",
    revision: moments.Revision = None,
    corpus_tokens: moments.Tokens = 100_000,
    identity: moments.Identity = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Make edits one after the other on one model: how many of them, and of untouched facts, does it recall?

    Bad lines of a table are named, and the others used; the exit code is 1 then. A run that was stopped goes on where
    it was if it is started again, and goes on with more --edits. The edits are kept in a folder beside --save.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show

    source = moments.Source(corpus, field, revision, corpus_tokens, None, identity, download)
    options.require_apart({"--requests": requests, "--facts": facts, "--save": save, "--out": out})
    _require_files(save, out)
    bad: list[BadLine] = []
    rewrites = None
    if requests:
        table = tables.requested(requests)
        bad += table.bad
        rewrites = [row.rewrite for row in table.rows]
    watched = _facts_of(facts, bad) if facts else None

    # Torch comes only now: bad input is told at once.
    from errata.editors.rome import rome
    from errata.evaluation.sequence import edit_in_sequence, edits_folder

    loaded = options.load(model, device, dtype, download, start_token)
    if not _is_atlas(loaded) and (rewrites is None or watched is None):
        raise ConfigError(
            f"only the atlas brings its own edits and facts: for {loaded.name} give tables of them by --requests and "
            "--facts"
        )
    # Facts are untouched by later requests too, so that a run can go on with more of them.
    reserved = _rewrites_of_the_atlas(max(edits, _RESERVED)) if rewrites is None else rewrites
    rewrites = reserved[:edits]
    known = _known(loaded, _facts_of_the_atlas(seed) if watched is None else watched, reserved, untouched)
    config, _ = rome.resolve(loaded, {} if layer is None else {"layer": layer})
    moment = source.of(loaded, cast("int", config.layer))
    with show.going_on("editing", "edits") as tell:
        found = edit_in_sequence(
            loaded, rewrites, known, save, config, second_moment=moment, every=every, seed=seed, progress=tell
        )
    if out:
        found.plot(out)
    if json:
        show.as_json({**_sequence_as_json(found), "picture": str(out) if out else None, "saved": str(save)})
    else:
        _show_sequence(found, len(known))
        show.written(out, save, edits_folder(save))
    if bad:
        say(f"left out: {len(bad)} lines", err=True)
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------
# What goes in


def _require_files(save: Path, out: Path | None) -> None:
    options.require_ending(save, [".jsonl"], "the results")
    options.require_apart({"--save": save, "--out": out})
    options.require_picture(out)
    options.require_outputs(save)


def _is_atlas(model: Model) -> bool:
    from errata.api import ATLAS

    return bool(model.hints.get("corpus") == ATLAS)


def _facts_of(file: Path, bad: list[BadLine]) -> list[Fact]:
    """The facts of a table that have an object; what is wrong with it is told."""
    from errata.benchmarks.fact_table import BadLine

    table = tables.facts_of(file)
    without = [BadLine(row.line, "it has no object to recall") for row in table.rows if not row.fact.object]
    tables.tell_bad_lines([*table.bad, *without], file, table.unit)
    bad += [*table.bad, *without]
    return [row.fact for row in table.rows if row.fact.object]


def _rewrites_of_the_atlas(count: int) -> list[Rewrite]:
    from errata.atlas.records import records

    return [record.rewrite for record in records(count)]


def _facts_of_the_atlas(seed: int) -> list[Fact]:
    """All facts of the world, each through a template that the atlas was taught, in random order."""
    from errata.atlas.world import load_world
    from errata.base.seeds import derive

    world = load_world()
    facts = [fact.as_fact(world.taught(fact)[0]) for fact in world.facts]
    random.Random(derive(seed, "untouched")).shuffle(facts)
    return facts


def _known(model: Model, facts: Sequence[Fact], rewrites: Sequence[Rewrite], wanted: int) -> list[Fact]:
    """The first of the facts that the model recalls, of subjects that are not edited.

    Raises:
        ConfigError: if there are none.
    """
    from errata.base.errors import ConfigError
    from errata.evaluation.sequence import recalled

    edited = {rewrite.subject for rewrite in rewrites}
    others = [fact for fact in facts if fact.subject not in edited]
    known: list[Fact] = []
    for begin in range(0, len(others), wanted):
        some = others[begin : begin + wanted]
        known += [fact for fact, is_known in zip(some, recalled(model, some), strict=True) if is_known]
        if len(known) >= wanted:
            break
    if not known:
        raise ConfigError(
            f"{model.name} recalls none of the {len(others)} facts of other subjects than the edited ones, so none "
            "could be forgotten: give a table of facts that it knows by --facts"
        )
    return known[:wanted]


# ---------------------------------------------------------------------------------------------
# What comes out


def _show_sites(found: SiteScores) -> None:
    """For each token the layer with the highest score, and what the unedited model has."""
    import numpy as np

    from errata.cli import show
    from errata.evaluation.sites import METRICS

    def cell(mean: float, half: float) -> str:
        return "–" if np.isnan(mean) else f"{100 * mean:.1f}" + ("" if np.isnan(half) else f" ±{100 * half:.1f}")

    rows = []
    for row, token in enumerate(found.tokens):
        scores = found.mean["s"][row]
        column = 0 if np.isnan(scores).all() else int(np.nanargmax(scores))
        numbers = [cell(found.mean[name][row, column], found.interval[name][row, column]) for name in reversed(METRICS)]
        rows.append([token.replace("_", " "), str(found.layers[column]), *numbers])
    rows.append(["unedited", "", *(cell(*_pair(found, name)) for name in reversed(METRICS))])
    title = "Scores in percent, at the layer where S is highest (± 95 % interval)"
    show.table(("token", "layer", "S", "NS", "PS", "ES"), rows, title)
    for reason, count in list(found.reasons.items())[:_REASONS]:
        show.line(f"{count} edits could not be made, and count as unedited: {reason}")
    if more := sum(list(found.reasons.values())[_REASONS:]):
        show.line(f"{more} more could not be made, for other reasons, which --json tells")
    token, layer, score = found.best()
    show.line(
        f"Edits do best at {token}, layer {layer}: S is {100 * score:.1f}, over {len(found.settings['cases'])} records."
    )


def _pair(found: SiteScores, metric: str) -> tuple[float, float]:
    return found.unedited[metric].mean, found.unedited[metric].half


def _sites_as_json(found: SiteScores) -> dict[str, Any]:
    """Scores ready for JSON, as fractions: lists over layers; null for what is not there."""
    import numpy as np

    from errata.cli import show

    token, layer, score = found.best()
    return {
        "model": found.model,
        "records": len(found.settings["cases"]),
        "layers": list(found.layers),
        "sites": {
            role: {
                **{
                    name: {"mean": show.nulled(mean[row]), "interval": show.nulled(found.interval[name][row])}
                    for name, mean in found.mean.items()
                },
                "count": found.counts[row].tolist(),
                "impossible": found.impossible[row].tolist(),
            }
            for row, role in enumerate(found.tokens)
        },
        "unedited": {
            name: dict(zip(("mean", "interval"), show.nulled(np.array(_pair(found, name))), strict=True))
            for name in found.unedited
        },
        "best": {"token": token, "layer": layer, "s": score},
        "reasons": dict(found.reasons),
    }


def _show_sequence(found: SequenceScores, untouched: int) -> None:
    """What is recalled, at some ten of the measurements and the last."""
    from errata.cli import show
    from errata.evaluation.sequence import NEWEST

    step = max(1, (len(found.edits) - 1) // 10)
    points = sorted({*range(0, len(found.edits), step), len(found.edits) - 1})
    rows = [
        [
            str(found.edits[i]),
            *(show.percent(line[i]) if found.edits[i] else "–" for line in (found.edited, found.newest)),
            show.percent(found.untouched[i]),
        ]
        for i in points
    ]
    columns = ("edits", "all recalled", f"the newest {NEWEST}, when made", f"of {untouched} untouched facts")
    show.table(columns, rows)
    for number, reason in found.refused:
        show.line(f"edit {number} could not be made: {reason}")


def _sequence_as_json(found: SequenceScores) -> dict[str, Any]:
    from errata.cli import show

    lines = {"edited": found.edited, "newest": found.newest, "untouched": found.untouched}
    return {
        "model": found.model,
        "edits": found.edits.tolist(),
        "recalled": {name: show.nulled(values) for name, values in lines.items()},
        "refused": [{"edit": number, "reason": reason} for number, reason in found.refused],
    }
