"""`errata facts`: check a table of facts, convert it, and select the facts that a model knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from errata.base.display import tell
from errata.cli import options, tables

if TYPE_CHECKING:
    from errata.data.fact_table import FactRow
    from errata.metrics.knowledge import Knowledge
    from errata.models.model import Model

KIND = "continuations"
VERSION = 1


def facts(
    file: Annotated[Path, typer.Argument(help="A table of facts: .csv, .tsv, .jsonl or .json.")],
    known: Annotated[
        bool, typer.Option("--known", help="Keep only the facts whose object the model names before other answers.")
    ] = False,
    model: options.ModelName = "atlas",
    out: Annotated[Optional[Path], typer.Option(help="File for the table: .csv, .tsv or .jsonl.")] = None,  # noqa: UP045
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")] = False,
    all_answers: Annotated[
        bool,
        typer.Option("--all-answers", help="Let all objects compete, not only those of the same relation or prompt."),
    ] = False,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Ignore letter case in answers.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the model's continuation, in tokens.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of facts in a batch.")] = 32,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Check a table of facts (subject, prompt, object, relation), convert it, and select the facts that a model knows.

    Bad lines are reported and skipped; the exit code is then 1. The same command continues a stopped run with --known.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show
    from errata.data.fact_table import BadLine, require_table_ending, write_facts

    if known and not out:
        raise ConfigError("--known needs a place for the facts that it keeps: give --out, .csv, .tsv or .jsonl")
    if out:
        require_table_ending(out)
        if os.path.realpath(out) == os.path.realpath(file):
            raise ConfigError(f"--out is {file} itself, which it would replace: name another file")
    table = tables.facts_of(file)
    options.require_outputs(out)
    bad = [*table.bad]
    if known:
        bad += [BadLine(row.line, "it has no object to know") for row in table.rows if not row.fact.object]
    tables.tell_bad_lines(bad, file, table.unit, strict)
    kept: Sequence[FactRow] = table.rows
    unknown: list[Knowledge] = []
    result: dict[str, object] = {"file": str(file), "facts": len(kept)}
    summary = f"{len(kept)} facts in {file}"
    if known and out:
        # Torch comes only now: bad input is told at once.
        from errata.metrics.knowledge import judge, refusal

        loaded = options.load(model, device, dtype, download, start_token)
        refused = [BadLine(r.line, reason) for r in kept if r.fact.object and (reason := refusal(loaded, r.fact.text))]
        tables.tell_bad_lines(refused, file, table.unit, strict)
        bad += refused
        unusable = {each.line for each in bad}
        rows = [row for row in kept if row.line not in unusable]
        progress = out.with_name(f"{out.name}.progress.jsonl")
        said = ask(loaded, rows, progress, table.digest, max_new_tokens, batch_size)
        verdicts = judge(rows, said, all_answers=all_answers, ignore_case=ignore_case)
        kept = [each.row for each in verdicts if each.known]
        unknown = [each for each in verdicts if not each.known]
        summary = f"{loaded.name} knows {len(kept)} of {len(rows)} facts in {file}"
        result |= {
            "model": loaded.name,
            "known": len(kept),
            "verdicts": [
                {
                    table.unit: each.row.line,
                    "subject": each.row.fact.subject,
                    "object": each.row.fact.object,
                    "named": each.named,
                    "known": each.known,
                    "continuation": each.continuation,
                }
                for each in verdicts
            ],
        }
        write_facts(out, kept)
        progress.unlink()
    elif out:
        write_facts(out, kept)
    if json:
        told = [{table.unit: each.line, "reason": each.reason} for each in bad]
        show.as_json({**result, "bad": told, "written": str(out) if out else None})
    else:
        tell(summary)
        _tell_unknown(unknown)
        show.written(out)
    if bad:
        tell(f"left out: {len(bad)} of {len(table.rows) + len(table.bad)}", err=True)
        raise typer.Exit(1)


_SHOWN = 10  # facts that the model does not know


def _tell_unknown(unknown: Sequence[Knowledge]) -> None:
    """A table of the first facts that the model does not know, with its own answers."""
    from errata.cli import show

    if not unknown:
        return
    rows = [
        (each.row.fact.text, each.row.fact.object, each.named or "–", " ".join(each.continuation.split())[:60])
        for each in unknown[:_SHOWN]
    ]
    show.table(("prompt", "object", "model names", "model says"), rows, "Not known:")
    if len(unknown) > _SHOWN:
        show.line(f"and {len(unknown) - _SHOWN} more: --json lists all")


def ask(
    model: Model, rows: Sequence[FactRow], progress: Path, facts: str, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's continuation of each fact. Answers are saved as they are computed, and not computed again."""
    from errata.base.journal import Journal
    from errata.base.parsing import of_type, taking_apart
    from errata.cli import show
    from errata.metrics.knowledge import continuations
    from errata.models.fingerprint import weights_digest

    header = {
        "model": model.name,
        "weights": weights_digest(model.hf),
        "dtype": str(model.dtype).removeprefix("torch."),
        "facts": facts,
        "max_new_tokens": max_new_tokens,
    }
    with Journal.open(progress, KIND, VERSION, header) as journal, show.progress("asking", "facts") as bar:
        said = {}
        with taking_apart(progress, "a file of continuations", advice="Remove it: all facts are asked again"):
            for record in journal.records:
                said[of_type(record["line"], int)] = of_type(record["continuation"], str)
        left = [row for row in rows if row.line not in said]
        bar(len(said), len(rows))
        try:
            for index, continuation in continuations(
                model, [row.fact.text for row in left], max_new_tokens=max_new_tokens, batch_size=batch_size
            ):
                journal.append({"line": left[index].line, "continuation": continuation})
                said[left[index].line] = continuation
                bar(len(said), len(rows))
        except KeyboardInterrupt:
            tell(f"{len(said)} of {len(rows)} facts are asked: start again to go on", err=True)
            raise
    return [said[row.line] for row in rows]
