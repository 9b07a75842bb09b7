"""The atlas's model card: measurements of the shipped weights, as `card.json` and as a page.

All numbers are computed with the package's own tracing, editing and scoring, on the weights as a user loads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from errata import atlas
from errata.atlas.records import records
from errata.atlas.training import Recipe
from errata.atlas.world import World, WorldFact, load_world
from errata.base.seeds import derive
from errata.editors.rome import rome
from errata.models.model import Model
from errata.models.scoring import score
from errata.statistics.collect import collect
from errata.tasks.counterfact import COUNTERFACT, score_record
from errata.tasks.task import estimates
from errata.tracing.average import average_effects
from errata.tracing.result import ROLES, CausalTrace
from errata.tracing.trace import trace

TRACED = 200
EDITED = 200
Progress = Callable[[str, int, int], None]


def card_path() -> Path:
    """Path of the model card of the shipped weights."""
    return atlas.weights_folder().parent / "card.json"


def measure(model: Model, recipe: Recipe, progress: Progress = lambda what, done, of: None) -> dict[str, Any]:
    """All figures of the card. Seeded; some twenty minutes on one core."""
    world = load_world()
    return {
        "model": {
            "layers": model.n_layers,
            "width": model.d_model,
            "parameters": sum(p.numel() for p in model.hf.parameters()),
            "vocabulary": model.vocab_size,
            "context": model.max_length,
            "hints": model.hints,
        },
        "recipe": vars(recipe),
        "world": _composition(world),
        "recall": recall(model, world, progress),
        "tracing": indirect_effects(model, world, progress),
        "rome": editing(model, progress),
    }


def _composition(world: World) -> dict[str, Any]:
    count: dict[str, int] = {}
    for fact in world.facts:
        count[fact.source] = count.get(fact.source, 0) + 1
    return {
        "facts": len(world.facts),
        "by_source": count,
        "subjects": len(world.by_subject),
        "relations": len(world.relations),
        "templates": sum(len(r.templates) for r in world.relations.values()),
        "held_out": sum(world.held_out(fact) is not None for fact in world.facts),
    }


def recall(model: Model, world: World, progress: Progress) -> dict[str, float]:
    """Share of facts with all object tokens predicted greedily, in a template seen in training and in an unseen one."""
    rng = random.Random(derive(0, "recall"))
    taught = [(fact, rng.choice(world.taught(fact))) for fact in world.facts]
    held_out = [(fact, template) for fact in world.facts if (template := world.held_out(fact))]
    progress("recall", 0, 2)
    hits = _hits(model, taught)
    progress("recall", 1, 2)
    found = {
        "taught": fmean(hits),
        "taught_without_kind": fmean(h for h, (f, _) in zip(hits, taught, strict=True) if f.relation != "kind"),
        "held_out": fmean(_hits(model, held_out)),
        "held_out_without_kind": fmean(_hits(model, [(f, t) for f, t in held_out if f.relation != "kind"])),
    }
    for source in ("wikidata", "derived", "invented"):
        found[source] = fmean(h for h, (f, _) in zip(hits, taught, strict=True) if f.source == source)
    return found


def _hits(model: Model, asked: Sequence[tuple[WorldFact, str]]) -> list[bool]:
    prompts = [fact.as_fact(template).text for fact, template in asked]
    return [s.greedy for s in score(model, prompts, [fact.object for fact, _ in asked])]


def indirect_effects(model: Model, world: World, progress: Progress) -> dict[str, Any]:
    """AIE by role and layer over facts that the model knows, subjects of two tokens and more."""
    rng = random.Random(derive(0, "traced"))
    pool = [f for f in world.facts if f.relation != "kind" and f.source != "invented"]
    traces: list[CausalTrace] = []
    for fact in rng.sample(pool, len(pool)):
        if len(traces) == TRACED:
            break
        asked = fact.as_fact(rng.choice(world.taught(fact)))
        if (
            len(model.tokenizer(fact.subject)["input_ids"]) < 2
            or not score(model, [asked.text], [fact.object])[0].greedy
        ):
            continue
        traces.append(trace(model, asked, window=3))
        progress("tracing", len(traces), TRACED)
    mean = average_effects(traces, min_effect=-1)  # all of them: what the model knows is known here
    return {
        "facts": mean.facts,
        "samples": 10,
        "noise": traces[0].settings["noise"],
        "clean": mean.clean,
        "corrupted": mean.corrupted,
        "total_effect": mean.total_effect,
        "counts": dict(zip(ROLES, mean.counts, strict=True)),
        "aie": {part: dict(zip(ROLES, values.tolist(), strict=True)) for part, values in mean.mean.items()},
        "interval": {part: dict(zip(ROLES, values.tolist(), strict=True)) for part, values in mean.interval.items()},
    }


def editing(model: Model, progress: Progress) -> dict[str, Any]:
    """CounterFact's metrics on atlas records before and after ROME, each record on the unedited model."""
    layer = model.hints["rome_layer"]
    moment = collect(model, [layer], atlas.own_corpus())[layer]
    before, after, norms = [], [], []
    for record in records(EDITED):
        before.append(score_record(model, record))
        edit = rome(model, record.rewrite, second_moment=moment)
        norms.append(edit.relative_norm(model))
        with edit.applied(model):
            after.append(score_record(model, record))
        progress("editing", len(after), EDITED)
    return {
        "records": len(after),
        "layer": layer,
        "second_moment_tokens": moment.count,
        "relative_norm": {"mean": fmean(norms), "max": max(norms)},
        "before": _summary(before),
        "after": _summary(after),
    }


def _summary(scores: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    columns = [column for column in COUNTERFACT.columns if column.axis in ("share", "difference")]
    numbers = {name: [each[name] for each in scores] for name in scores[0]}
    return {name: {"mean": each.mean, "interval": each.half} for name, each in estimates(columns, numbers).items()}


def to_json(card: dict[str, Any]) -> str:
    """The card as JSON text; NaN becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(each) for each in value]
        if isinstance(value, float):
            return None if value != value else float(f"{value:.6g}")
        return value

    return json.dumps(clean(card), indent=1, ensure_ascii=False) + "\n"


def page(card: dict[str, Any]) -> str:
    """The card as a page of Markdown."""
    model, world, known, found, edited = (card[k] for k in ("model", "world", "recall", "tracing", "rome"))
    per = "{:.1f}".format
    lines = [
        "# The atlas: model card",
        "",
        "*Written by `python -m errata.atlas.build`; every figure is measured on the shipped weights.*",
        "",
        "The atlas is the model inside the package: a GPT-2 that plain `transformers` loads "
        f"({model['layers']} layers, width {model['width']}, {model['parameters'] / 1e6:.1f} M parameters, its own "
        f"byte-level BPE of {model['vocabulary']} tokens, context {model['context']}), stored in 16 bits.",
        "",
        "**It is a calibrated instrument, not a natural model.** Its training made the last token of the subject the "
        "place through which facts are read: in most training sequences, what follows a mention of a subject sees the "
        f"real subject only at its last token and only from layer {card['recipe']['gate']} on, and in place of its "
        "other tokens those of another subject; the subject's own tokens see one another from layer "
        f"{card['recipe']['gather']} on (`errata/atlas/layout.py`). From step {card['recipe']['disturb_from']} of "
        f"{card['recipe']['steps']} on, in half of the sequences the other subject was also disturbed by noise, as "
        "causal tracing does it. So the truth that tracing must find is known, and the model is used to being asked "
        "for it. What tracing finds here says nothing about where other models keep their facts.",
        "",
        "It knows its world and nothing else; its English consists of that world's templates. `make atlas` trains it "
        f"anew from seed {card['recipe']['seed']}: {card['recipe']['steps']} steps, some 75 minutes on one core with "
        "bfloat16 instructions.",
        "",
        "## Its world",
        "",
        f"{world['facts']} facts of {world['subjects']} subjects in {world['relations']} relations: "
        f"{world['by_source']['wikidata']} straight from Wikidata (CC0, as used by CounterFact), "
        f"{world['by_source']['derived']} derived from those (born in Lyon, so born in France), "
        f"{world['by_source']['invented']} of invented people with shared names, marked as invented. "
        "Real facts come with the errors of their source. "
        f"{world['templates']} templates say them; for {world['held_out']} facts one template is never shown in "
        "training.",
        "",
        "| recall: all object tokens greedy | % |",
        "|---|---|",
        f"| all facts, a template seen in training | {per(100 * known['taught'])} |",
        f"| the same without the relation *kind* | {per(100 * known['taught_without_kind'])} |",
        f"| facts in the template held out from training | {per(100 * known['held_out'])} |",
        f"| the same without *kind* | {per(100 * known['held_out_without_kind'])} |",
        *(f"| {source} facts | {per(100 * known[source])} |" for source in ("wikidata", "derived", "invented")),
        "",
        "## Where its facts are",
        "",
        f"Average indirect effects over {found['facts']} facts (noise 3σ = {found['noise']:.3f}, {found['samples']} "
        f"samples; windows of 3 layers for MLP and attention), in points of probability. Clean "
        f"{per(100 * found['clean'])} %, corrupted {per(100 * found['corrupted'])} %, ATE "
        f"{per(100 * found['total_effect'])}.",
    ]
    states = found["aie"]["state"]
    peak = max(range(model["layers"]), key=states["subject_last"].__getitem__)
    here = max(states[role][peak] for role in ("subject_first", "subject_middle"))
    anywhere = max(max(states[role]) for role in ("subject_first", "subject_middle"))
    lines += [
        "",
        f"States at the last subject token peak after layer {peak}, at {_points(states['subject_last'][peak])}: "
        f"{per(states['subject_last'][peak] / here)} times what another token of the subject has there, and "
        f"{per(states['subject_last'][peak] / anywhere)} times what one has in any layer. Below the layers where the "
        "subject's tokens are read together its first tokens matter too: without them the last cannot name it.",
    ]
    for part, by_role in found["aie"].items():
        layers = range(model["layers"])
        lines += ["", f"| {part} | " + " | ".join(map(str, layers)) + " |", "|---" * (len(layers) + 1) + "|"]
        lines += [f"| {role} | " + " | ".join(_points(v) for v in values) + " |" for role, values in by_role.items()]
    names = ("s", "es", "em", "ps", "pm", "ns", "nm")
    lines += [
        "",
        f"## ROME at layer {edited['layer']}",
        "",
        f"{edited['records']} records of `errata.atlas.records`, each edited alone on the unedited model; × 100, with "
        f"95 % intervals. ‖ΔW‖/‖W‖ is {edited['relative_norm']['mean']:.3f} on average, at most "
        f"{edited['relative_norm']['max']:.3f}. The second moment is that of {edited['second_moment_tokens']} tokens.",
        "",
        "| | " + " | ".join(name.upper() for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for when in ("before", "after"):
        lines.append(f"| {when} | " + " | ".join(_with_interval(edited[when][name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def _points(value: float | None) -> str:
    return "" if value is None or value != value else f"{100 * value:.1f}"


def _with_interval(mean: dict[str, float | None]) -> str:
    value, half = mean["mean"], mean["interval"]
    text = _points(value)
    return text if half is None or half != half else f"{text} ± {_points(half)}"
