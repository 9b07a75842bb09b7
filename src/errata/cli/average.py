"""`errata average`: averages of stored traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from errata.cli import options


def average(
    results: Annotated[Path, typer.Argument(help="Traces, as errata trace --save keeps them.")],
    out: Annotated[Optional[Path], typer.Option(help="Where to write them: .csv, .parquet or .json.")] = None,  # noqa: UP045
    min_effect: options.MinEffect = None,
    unknown: options.Unknown = False,
    json: options.Json = False,
) -> None:
    """Average the effects of stored traces by the roles of tokens, without a model."""
    from errata.cli import show
    from errata.tracing.result import load_traces

    options.require_share(min_effect)
    if out:
        options.require_ending(out, [".csv", ".parquet", ".json"], "averages")
    options.require_apart({"the file of traces": results, "--out": out})
    traces = load_traces(results)
    options.require_outputs(out)
    found = options.averaged(traces, min_effect, unknown)
    if out:
        found.save(out)
    if json:
        show.as_json({**show.averages_as_json(found), "written": str(out) if out else None})
        return
    show.averages(found)
    show.line(show.averages_summary(found))
    show.written(out)
