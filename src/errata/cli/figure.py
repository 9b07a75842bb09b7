"""`errata figure`: figures of stored results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional, TypeVar

import typer

from errata.cli import options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from errata.tracing.average import AverageEffects
    from errata.tracing.result import CausalTrace

T = TypeVar("T")


def figure(
    kind: Annotated[
        Literal["trace", "averages", "lines", "severed", "gradients", "sequence", "settings"],
        typer.Argument(
            help="trace: one fact's maps; averages: mean maps by role; lines: means with intervals; severed: bars of "
            "states with severed modules; gradients: integrated gradients beside a trace; sequence: results of errata "
            "sequence; settings: rows of a run folder along a setting (for errata sweep, the layer)."
        ),
    ],
    file: Annotated[
        Path, typer.Argument(help="The saved results: traces, or, for averages, lines and severed, averages.")
    ],
    out: Annotated[Path, typer.Option(help="Picture: .png, .svg or .pdf.")],
    fact: Annotated[
        Optional[int], typer.Option(min=1, help="Number of the trace, from 1, if there are several.")  # noqa: UP045
    ] = None,
    subject: Annotated[Optional[str], typer.Option(help="Subject of the trace, if there are several.")] = None,  # noqa: UP045
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="For gradients: the file of the trace to show beside them."),
    ] = None,
    along: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For settings: the editor setting on the horizontal axis; by default layer."),
    ] = None,
    parts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For trace, averages and lines: the parts to draw, separated by commas, such as state,mlp."),
    ] = None,
    averaging: options.Averaging = "facts",
    min_effect: options.MinEffect = None,
    unknown: options.Unknown = False,
) -> None:
    """Draw stored results again, after the paper's Figures 1, 2, 7, 3, 16, 5, 17 and 18, without a model."""
    from errata.base.errors import ConfigError
    from errata.cli import show
    from errata.plots.drawing import save
    from errata.tracing.result import load_traces

    of_one = kind in ("trace", "gradients")
    if not of_one and (fact is not None or subject is not None):
        raise ConfigError(f"--fact and --subject choose one trace, and {kind} is a figure of all: leave them out")
    if kind not in ("averages", "lines", "severed") and (unknown or min_effect is not None or averaging != "facts"):
        raise ConfigError(f"--averaging, --min-effect and --unknown say how to average, and {kind} averages nothing")
    if kind == "gradients" and trace is None:
        raise ConfigError(
            "gradients are drawn beside a trace: give its file by --trace (errata gradients --save-trace)"
        )
    if kind != "gradients" and trace is not None:
        raise ConfigError(f"--trace is for gradients, which are set beside it, and {kind} has none: leave it out")
    if kind != "settings" and along is not None:
        raise ConfigError(f"--along is for settings of editors, and {kind} has none: leave it out")
    if kind not in ("trace", "averages", "lines") and parts is not None:
        raise ConfigError(f"--parts chooses parts of a trace, of averages or lines, and {kind} has none: leave it out")
    options.require_share(min_effect)
    options.require_apart({"the file to draw": file, "--out": out})
    options.require_apart({"--trace": trace, "--out": out})
    options.require_picture(out)
    if kind == "trace":
        chosen = _chosen(load_traces(file), file, fact, subject)
        drawn = dataclasses.replace(chosen, restored=_of_parts(chosen.restored, parts, file)).figure()
    elif kind == "settings":
        drawn = _along(file, along or "layer")
    elif kind == "sequence":
        from errata.evaluation.sequence import SequenceScores

        drawn = SequenceScores.load(file).figure()
    elif trace is not None:
        drawn = _beside(file, trace, fact, subject)
    else:
        averages = _averages(file, averaging, min_effect, unknown)
        averages = dataclasses.replace(averages, sites=_of_parts(averages.sites, parts, file))
        drawn = {"averages": averages.figure, "lines": averages.lines, "severed": averages.severed}[kind]()
    save(drawn, out)
    show.written(out)


def _of_parts(traced: Mapping[str, T], parts: str | None, file: Path) -> dict[str, T]:
    """Traced values of the named parts, in their order; all parts if none are named.

    Raises:
        ConfigError: if a part was not traced.
    """
    from errata.base.errors import ConfigError

    wanted = options.comma_separated(parts) if parts is not None else tuple(traced)
    missing = next((part for part in wanted if part not in traced), None)
    if missing is not None:
        raise ConfigError(f"--parts names {missing!r}, which is not in {file}: it has {', '.join(traced)}")
    return {part: traced[part] for part in wanted}


def _along(folder: Path, setting: str) -> Figure:
    """Rows of a run along a setting of their editors."""
    from errata.evaluation.results import Run
    from errata.evaluation.setting_scores import SettingScores

    return SettingScores.of(Run.load(folder), setting).figure()


def _beside(file: Path, trace: Path, fact: int | None, subject: str | None) -> Figure:
    """Stored gradients beside the trace that is chosen, or else that of the same fact."""
    from errata.tracing.gradients import IntegratedGradients
    from errata.tracing.result import load_traces

    gradients, traces = IntegratedGradients.load(file), load_traces(trace)
    if fact is None and subject is None:
        traces = [each for each in traces if each.fact.text == gradients.fact.text][:1] or traces
    return gradients.figure(_chosen(traces, trace, fact, subject))


def _averages(
    file: Path, averaging: Literal["facts", "reference"], min_effect: float | None, unknown: bool
) -> AverageEffects:
    """Stored averages, by the file's ending, or those of stored traces.

    Raises:
        ConfigError: if averages are to be chosen from again.
    """
    from errata.base.errors import ConfigError
    from errata.tracing.average import AverageEffects
    from errata.tracing.average_files import ENDINGS
    from errata.tracing.result import load_traces

    if file.suffix.lower() not in ENDINGS:
        return options.averaged(load_traces(file), averaging, min_effect, unknown)
    if unknown or min_effect is not None or averaging != "facts":
        raise ConfigError(f"{file} holds averages, whose traces were chosen before: give the file of the traces")
    return AverageEffects.load(file)


def _chosen(traces: Sequence[CausalTrace], file: Path, fact: int | None, subject: str | None) -> CausalTrace:
    """The one trace that is wanted.

    Raises:
        ConfigError: if none is, or it is not told which of several.
    """
    from errata.base.errors import ConfigError

    numbered = [
        (number, each)
        for number, each in enumerate(traces, 1)
        if fact in (None, number) and subject in (None, each.fact.subject)
    ]
    if len(numbered) == 1:
        return numbered[0][1]
    if not numbered:
        wanted = ", ".join(f"{name} {value}" for name, value in (("--fact", fact), ("--subject", subject)) if value)
        raise ConfigError(f"{file} holds {len(traces)} traces, and none is of {wanted or 'a fact'}: choose another")
    some = ", ".join(f"{number} ({each.fact.text!r})" for number, each in numbered[:3])
    more = ", …" if len(numbered) > 3 else ""
    raise ConfigError(f"{file} holds {len(numbered)} traces to choose from: give --fact with one of {some}{more}")
