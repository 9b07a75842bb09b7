"""`errata gradients`: integrated gradients beside a causal trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from errata.cli import options


def gradients(
    subject: options.Subject,
    prompt: options.Prompt,
    out: Annotated[Path, typer.Option(help="Picture: .png, .svg or .pdf.")],
    object_: options.Object = "",
    separator: options.Separator = None,
    model: options.ModelName = "atlas",
    save: Annotated[Optional[Path], typer.Option(help="File for the gradients, .jsonl.")] = None,  # noqa: UP045
    save_trace: Annotated[Optional[Path], typer.Option(help="File for the trace, .jsonl.")] = None,  # noqa: UP045
    points: Annotated[int, typer.Option(min=1, help="Number of points of the quadrature.")] = 50,
    samples: options.Samples = 10,
    noise: options.Noise = "s3",
    window: options.Window = None,
    window_edges: options.WindowEdges = "paper",
    answer: options.Answer = "model",
    memory: options.Memory = None,
    seed: options.Seed = 1,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Trace one fact, and draw the integrated gradients of its answer's probability below the effects."""
    from errata.base.errors import FactError
    from errata.base.facts import Fact
    from errata.cli import show

    fact = Fact(subject, prompt, object_, separator)
    if answer == "object" and not fact.object:
        raise FactError("--answer object asks for the probability of the fact's object: name it by --object")
    budget = options.memory_bytes(memory)
    settings: dict[str, Any] = {
        "samples": samples,
        "noise": noise,
        "window": window,
        "window_edges": window_edges,
        "answer": answer,
        "seed": seed,
    }
    for path, what in ((save, "gradients"), (save_trace, "traces")):
        if path:
            options.require_ending(path, [".jsonl"], what)
    options.require_apart({"--out": out, "--save": save, "--save-trace": save_trace})
    options.require_picture(out)
    options.require_outputs(save, save_trace)

    # Torch comes only now: bad input is told at once.
    from errata.tracing.config import TraceConfig
    from errata.tracing.gradients import integrated_gradients
    from errata.tracing.trace import trace

    config = TraceConfig(**settings)
    loaded = options.load(model, device, dtype, download, start_token)
    with show.progress("tracing", "sites") as bar:
        traced = trace(loaded, fact, config, memory=budget, progress=bar)
    with show.progress("integrating", "sites") as bar:
        found = integrated_gradients(loaded, fact, points=points, answer=answer, memory=budget, progress=bar)
    found.plot(traced, out)
    if save:
        found.save(save)
    if save_trace:
        traced.save(save_trace)
    if json:
        show.as_json(
            {
                "model": found.model,
                "subject": fact.subject,
                "prompt": fact.prompt,
                "object": fact.object,
                "separator": fact.separator,
                "answer": found.answer,
                "probability": found.probability,
                "tokens": list(found.tokens),
                "subject_tokens": list(found.subject),
                "norms": {part: show.nulled(values) for part, values in found.norms.items()},
                "indirect_effects": {part: show.nulled(traced.indirect_effect(part)) for part in traced.restored},
                "settings": {"trace": dict(traced.settings), "gradients": dict(found.settings)},
                "picture": str(out),
                "saved": str(save) if save else None,
                "saved_trace": str(save_trace) if save_trace else None,
            }
        )
        return
    show.line(show.trace_summary(traced))
    show.written(out, save, save_trace)
