"""`errata average`: averages of stored traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errata.cli import options


def average(
    results: Annotated[list[Path], typer.Argument(help="Files of errata trace --save; one table for each file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File for the averages, if there is one file of traces: .csv, .parquet or .json."),
    ] = None,
    averaging: options.Averaging = "facts",
    min_effect: options.MinEffect = None,
    unknown: options.Unknown = False,
    json: options.Json = False,
) -> None:
    """Average the effects of stored traces by the roles of tokens, without a model.

    For several files it shows one table each, with the same columns, to compare models or settings.
    """
    from errata.base.errors import ConfigError
    from errata.cli import show
    from errata.tracing.result import load_traces

    options.require_share(min_effect)
    if out:
        options.require_ending(out, [".csv", ".parquet", ".json"], "averages")
        if len(results) > 1:
            raise ConfigError(
                f"--out holds the averages of one file, and {len(results)} are given: write each by itself"
            )
    for file in results:
        options.require_apart({"the file of traces": file, "--out": out})
    options.require_outputs(out)
    averaged = [options.averaged(load_traces(file), averaging, min_effect, unknown) for file in results]
    if out:
        averaged[0].save(out)
    if json:
        told = [show.averages_as_json(found) for found in averaged]
        several = {"files": [{"file": str(file), **each} for file, each in zip(results, told, strict=True)]}
        show.as_json({**(told[0] if len(told) == 1 else several), "written": str(out) if out else None})
        return
    columns = list(dict.fromkeys(part for found in averaged for part in found.mean))
    for file, found in zip(results, averaged, strict=True):
        show.averages(found, columns, None if len(results) == 1 else f"{file} ({found.model})")
        show.line(show.averages_summary(found))
    show.written(out)
