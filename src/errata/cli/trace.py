"""`errata trace`: where is a fact?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from errata.cli import options


def trace(
    subject: options.Subject,
    prompt: options.Prompt,
    model: options.ModelName = "atlas",
    out: Annotated[Optional[Path], typer.Option(help="Picture: .png, .svg or .pdf.")] = None,  # noqa: UP045
    save: Annotated[Optional[Path], typer.Option(help="The trace itself, .safetensors.")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option(help="Samples of noise.")] = 10,
    noise: Annotated[Optional[float], typer.Option(help="Its standard deviation; 3σ if not given.")] = None,  # noqa: UP045
    window: Annotated[Optional[int], typer.Option(help="Layers of MLP or attention restored at once.")] = None,  # noqa: UP045
    seed: options.Seed = 1,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    json: options.Json = False,
) -> None:
    """Trace one fact causally: which states, MLPs and attentions restore the answer when the subject is corrupted."""
    from errata.base.errors import ConfigError
    from errata.base.facts import Fact
    from errata.cli import show
    from errata.plots.trace import require_ending

    fact = Fact(subject, prompt)
    if out and save and out.resolve() == save.resolve():
        raise ConfigError(f"--out and --save are both {out}: the picture and the trace need a file each")
    if out:
        require_ending(out)
    options.require_outputs(out, save)

    # Torch comes only now: bad input is told at once.
    from errata.tracing.trace import trace as trace_fact

    loaded = options.load(model, device, dtype, download)
    with show.progress("tracing", "sites") as bar:
        found = trace_fact(loaded, fact, samples=samples, noise=noise, window=window, seed=seed, progress=bar)
    if out:
        found.plot(out)
    if save:
        found.save(save)
    if json:
        show.as_json(
            {
                "model": found.model,
                "subject": subject,
                "prompt": prompt,
                "answer": found.answer,
                "clean": found.clean,
                "corrupted": found.corrupted,
                "tokens": list(found.tokens),
                "subject_tokens": list(found.subject),
                "restored": {part: values.tolist() for part, values in found.restored.items()},
                "settings": dict(found.settings),
                "picture": str(out) if out else None,
                "saved": str(save) if save else None,
            }
        )
        return
    show.effects(found)
    show.console.print(show.trace_summary(found), highlight=False, markup=False)
    for path in filter(None, (out, save)):
        show.console.print(f"written: {path}", highlight=False, markup=False)
