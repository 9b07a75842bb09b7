"""`errata sweep` and `errata sequence`: edits over many records."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from errata.base.display import tell as say
from errata.cli import options, second_moments, tables

if TYPE_CHECKING:
    from errata.base.facts import Fact, Rewrite
    from errata.data.fact_table import BadLine
    from errata.evaluation.sequence import SequenceScores
    from errata.evaluation.setting_scores import SettingScores
    from errata.metrics.summary import Estimate
    from errata.models.model import Model
    from errata.models.tokens import Role

Save = Annotated[
    Path, typer.Option(help="File for the results, .jsonl, written during the run; a stopped run continues.")
]

_RESERVED = 100  # records of the atlas whose subjects are never among the untouched facts


def sweep(
    out: Annotated[Path, typer.Option(help="The run folder; a sweep that was stopped continues in it.")],
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Picture of the scores by layer: .png, .svg or .pdf."),
    ] = None,
    model: options.ModelName = "atlas",
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Records (.json, .jsonl, or their folder); the atlas has its own."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The first records only.")] = None,  # noqa: UP045
    editor: Annotated[str, typer.Option(help="The editor, such as rome or rome:steps=10.")] = "rome",
    layers: Annotated[Optional[str], typer.Option(help="Layers, such as 0-7 or 2,4,6; by default all.")] = None,  # noqa: UP045
    tokens: Annotated[
        str,
        typer.Option(
            help="Token roles at which the key is read, separated by commas; by default subject_first, subject_last, "
            "after_subject and last.",
            show_default=False,
        ),
    ] = "subject_first,subject_last,after_subject,last",
    corpus: second_moments.Corpus = None,
    field: second_moments.Field = "text",
    revision: second_moments.Revision = None,
    corpus_tokens: second_moments.Tokens = 100_000,
    identity: second_moments.Identity = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Edit records at every layer and token role and score the edits, like Figure 5 of the paper.

    The result is a run folder, one row for each layer and role: errata report and errata figure settings read it.
    """
    from errata.cli import show
    from errata.cli.evaluate import atlas_records, end, read

    source = second_moments.Source(corpus, field, revision, corpus_tokens, None, identity, download)
    numbers = None if layers is None else options.layer_numbers(layers)
    _, method, settings = options.editor_spec(editor)
    options.require_apart({"--out": out, "--picture": picture})
    options.require_picture(picture)
    options.require_outputs(out / "unedited.jsonl")
    data_read = None if data is None else read(data, limit, None, seed, False)

    # Torch comes only now: bad input is told at once.
    from errata.editors.registry import method_of
    from errata.evaluation.setting_scores import SettingScores
    from errata.evaluation.sweep import sweep as run

    options.require_no_bound(settings)

    loaded = options.load(model, device, dtype, download, start_token)
    records = data_read.records if data_read else atlas_records(loaded, None, limit, None, seed)[0]
    with show.going_on("sweeping", "results") as tell:
        found = run(
            loaded,
            records,
            out,
            method,
            layers=numbers,
            tokens=cast("tuple[Role, ...]", options.comma_separated(tokens)),
            second_moment=source.for_method(method_of(method), loaded),
            seed=seed,
            settings=settings,
            progress=tell,
            source=options.source_name(data),
        )
    scores = SettingScores.of(found, "layer")
    if picture:
        scores.plot(picture)
    if json:
        show.as_json({**scores.as_dict(), "picture": str(picture) if picture else None, "saved": str(out)})
    else:
        _show_scores(scores)
        show.written(picture, out)
    end(data_read)


def sequence(
    save: Save,
    out: options.Picture = None,
    model: options.ModelName = "atlas",
    requests: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A table of requests: .csv, .tsv, .jsonl or .json; the atlas has its own."),
    ] = None,
    edits: Annotated[int, typer.Option(min=1, help="Maximum number of edits.")] = 100,
    facts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A table of facts that should not change; the atlas has its own."),
    ] = None,
    untouched: Annotated[
        int, typer.Option(min=1, help="Maximum number of these facts; only those that the model recalls are used.")
    ] = 500,
    layer: Annotated[Optional[int], typer.Option(help="The layer to edit, from 0.")] = None,  # noqa: UP045
    every: Annotated[int, typer.Option(min=1, help="Number of edits between measurements.")] = 1,
    corpus: second_moments.Corpus = None,
    field: second_moments.Field = "text",
    revision: second_moments.Revision = None,
    corpus_tokens: second_moments.Tokens = 100_000,
    identity: second_moments.Identity = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Make edits one after the other on one model, and measure how many edited and untouched facts it recalls.

    Bad lines of a table are reported and skipped; the exit code is then 1. The same command continues a stopped run,
    and a larger --edits extends a finished one. The edits are stored in a folder beside --save.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show

    source = second_moments.Source(corpus, field, revision, corpus_tokens, None, identity, download)
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
    if loaded.own_corpus is None and (rewrites is None or watched is None):
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


def _facts_of(file: Path, bad: list[BadLine]) -> list[Fact]:
    """The facts of a table that have an object; bad lines are reported."""
    from errata.data.fact_table import BadLine

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


def _show_scores(found: SettingScores) -> None:
    """For each line the layer with the highest S, and the unedited model."""
    from errata.cli import show

    def cell(one: Estimate | None) -> str:
        if one is None or not math.isfinite(one.mean):
            return "–"
        return f"{100 * one.mean:.1f}" + (f" ±{100 * one.half:.1f}" if math.isfinite(one.half) else "")

    metrics = tuple(reversed(found.metrics))
    rows = []
    for line in found.lines:
        best = found.best(line)
        numbers = [cell(found.scores[name].get((line, best))) for name in metrics]
        rows.append([line, f"{best:g}", *numbers])
    rows.append(["unedited", "", *(cell(found.unedited[name]) for name in metrics)])
    title = f"Scores in percent, at the {found.along} where {found.metrics[-1].upper()} is highest (± 95 % interval)"
    show.table(("editor", found.along, *(name.upper() for name in metrics)), rows, title)


def _show_sequence(found: SequenceScores, untouched: int) -> None:
    """Recall at about ten of the measurements and the last one."""
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
