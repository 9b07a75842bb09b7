"""`errata demo`: trace, edit, measure and undo on the embedded model, in about a minute, offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import options

if TYPE_CHECKING:
    from errata.data.records import Record
    from errata.models.model import Model

SUBJECT, RELATION, NEW_OBJECT = "Arthur Conan Doyle", "native_language", "Italian"
PROMPT = "{} is a native speaker of"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the edit.")] = Path("errata-demo"),
    model: options.ModelName = "atlas",
    seed: options.Seed = 1,
    json: options.Json = False,
) -> None:
    """Trace a fact, rewrite it, show what changed, and undo the edit: on the embedded model, offline."""
    picture, kept = out / "trace.png", out / "edit.safetensors"
    options.require_outputs(picture, kept)

    from errata.api import ATLAS
    from errata.atlas.records import record_of
    from errata.base.errors import ConfigError, MissingExtra
    from errata.base.fingerprint import tensor_digest
    from errata.cli import show
    from errata.editors.rome import rome
    from errata.statistics.store import known_second_moment
    from errata.tracing.trace import trace

    began = time.monotonic()
    say = (lambda *a, **k: None) if json else show.console().print
    loaded = options.load(model, None, "auto", False)
    if loaded.hints.get("corpus") != ATLAS:
        raise ConfigError(
            f"the demo is about a fact of the atlas, which {loaded.name} need not know: use errata trace, errata edit"
        )
    record = record_of(SUBJECT, RELATION, NEW_OBJECT, PROMPT)
    fact = record.rewrite.fact
    say(f"\n[bold]1. Where is it?[/] “{fact.text} …”\n")
    with show.progress("tracing", "sites") as bar:
        found = trace(loaded, fact, seed=seed, progress=bar)
    missing = ""
    try:
        found.plot(picture)
    except MissingExtra as error:  # the table, the edit and the undo need no picture
        missing = str(error)
    if not json:
        show.effects(found)
    say(show.trace_summary(found), highlight=False, markup=False)

    say(f"\n[bold]2. Change it[/] to “{NEW_OBJECT}”\n")
    with show.progress("second moment", "tokens") as bar:
        moment = known_second_moment(loaded, loaded.hints["rome_layer"], bar)
    with show.progress("editing", "steps") as bar:
        edit = rome(
            loaded,
            record.rewrite,
            second_moment=moment,
            seed=seed,
            progress=lambda step: bar(step.index + 1, step.steps),
        )
    edit.save(kept)
    weight = edit.deltas[0].weight
    digest = tensor_digest(loaded.weight(weight))
    norm = edit.relative_norm(loaded)
    say(f"rank-one change of {weight}, ‖ΔW‖/‖W‖ = {norm:.3f}, from {len(edit.notes['steps'])} steps", highlight=False)

    say("\n[bold]3. What does the model say?[/]\n")
    before = _answers(loaded, record)
    with edit.applied(loaded):
        during = _answers(loaded, record)
    after = _answers(loaded, record)
    exact = tensor_digest(loaded.weight(weight)) == digest and after == before
    seconds = time.monotonic() - began
    if json:
        show.as_json(
            {
                "answer": found.answer,
                "clean": found.clean,
                "corrupted": found.corrupted,
                "best_state": found.best(),
                "relative_norm": norm,
                "rows": [
                    {"kind": kind, "prompt": prompt, "before": b, "during": d, "after": a}
                    for (kind, prompt, b), (_, _, d), (_, _, a) in zip(before, during, after, strict=True)
                ],
                "exact_undo": exact,
                "picture": None if missing else str(picture),
                "edit": str(kept),
                "seconds": seconds,
            }
        )
        return
    answers = list(zip(before, during, after, strict=True))
    rows = [
        (kind, f"{prompt} …", b, d, "the same" if a == b else a)
        for (kind, prompt, b), (_, _, d), (_, _, a) in answers
        if kind != "free text"
    ]
    show.table(("", "prompt", "before", "edited", "undone"), rows)
    for (kind, prompt, b), (_, _, d), _ in answers:
        if kind == "free text":
            say(f"\n“{prompt} …”")
            say(f"  before: … {b}", highlight=False, markup=False)
            say(f"  edited: … {d}", highlight=False, markup=False)
    say(f"\n[bold]4. Undone:[/] {'the old weights, byte for byte' if exact else 'NOT the old weights'}")
    size = kept.stat().st_size / 1024
    drawn = f"no picture: {missing}\n" if missing else f"{picture} (look at it), "
    say(f"\n{drawn}{kept} ({size:.0f} KB). {seconds:.0f} s in all.", markup=False, highlight=False)


def _answers(model: Model, record: Record) -> list[tuple[str, str, str]]:
    """Kind, prompt and continuation of the record's prompts."""
    prompts = [
        ("rewrite", record.rewrite.text, 2),
        *(("paraphrase", prompt, 2) for prompt in record.paraphrase),
        *(("neighbour", prompt, 2) for prompt in record.neighborhood[:3]),
        ("free text", record.rewrite.subject, 24),
    ]
    return [(kind, prompt, _continuation(model, prompt, tokens)) for kind, prompt, tokens in prompts]


def _continuation(model: Model, prompt: str, tokens: int) -> str:
    text = " ".join(model.complete(prompt, tokens)[len(prompt) :].split())
    return text if tokens > 10 else text.split(".")[0]
