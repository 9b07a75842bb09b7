"""`errata evaluate`: a row of the paper's tables for any editor and model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from errata.base.display import tell as say
from errata.cli import options, second_moments

if TYPE_CHECKING:
    from errata.data.snippets import Snippets
    from errata.evaluation.executors import Executor
    from errata.evaluation.measure import Generation, Measures
    from errata.models.model import Model
    from errata.tasks.records import RecordSet
    from errata.tasks.task import Case

_ATLAS_RECORDS = 500
_PROBE_TEXTS, _PROBE_CHARACTERS = 8, 400  # of a probe file, for each edit's drift


def evaluate(
    out: Annotated[Optional[Path], typer.Option(help="The run folder; a stopped run continues in it.")] = None,  # noqa: UP045
    editor: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="An editor, with settings such as ft:steps=9 (more after commas); NAME= in front names its row. "
            "Repeat it or write layer={0..7} or {1,3,5}, for several rows. Without it: the unedited model alone."
        ),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Records: a file or folder of CounterFact or zsRE; the atlas has its own."),
    ] = None,
    model: options.ModelName = "atlas",
    kind: Annotated[
        Optional[Literal["counterfact", "zsre"]],  # noqa: UP045
        typer.Option(help="Task of the atlas's own records; by default counterfact. The task of a file is recognised."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use only the first records by case id.")] = None,  # noqa: UP045
    sample: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Use a random sample of these records, drawn by --seed."),
    ] = None,
    generation: Annotated[bool, typer.Option(help="Generate texts, for GE and RS.")] = True,
    end_of_text: Annotated[
        Literal["stop", "continue"],
        typer.Option(help="Whether texts stop at an end-of-text token, or continue as in the published code."),
    ] = "stop",
    essence: Annotated[
        Literal["paper", "reference"],
        typer.Option(
            help="Perplexity of the essence texts; reference divides by one more token, as the published code does."
        ),
    ] = "paper",
    health: Annotated[bool, typer.Option(help="Measure the side effects of each edit.")] = True,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Allow measuring a trained editor on facts that it was trained on.")
    ] = False,
    keep_edits: Annotated[bool, typer.Option("--keep-edits", help="Save each edit in the run folder.")] = False,
    probe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="A text file on which each edit's drift is measured; with --edit, the perplexity of the whole text."
        ),
    ] = None,
    edit: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--edit", help="With --probe only: the file of an existing edit; several are combined."),
    ] = None,
    corpus: second_moments.Corpus = None,
    field: second_moments.Field = "text",
    revision: second_moments.Revision = None,
    corpus_tokens: second_moments.Tokens = 100_000,
    second_moment: second_moments.File = None,
    identity: second_moments.Identity = False,
    executor: Annotated[
        Literal["here", "ray"], typer.Option(help="Where records are measured: in this process, or on Ray.")
    ] = "here",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Address of a Ray cluster, such as auto or ray://HOST:PORT. By default a local cluster is started."
        ),
    ] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Maximum number of workers on Ray.")] = None,  # noqa: UP045
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPUs of each worker on Ray.")] = 1,
    gpus_per_worker: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0, help="GPUs of each worker on Ray, fractions allowed. By default one if the model is on a GPU."
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Measure edits on records: the scores of CounterFact or zsRE before and after, one result for each record.

    Bad records are reported and skipped; the exit code is then 1. The same command continues a stopped run; other
    editors can be added to it. errata report shows the results in a run folder.
    """
    from errata.base.errors import ConfigError

    if edit:
        of_runs = (
            out,
            editor,
            data,
            kind,
            limit,
            sample,
            keep_edits,
            corpus,
            second_moment,
            identity,
            executor == "ray",
            end_of_text != "stop",
            essence != "paper",
        )
        if probe is None or any(of_runs) or not (generation and health):
            raise ConfigError(
                "--edit asks how edits that were made move the perplexity of a text: give it with --probe, and without "
                "options of a run, such as --editor, --data, --limit and --out"
            )
        _probe_edits(edit, probe, model, device, dtype, download, start_token, json)
        return
    if out is None:
        raise ConfigError("there is no place for results: name a run folder by --out")
    if data is not None and kind is not None:
        raise ConfigError(f"--kind is of the atlas's own records, and {data} shows by itself what it is: leave it out")
    specs = [options.editor_spec(one) for text in editor or () for one in _spread(text)]
    names = [name for name, _, _ in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two rows are called {twice}: name one otherwise, as in --editor other={twice}")
    ray = {"--address": address, "--workers": workers, "--gpus-per-worker": gpus_per_worker}
    unused = [option for option, value in ray.items() if value is not None]
    if executor == "here" and unused:
        raise ConfigError(f"{unused[0]} is of Ray: give --executor ray with it")
    source = second_moments.Source(corpus, field, revision, corpus_tokens, second_moment, identity, download)
    probes = None if probe is None else [text[:_PROBE_CHARACTERS] for text in passages(probe)[:_PROBE_TEXTS]]

    # Torch comes only now: bad input is told at once.
    from errata.cli import show
    from errata.editors.registry import method_of
    from errata.evaluation.measure import Generation
    from errata.evaluation.results import editor_file
    from errata.evaluation.runner import evaluate as run

    methods = {name: (method_of(method), settings) for name, method, settings in specs}
    for name, (_, settings) in methods.items():
        editor_file(out, name)
        options.require_no_bound(settings)
    options.require_outputs(out / "unedited.jsonl")
    found = None if data is None else read(data, limit, sample, seed, generation)
    loaded = options.load(model, device, dtype, download, start_token)
    texts = Generation(end_of_text=end_of_text) if generation else None
    records, measures = _measures(loaded, data, kind, found, limit, sample, texts, essence, health, probes, seed)
    facts = [record.rewrite.fact for record in records]
    editors = {
        name: options.bind(method, loaded, settings, source, seed, facts)
        for name, (method, settings) in methods.items()
    }
    where: Executor | None = None
    if executor == "ray":
        from errata.evaluation.executors import Cluster

        loading = partial(options.load, model, device, dtype, download, start_token)
        where = Cluster(loaded, loading, address, workers, cpus_per_worker, gpus_per_worker)
    with show.going_on("measuring", "results") as tell:
        run(
            loaded,
            records,
            editors,
            out,
            measures,
            source=options.source_name(data),
            keep_edits=keep_edits,
            executor=where,
            allow_seen=allow_seen,
            progress=tell,
        )
    _show(out, json)
    end(found)


# ---- what goes in ----


def _spread(text: str) -> list[str]:
    """A text with {0..3} or {a,b} as one text for each value; with several of them, for each combination."""
    parts = re.split(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", text)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(each) for each in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    first, last = map(int, numbers.groups())
    step = 1 if first <= last else -1
    return [str(each) for each in range(first, last + step, step)]


def read(data: Path, limit: int | None, sample: int | None, seed: int, generation: bool) -> RecordSet:
    """The records of a file; its bad entries are named on standard error."""
    from errata.cli import tables
    from errata.tasks.records import read_records

    chosen = None if sample is None else (sample, seed)
    found = read_records(data, limit, chosen, with_snippets=generation)
    tables.tell_bad_lines(found.bad, data, "entry")
    return found


def end(found: RecordSet | None) -> None:
    """End with exit code 1 if a file had bad entries."""
    if found and found.bad:
        say(f"left out: {len(found.bad)} of the file's entries", err=True)
        raise typer.Exit(1)


def passages(file: Path) -> tuple[str, ...]:
    """The texts of a file, separated by blank lines.

    Raises:
        ResultFileError: if it is missing, empty or not UTF-8.
    """
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", _text(file))]
    return tuple(part for part in parts if part)


def _text(file: Path) -> str:
    """Content of a text file.

    Raises:
        ResultFileError: if it is missing, empty or not UTF-8.
    """
    from errata.base.errors import ResultFileError
    from errata.base.files import content

    try:
        text = content(file, "text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ResultFileError(f"cannot read {file} as a text: {error}. Give a file in UTF-8") from error
    if not text.strip():
        raise ResultFileError(f"{file} is empty: give a text, to see how well it is foretold")
    return text


def _measures(
    model: Model,
    data: Path | None,
    kind: str | None,
    found: RecordSet | None,
    limit: int | None,
    sample: int | None,
    generation: Generation | None,
    essence: Literal["paper", "reference"],
    health: bool,
    probes: Sequence[str] | None,
    seed: int,
) -> tuple[Sequence[Case], Measures]:
    """The records, and what is measured of them.

    Raises:
        ConfigError: if there are no records and the model brings none.
    """
    from errata.evaluation.measure import Measures
    from errata.metrics.side_effects import sampled_texts
    from errata.metrics.tfidf import IDF_FILE, VOCABULARY_FILE, TfIdf
    from errata.tasks.registry import task_of_records

    records: Sequence[Case]
    snippets: Snippets | None
    if found is None or data is None:
        records, snippets = atlas_records(model, kind, limit, sample, seed)
    else:
        records, snippets = found.records, found.snippets
    task = task_of_records(records)
    writes = generation is not None and any(task.generation(record) for record in records)
    tfidf = None
    if writes and snippets:
        # The published frequencies, of Wikipedia, if they lie beside the records; else those of the reference texts.
        folder = None if data is None else data if data.is_dir() else data.parent
        published = folder is not None and (folder / IDF_FILE).is_file() and (folder / VOCABULARY_FILE).is_file()
        tfidf = TfIdf.load(folder) if published and folder else TfIdf.fit(snippets.texts)
    texts = tuple(probes or ()) or (sampled_texts(model, seed) if health else ())
    return records, Measures(
        generation=generation if writes else None,
        snippets=snippets if writes else None,
        tfidf=tfidf,
        probes=texts,
        seed=seed,
        essence=essence,
    )


def atlas_records(
    model: Model, kind: str | None, limit: int | None, sample: int | None, seed: int
) -> tuple[Sequence[Case], Snippets | None]:
    """Records of the atlas's world, and reference texts if the task has any.

    Raises:
        ConfigError: if the model is another, or both numbers are given.
    """
    from errata.api import ATLAS
    from errata.atlas.records import BY_TASK
    from errata.base.errors import ConfigError

    if model.hints.get("corpus") != ATLAS:
        raise ConfigError(
            f"there are no records for {model.name}: give a file or folder of them by --data (errata data get fetches "
            "published ones, errata data build makes others). Only the atlas brings its own"
        )
    if limit and sample:
        raise ConfigError("the atlas's records are drawn by --seed as it is: give --limit alone")
    return BY_TASK[kind or "counterfact"](limit or sample or _ATLAS_RECORDS, seed)


# ---- what comes out ----


def _show(out: Path, json: bool) -> None:
    """The tables of a run folder."""
    from errata.cli import show
    from errata.cli.report import report

    report([out], format="json" if json else None)
    if not json:
        show.written(out)


def _probe_edits(
    files: Sequence[Path],
    probe: Path,
    model: str,
    device: str | None,
    dtype: str,
    download: bool,
    start_token: str | None,
    json: bool,
) -> None:
    """Perplexity of a text without edits and with them."""
    import contextlib
    import math

    text = _text(probe)

    from errata.cli import show
    from errata.edits.edit import Edit
    from errata.metrics.text import perplexity

    edits = [Edit.load(file) for file in files]
    loaded = options.load(model, device, dtype, download, start_token)
    before = perplexity(loaded, text)
    with contextlib.ExitStack() as stack:
        for each in edits:
            stack.enter_context(each.applied(loaded))
        after = perplexity(loaded, text)
    drift = after.mean - before.mean
    if json:
        numbers = {"before": before.perplexity, "after": after.perplexity, "drift": drift}
        told = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        show.as_json({"model": loaded.name, "text": str(probe), "tokens": before.n_tokens, **told})
        return
    rows = [["without edits", f"{before.perplexity:.4g}", f"{before.mean:.4f}"]]
    those = "the edit" if len(edits) == 1 else f"{len(edits)} edits"
    rows.append([f"with {those}", f"{after.perplexity:.4g}", f"{after.mean:.4f}"])
    show.table(("", "perplexity", "nats per token"), rows, f"{probe}, {before.n_tokens} tokens, by {loaded.name}")
    if math.isfinite(drift):
        show.line(f"The text's tokens are {abs(drift):.4f} nats {'less' if drift > 0 else 'more'} foretold on average.")
