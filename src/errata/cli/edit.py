"""`errata edit`: change one fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from errata.cli import options

if TYPE_CHECKING:
    from errata.models.model import Model
    from errata.statistics.second_moment import SecondMoment


def edit(
    subject: options.Subject,
    prompt: options.Prompt,
    to: Annotated[str, typer.Option(help="The new object.")],
    model: options.ModelName = "atlas",
    out: Annotated[Optional[Path], typer.Option(help="Where to save the edit, .safetensors.")] = None,  # noqa: UP045
    old: Annotated[str, typer.Option("--from", help="The old object; else what the model says now.")] = "",
    layer: Annotated[Optional[int], typer.Option(help="The layer to edit, from 0.")] = None,  # noqa: UP045
    key: Annotated[Optional[str], typer.Option(help="consistent (exact) or reference (the published code).")] = None,  # noqa: UP045
    also: Annotated[Optional[list[str]], typer.Option(help="Another prompt to watch; any number.")] = None,  # noqa: UP045
    corpus: Annotated[Optional[list[Path]], typer.Option(help="Texts (.txt, .jsonl) for the second moment.")] = None,  # noqa: UP045
    identity: Annotated[bool, typer.Option("--identity", help="Do without a second moment (C = 1).")] = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    json: options.Json = False,
) -> None:
    """Rewrite one fact with ROME, show what the model says before and after, and save the edit."""
    from errata.base.facts import Fact
    from errata.cli import show

    fact = Fact(subject, prompt, old)
    rewrite = fact.rewrite(to)
    to = rewrite.new_object
    options.require_outputs(out)

    # Torch comes only now: bad input is told at once.
    from errata.api import rome
    from errata.editors.rome import RomeConfig

    loaded = options.load(model, device, dtype, download)
    if not old:
        old = loaded.complete(fact.text, 1)[len(fact.text) :].strip()
        rewrite = Fact(subject, prompt, old).rewrite(to)
    hinted = {"layer": loaded.hints.get("rome_layer"), **loaded.hints.get("rome", {})}
    typed = {name: value for name, value in (("layer", layer), ("key", key)) if value is not None}
    config = RomeConfig(**{**hinted, **typed})
    with show.progress("second moment", "tokens") as bar:
        moment = _second_moment(loaded, config.layer, corpus, identity, bar)
    with show.progress("editing", "steps") as bar:
        made = rome(
            loaded,
            rewrite,
            config,
            second_moment=moment,
            seed=seed,
            progress=lambda step: bar(step.index + 1, step.steps),
        )
    prompts = [fact.text, *(also or [])]
    before = _says(loaded, prompts, to)
    with made.applied(loaded):
        after = _says(loaded, prompts, to)
    norm = made.relative_norm(loaded)
    if out:
        made.save(out)
    if after[0][1] < 0.5:
        show.errors.print(
            f"warning: the edit is weak: P({to}) is {show.percent(after[0][1])} after it, {show.percent(before[0][1])} "
            "before. Another layer may do (errata trace shows where), or more text in --corpus",
            markup=False,
            highlight=False,
        )
    if json:
        show.as_json(
            {
                "model": loaded.name,
                "id": made.id,
                "weights": [delta.weight for delta in made.deltas],
                "relative_norm": norm,
                "prompts": [
                    {"prompt": p, "before": b[0], "after": a[0], "p_new_before": b[1], "p_new_after": a[1]}
                    for p, b, a in zip(prompts, before, after, strict=True)
                ],
                "config": dict(made.config),
                "saved": str(out) if out else None,
            }
        )
        return
    rows = [
        (p, b[0], show.percent(b[1]), a[0], show.percent(a[1])) for p, b, a in zip(prompts, before, after, strict=True)
    ]
    show.table(("prompt", "before", f"P({to})", "after", f"P({to})"), rows)
    weights = ", ".join(delta.weight for delta in made.deltas)
    show.console.print(f"{weights} changed by ‖ΔW‖/‖W‖ = {norm:.3f}", highlight=False, markup=False)
    if out:
        size = out.stat().st_size / 1024
        show.console.print(f"saved: {out} ({size:.0f} KB), for errata generate --edit", markup=False, highlight=False)


def _second_moment(
    model: Model, layer: int | None, corpus: list[Path] | None, identity: bool, bar: Callable[[int, int], None]
) -> SecondMoment:
    """What the options ask for; the atlas has a corpus of its own."""
    from errata.api import ATLAS, atlas_second_moment
    from errata.base.errors import ConfigError
    from errata.statistics.corpus import Corpus
    from errata.statistics.second_moment import SecondMoment
    from errata.statistics.store import collect_cached

    if identity and corpus:
        raise ConfigError("--identity does without a corpus: give one of --identity and --corpus")
    if identity:
        return SecondMoment.identity(model.d_mlp)
    if not corpus and model.hints.get("corpus") != ATLAS:
        raise ConfigError(
            f"ROME needs text to learn which keys of {model.name} to leave alone: give --corpus FILE (.txt or .jsonl, "
            "some 100,000 tokens), or --identity to do without"
        )
    if layer is None:
        raise ConfigError(f"no layer to edit is named: give --layer, 0 to {model.n_layers - 1}")
    if not corpus:
        return atlas_second_moment(model, layer, bar)
    return collect_cached(model, [layer], Corpus.from_files(*corpus), progress=bar)[layer]


def _says(model: Model, prompts: list[str], target: str) -> list[tuple[str, float]]:
    """For each prompt how the model goes on, and the probability of the target."""
    import math

    from errata.models.scoring import score

    found = score(model, prompts, [target] * len(prompts))
    return [
        (model.complete(prompt, 6)[len(prompt) :].split("\n")[0].strip(), math.exp(each.total))
        for prompt, each in zip(prompts, found, strict=True)
    ]
