"""`errata trace`: where a model stores a fact, or the facts of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from errata.base.display import tell
from errata.cli import options, tables

if TYPE_CHECKING:
    from errata.base.facts import Fact
    from errata.data.fact_table import BadLine, FactRow
    from errata.models.model import Model
    from errata.tracing.config import TraceConfig
    from errata.tracing.many import TracedFacts


def trace(
    subject: Annotated[Optional[str], typer.Option(help="What the fact is about.")] = None,  # noqa: UP045
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A sentence up to its object, with {} for the subject."),
    ] = None,
    object_: options.Object = "",
    separator: options.Separator = None,
    facts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A table of facts instead of one fact: .csv, .tsv, .jsonl or .json. Needs --save."),
    ] = None,
    model: options.ModelName = "atlas",
    out: options.Picture = None,
    save: Annotated[Optional[Path], typer.Option(help="File for the traces, .jsonl.")] = None,  # noqa: UP045
    parts: Annotated[
        str,
        typer.Option(help="Maps to make, separated by commas: state, mlp, attention, severed_mlp, severed_attention."),
    ] = "state,mlp,attention",
    samples: options.Samples = 10,
    noise: options.Noise = "s3",
    window: options.Window = None,
    window_edges: options.WindowEdges = "paper",
    severed_noise: options.SeveredNoise = "paper",
    answer: options.Answer = "model",
    scored: Annotated[
        Literal["first", "whole"], typer.Option(help="The answer's first token, or the whole of --answer object.")
    ] = "first",
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Roles of the tokens to restore, separated by commas: subject_first, subject_middle, subject_last, "
            "after_subject, further, last; by default all."
        ),
    ] = None,
    memory: options.Memory = None,
    averaging: options.Averaging = "facts",
    min_effect: options.MinEffect = None,
    unknown: options.Unknown = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line of the table.")] = False,
    seed: options.Seed = 1,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Trace facts causally: which states, MLPs and attentions restore the answer when the subject is corrupted?

    Give one fact by --subject and --prompt, or a table by --facts. For a table, each trace is written to --save as soon
    as it is computed, and the averages are shown. Bad lines are reported and skipped; the exit code is then 1. The same
    command continues a stopped run.
    """
    from errata.base.errors import ConfigError, FactError
    from errata.base.facts import Fact

    budget = options.memory_bytes(memory)
    settings: dict[str, Any] = {
        "parts": options.comma_separated(parts),
        "samples": samples,
        "noise": noise,
        "window": window,
        "window_edges": window_edges,
        "severed_noise": severed_noise,
        "answer": answer,
        "scored": scored,
        "tokens": options.comma_separated(tokens) if tokens is not None else None,
        "seed": seed,
    }
    if save:
        options.require_ending(save, [".jsonl"], "traces")
    options.require_apart({"--facts": facts, "--save": save, "--out": out})
    if facts is None:
        if subject is None or prompt is None:
            raise ConfigError("there is no fact to trace: give --subject and --prompt, or a table of facts by --facts")
        if strict or unknown or min_effect is not None or averaging != "facts":
            raise ConfigError(
                "--strict, --averaging, --min-effect and --unknown are about a table of facts: give one by --facts"
            )
        fact = Fact(subject, prompt, object_, separator)
        if answer == "object" and not fact.object:
            raise FactError("--answer object asks for the probability of the fact's object: name it by --object")
        _trace_one(fact, settings, model, out, save, budget, device, dtype, download, start_token, json)
    else:
        if subject is not None or prompt is not None or object_ or separator is not None:
            raise ConfigError("facts are given twice: by --facts, or one by --subject, --prompt and --object")
        if save is None:
            raise ConfigError("--facts needs a file in which each trace is kept once it is made: give --save, .jsonl")
        options.require_share(min_effect)
        _trace_table(
            facts,
            settings,
            model,
            out,
            save,
            budget,
            averaging,
            min_effect,
            unknown,
            strict,
            device,
            dtype,
            download,
            start_token,
            json,
        )


def _trace_one(
    fact: Fact,
    settings: dict[str, Any],
    model: str,
    out: Path | None,
    save: Path | None,
    memory: int | None,
    device: str | None,
    dtype: str,
    download: bool,
    start_token: str | None,
    json: bool,
) -> None:
    from errata.cli import show
    from errata.tracing.config import TraceConfig

    options.require_picture(out)
    options.require_outputs(save)
    _require_no_run(save)
    config = TraceConfig(**settings)

    # Torch comes only now: bad input is told at once.
    from errata.tracing.trace import trace as trace_fact

    loaded = options.load(model, device, dtype, download, start_token)
    with show.progress("tracing", "sites") as bar:
        found = trace_fact(loaded, fact, config, memory=memory, progress=bar)
    if out:
        found.plot(out)
    if save:
        found.save(save)
    if json:
        show.as_json(
            {
                "model": found.model,
                "subject": fact.subject,
                "prompt": fact.prompt,
                "object": fact.object,
                "separator": fact.separator,
                "answer": found.answer,
                "known": found.known,
                "clean": found.clean,
                "corrupted": found.corrupted,
                "tokens": list(found.tokens),
                "subject_tokens": list(found.subject),
                "restored": {part: show.nulled(values) for part, values in found.restored.items()},
                "settings": dict(found.settings),
                "picture": str(out) if out else None,
                "saved": str(save) if save else None,
            }
        )
        return
    show.effects(found)
    show.line(show.trace_summary(found))
    show.written(out, save)


def _require_no_run(save: Path | None) -> None:
    """Keep one trace from taking the place of many.

    Raises:
        OutputError: if the file holds several traces.
    """
    import contextlib

    from errata.base.errors import OutputError, ResultFileError
    from errata.tracing.result import load_traces

    if save and save.is_file():
        with contextlib.suppress(ResultFileError):
            if (count := len(load_traces(save))) > 1:
                raise OutputError(f"{save} holds {count} traces, which one would replace: name another file")


def _trace_table(
    file: Path,
    settings: dict[str, Any],
    model: str,
    out: Path | None,
    save: Path,
    memory: int | None,
    averaging: Literal["facts", "reference"],
    min_effect: float | None,
    unknown: bool,
    strict: bool,
    device: str | None,
    dtype: str,
    download: bool,
    start_token: str | None,
    json: bool,
) -> None:
    from errata.base.errors import ConfigError, FactError
    from errata.cli import show
    from errata.data.fact_table import BadLine
    from errata.tracing.config import TraceConfig

    table = tables.facts_of(file)
    options.require_picture(out)
    options.require_outputs(save)
    config = TraceConfig(**settings)
    tables.tell_bad_lines(table.bad, file, table.unit, strict)
    loaded = options.load(model, device, dtype, download, start_token)
    refused = _refused(loaded, table.rows, config)
    tables.tell_bad_lines(refused, file, table.unit, strict)
    if len(refused) == len(table.rows):
        raise FactError(f"no fact of {file} can be traced: mend its lines, or give another table")
    run = _trace_all(loaded, table.rows, save, config, memory)
    traces, told = run.traces, {each.line for each in refused}
    late = [BadLine(table.rows[index].line, reason) for index, reason in run.refused]
    late = [each for each in late if each.line not in told]
    tables.tell_bad_lines(late, file, table.unit, strict)
    try:
        found = options.averaged(traces, averaging, min_effect, unknown)
    except ConfigError as error:  # the traces are kept all the same
        found = None
        tell(f"no averages: {error}", err=True)
    if out and found:
        found.plot(out)
    bad = [*table.bad, *refused, *late]
    if json:
        show.as_json(
            {
                "file": str(file),
                "model": loaded.name,
                "traced": len(traces),
                "bad": [{table.unit: each.line, "reason": each.reason} for each in bad],
                "averages": show.averages_as_json(found) if found else None,
                "picture": str(out) if out and found else None,
                "saved": str(save),
            }
        )
    else:
        if found:
            show.averages(found)
            show.line(show.averages_summary(found))
        show.written(out if found else None, save)
    if bad:
        tell(f"left out: {len(bad)} of {len(table.rows) + len(table.bad)}", err=True)
    if bad or not found:
        raise typer.Exit(1)


def _refused(model: Model, rows: Sequence[FactRow], config: TraceConfig) -> list[BadLine]:
    """The facts that this model cannot be asked for with these settings, and why."""
    from errata.base.errors import FactError
    from errata.data.fact_table import BadLine
    from errata.tracing.tokenized import tokenize_fact

    refused = []
    for row in rows:
        try:
            tokenize_fact(model, row.fact, config)
        except FactError as error:
            refused.append(BadLine(row.line, str(error)))
    return refused


def _trace_all(
    model: Model, rows: Sequence[FactRow], save: Path, config: TraceConfig, memory: int | None
) -> TracedFacts:
    """Trace facts into a file, or the rest of them.

    Raises:
        typer.Exit: with 130, after Ctrl-C.
    """
    from errata.cli import show
    from errata.tracing.many import trace_facts

    with show.going_on("tracing", "facts") as tell:
        facts = [row.fact for row in rows]
        return trace_facts(model, facts, save, config, memory=memory, progress=tell)
