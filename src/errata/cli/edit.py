"""`errata edit`: change one fact, or all facts of a table."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from errata.base.display import tell
from errata.base.text import phrase
from errata.cli import options, second_moments, tables
from errata.cli.export import Lora, Merge
from errata.data.fact_table import BadLine

if TYPE_CHECKING:
    from errata.base.errors import ErrataError
    from errata.base.facts import Rewrite
    from errata.editors.editor import Step
    from errata.edits.edit import Edit
    from errata.models.model import Model


def edit(
    subject: Annotated[Optional[str], typer.Option(help="What the fact is about.")] = None,  # noqa: UP045
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A sentence up to its object, with {} for the subject."),
    ] = None,
    to: Annotated[Optional[str], typer.Option(help="The new object.")] = None,  # noqa: UP045
    old: Annotated[
        str, typer.Option("--from", help="The old object; by default the model's answer before the edit.")
    ] = "",
    separator: options.Separator = None,
    requests: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="A table instead of one fact: .csv, .tsv, .jsonl or .json, with subject, prompt, new_object."
        ),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="For a table: make each edit with the earlier ones applied to the model."),
    ] = False,
    model: options.ModelName = "atlas",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Output: one .safetensors with all edits, or a folder with one file for each request."),
    ] = None,
    lora: Lora = None,
    merge: Merge = None,
    editor: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="An editor other than ROME, with its settings, such as ft-l or mend:trained=FOLDER."),
    ] = None,
    layer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The layer to edit, from 0; auto finds it by a trace. By default the known layer, or else auto."
        ),
    ] = None,
    preset: Annotated[
        Optional[Literal["paper", "reference"]],  # noqa: UP045
        typer.Option(help="Use the settings of the paper, or of its published code."),
    ] = None,
    key: Annotated[Optional[str], typer.Option(help="consistent (exact) or reference (the published code).")] = None,  # noqa: UP045
    also: Annotated[Optional[list[str]], typer.Option(help="Another prompt to watch; any number.")] = None,  # noqa: UP045
    corpus: second_moments.Corpus = None,
    field: second_moments.Field = "text",
    revision: second_moments.Revision = None,
    corpus_tokens: second_moments.Tokens = 100_000,
    second_moment: second_moments.File = None,
    identity: second_moments.Identity = False,
    force: Annotated[bool, typer.Option("--force", help="Make the edit even if it disables the model.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line of the table.")] = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Rewrite facts with ROME or another editor, show what the model says before and after, and save the edits.

    Give one fact by --subject, --prompt and --to, or a table by --requests, whose edits are computed together. Requests
    that cannot be edited are reported and skipped; the exit code is then 1.
    """
    from errata.base.errors import ConfigError, ErrataError
    from errata.cli import export, show

    source = second_moments.Source(corpus, field, revision, corpus_tokens, second_moment, identity, download)
    name, settings = _spec(editor, layer=_layer(layer), preset=preset, key=key)
    table = None
    if requests is None:
        if sequential or strict:
            raise ConfigError("--sequential and --strict are about a table of requests: give one by --requests")
        rewrites = [_one(subject, prompt, to, old, separator)]
        if not all(text.strip() for text in also or []):
            raise ConfigError("--also is empty: write a prompt to watch")
    else:
        if any((subject, prompt, to, old, also, separator is not None)):
            raise ConfigError("give one fact by --subject, --prompt and --to, or a table by --requests, not both")
        table = tables.requested(requests, strict)
        rewrites = [row.rewrite for row in table.rows]
    _require_places(out, lora, merge, many=table is not None)

    # Torch comes only now: bad input is told at once.
    from errata.edits.edit import Edit
    from errata.edits.ledger import ContradictoryEdits

    loaded = options.load(model, device, dtype, download, start_token)
    if table is None and not old:
        rewrites = [_with_old_object(loaded, rewrites[0])]
    made, how = _made(loaded, rewrites, name, settings, source, seed, sequential=sequential, force=force)
    if table is None or requests is None:
        if isinstance(made[0], ErrataError):
            raise made[0]
        rows = [_Row(rewrites[0].subject, rewrites[0], made[0])]
        refused = []
    else:
        lines = [row.line for row in table.rows]
        refused = [
            BadLine(line, str(each)) for line, each in zip(lines, made, strict=True) if isinstance(each, ErrataError)
        ]
        tables.tell_bad_lines(refused, requests, table.unit, strict)
        rows = [
            _Row(row.name, row.rewrite, each)
            for row, each in zip(table.rows, made, strict=True)
            if isinstance(each, Edit)
        ]
    edits = list(dict.fromkeys(row.edit for row in rows))  # requests of one subject share one
    if table is None:
        edits = [dataclasses.replace(each, notes={**each.notes, "old_object": _SOURCE[bool(old)]}) for each in edits]
        rows = [dataclasses.replace(row, edit=each) for row, each in zip(rows, edits, strict=True)]
    told: dict[str, Any] = {"model": loaded.name, **how}
    if edits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContradictoryEdits)  # of the table, and told
            _save(rows, out, loaded, sequential)
            told |= export.write(loaded, edits, lora, merge)
    told |= {name: str(path) if path and edits else None for name, path in _named(out, lora, merge)}
    if table is None:
        _tell_one(loaded, edits[0], also or [], told, json)
    else:
        unused = [{table.unit: each.line, "reason": each.reason} for each in (*table.bad, *refused)]
        _tell_many(_with_all_on(loaded, rows, sequential), {**told, "refused": unused}, json)
    if not json and edits:
        show.written(out, lora, merge)
    if table and (table.bad or refused):
        tell(f"left out: {len(table.bad) + len(refused)} of {len(table.bad) + len(table.rows)}", err=True)
        raise typer.Exit(1)


# ---- what goes in ----

_ANSWER_TOKENS = 12  # of what the model says now, at most so many are recorded as the old object


def _one(subject: str | None, prompt: str | None, to: str | None, old: str, separator: str | None) -> Rewrite:
    from errata.base.errors import ConfigError
    from errata.base.facts import Fact

    if subject is None or prompt is None or to is None:
        raise ConfigError("there is no fact to edit: give --subject, --prompt and --to, or a table by --requests")
    return Fact(subject, prompt, old, separator).rewrite(to)


def _with_old_object(model: Model, rewrite: Rewrite) -> Rewrite:
    """The rewrite of what the model says now: its greedy continuation, up to where an answer ends."""
    said = phrase(model.complete(rewrite.text, _ANSWER_TOKENS)[len(rewrite.text) :])
    return dataclasses.replace(rewrite.fact, object=said).rewrite(rewrite.new_object)


def _layer(text: str | None) -> int | Literal["auto"] | None:
    from errata.base.errors import ConfigError

    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise ConfigError(f"--layer is {text!r}: name one by its number, from 0, or say auto")
    return int(text)


def _require_places(out: Path | None, lora: Path | None, merge: Path | None, many: bool) -> None:
    """Check, before long work, that the results can be written."""
    from errata.base.errors import OutputError
    from errata.cli import export

    options.require_apart(dict(_named(out, lora, merge)))
    export.require_free(lora, merge)
    if out is None:
        return
    if out.suffix != ".safetensors" and many:
        if out.is_file():
            raise OutputError(f"--out is {out}, a file: name a folder for a file a request, or a .safetensors for all")
        options.require_outputs(out / "0.safetensors")
        return
    options.require_ending(out, [".safetensors"], "an edit")
    options.require_outputs(out)


def _named(out: Path | None, lora: Path | None, merge: Path | None) -> tuple[tuple[str, Path | None], ...]:
    return ("saved", out), ("lora", lora), ("merged", merge)


def _spec(text: str | None, **given: object) -> tuple[str, dict[str, Any]]:
    """The method and its settings: those of --editor, and those that have an option of their own.

    Raises:
        ConfigError: if a setting is given in both ways, or --editor is not NAME:SETTING=VALUE,...
    """
    from errata.base.errors import ConfigError

    _, method, settings = options.editor_spec(text or "rome")
    for name, value in given.items():
        if value is not None:
            if name in settings:
                raise ConfigError(f"{name} is given twice, by --{name} and in --editor {text}: give it once")
            settings[name] = value
    return method, settings


def _made(
    model: Model,
    rewrites: Sequence[Rewrite],
    name: str,
    settings: dict[str, Any],
    source: second_moments.Source,
    seed: int,
    *,
    sequential: bool,
    force: bool,
) -> tuple[list[Edit | ErrataError], dict[str, Any]]:
    """The edits, and how they came about."""
    from errata.cli import show
    from errata.editors.layer_choice import choose_layer
    from errata.editors.registry import method_of

    method, facts = method_of(name), [each.fact for each in rewrites]
    if method.layer_auto and method.known(model, settings)[0].get("layer") in (None, "auto"):
        with show.progress("choosing the layer", "facts") as bar:
            settings = {**settings, "layer": choose_layer(model, facts, seed=seed, progress=bar)}
    editor = options.bind(method, model, settings, source, seed, facts, sample_now=False)
    with show.progress("editing", "steps") as bar:
        edits = editor(list(rewrites), sequential=sequential, force=force, errors="keep", progress=_counting(bar))
    how = {"layer": editor.config["layer"], "chosen": editor.layer_by} if editor.layer_by else {}
    return edits, {"editor": name, **how}


def _counting(bar: Callable[[int, int], None]) -> Callable[[Step], None]:
    """Counts steps of all facts; those that stop early leave the bar short of its end."""
    done = 0

    def tell(step: Step) -> None:
        nonlocal done
        done += 1
        bar(done, step.steps * step.facts)

    return tell


# ---- what comes out ----


@dataclass(frozen=True)
class _Row:
    """A request that was met.

    Attributes:
        name: its name in the table.
        rewrite: the requested rewrite.
        edit: the edit that writes it, perhaps with other requests of its subject.
        with_all: probability of the new object with the edits of all rows on the model; None: not measured.
    """

    name: str
    rewrite: Rewrite
    edit: Edit
    with_all: float | None = None

    @property
    def alone(self) -> tuple[float, float] | None:
        """Probability of the new object before and after its own edit; None: not measured."""
        health, written = self.edit.notes.get("health"), self.edit.notes.get("written")
        if written:
            return tuple(written[self.edit.rewrites.index(self.rewrite)])
        return (health["probability_before"], health["probability_after"]) if health else None

    @property
    def weak(self) -> str:
        """Why the new object has less than half with all edits on; empty if it has more."""
        if self.with_all is None or self.with_all >= 0.5:
            return ""
        return "weak by itself" if self.alone and self.alone[1] < 0.5 else "lost beside the others"


def _save(rows: Sequence[_Row], out: Path | None, model: Model, sequential: bool) -> None:
    """One file for all, or one for each edit in a folder."""
    if out is None:
        return
    edits = list(dict.fromkeys(row.edit for row in rows))
    if out.suffix == ".safetensors":
        _whole(edits, model, sequential).save(out)
        return
    names = {row.edit: row.name for row in reversed(rows)}  # of the first request of each edit
    for number, made in enumerate(edits, start=1):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{names[made]} {made.rewrites[0].subject}").strip("-")[:60]
        made.save(out / f"{number:04d}-{slug}.safetensors")


def _tell_one(model: Model, made: Edit, also: Sequence[str], told: Mapping[str, Any], json: bool) -> None:
    """Show predictions before and after, and the edit's side effects."""
    from errata.cli import show

    (rewrite,) = made.rewrites
    prompts, to = [rewrite.text, *also], rewrite.new_object
    answers = [_answer(model, prompt) for prompt in prompts]
    before = _says(model, prompts, to, rewrite.separator, answers)
    with made.applied(model):
        after = _says(model, prompts, to, rewrite.separator, answers)
    norm = made.relative_norm(model)
    verdict = _verdict(to, before[0].p_new, after[0].p_new, made.notes.get("health"))
    if after[0].p_new < 0.5:
        tell(
            f"warning: the edit is weak: P({to}) is {show.percent(after[0].p_new)} after it, "
            f"{show.percent(before[0].p_new)} before. "
            f"{_still_falling(made, told) or _ADVICE[told['editor'] == 'rome']}",
            err=True,
        )
    if json:
        show.as_json(
            {
                **told,
                "id": made.id,
                "old_object": {"text": rewrite.fact.object, "source": made.notes["old_object"]},
                "weights": [delta.weight for delta in made.deltas],
                "relative_norm": norm,
                "prompts": [
                    {
                        "prompt": prompt,
                        "before": b.text,
                        "after": a.text,
                        "p_new_before": b.p_new,
                        "p_new_after": a.p_new,
                        "answer": answer.strip() or None,
                        "p_answer_before": b.p_answer,
                        "p_answer_after": a.p_answer,
                    }
                    for prompt, answer, b, a in zip(prompts, answers, before, after, strict=True)
                ],
                "verdict": verdict,
                "health": made.notes.get("health"),
                "residual": made.notes.get("residual"),
                "rounding": made.notes.get("rounding"),
                "config": dict(made.config),
            }
        )
        return
    rows = [
        (prompt, b.text, a.text, _change(b.p_new, a.p_new), _change(b.p_answer, a.p_answer))
        for prompt, b, a in zip(prompts, before, after, strict=True)
    ]
    show.table(("prompt", "before", "after", f"P({to})", "P(answer before)"), rows)
    show.line(verdict)
    weights = ", ".join(delta.weight for delta in made.deltas)
    whence = {"model": "as the model said before; --from names another", "given": "by --from"}
    show.line(f"old object: “{rewrite.fact.object}”, {whence[made.notes['old_object']]}")
    show.line(f"{weights} changed by ‖ΔW‖/‖W‖ = {norm:.3f}; {_by(told)}")
    show.line(show.health_summary(made))


_SOURCE = {True: "given", False: "model"}  # whence an old object is

_ADVICE = {
    True: "Another layer may do (--layer auto, or errata trace shows where), or more text in --corpus",
    False: "Other settings may do (errata editors NAME lists them), or another editor",
}


def _by(told: Mapping[str, Any]) -> str:
    """Origin of the edits: method, layer, and how it was chosen."""
    where = f"layer {told['layer']}: {told['chosen']}" if "layer" in told else ""
    return where if told["editor"] == "rome" else f"by {told['editor']}{where and f', {where}'}"


def _whole(edits: Sequence[Edit], model: Model, sequential: bool) -> Edit:
    """Different edits as one."""
    from errata.edits.edit import Edit

    return edits[0] if len(edits) == 1 else Edit.combine(edits, model if sequential else None)


def _with_all_on(model: Model, rows: Sequence[_Row], sequential: bool) -> list[_Row]:
    """The rows with what their edits do together, and a warning if that is too little."""
    from errata.edits.ledger import ContradictoryEdits
    from errata.models.scoring import score

    if not rows:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContradictoryEdits)
        whole = _whole(list(dict.fromkeys(row.edit for row in rows)), model, sequential)
        with whole.applied(model):
            found = score(
                model,
                [row.rewrite.text for row in rows],
                [row.rewrite.new_object for row in rows],
                [row.rewrite.separator for row in rows],
            )
    rows = [dataclasses.replace(row, with_all=math.exp(each.total)) for row, each in zip(rows, found, strict=True)]
    alone = sum(row.weak == "weak by itself" for row in rows)
    lost = sum(row.weak == "lost beside the others" for row in rows)
    if alone or lost:
        advice = [
            f"{alone} by themselves already (another layer or more steps may do)" if alone else "",
            f"{lost} beside the other edits ({_APART if sequential else _IN_SEQUENCE})" if lost else "",
        ]
        tell(
            f"warning: with all edits on, {alone + lost} of {len(rows)} new objects have less than 50 %: "
            f"{', '.join(filter(None, advice))}",
            err=True,
        )
    return rows


_IN_SEQUENCE = "--sequential makes each edit with the earlier ones on"
_APART = "put fewer edits on one layer at a time"


def _tell_many(rows: Sequence[_Row], told: Mapping[str, Any], json: bool) -> None:
    """A line for each request."""
    from errata.cli import show

    if json:
        told_edits = [
            {
                "name": row.name,
                "id": row.edit.id,
                "subject": row.rewrite.subject,
                "new_object": row.rewrite.new_object,
                "health": row.edit.notes.get("health"),
                "p_new": row.alone[1] if row.alone else None,
                "p_new_with_all": row.with_all,
                "weak": row.weak or None,
                "residual": row.edit.notes.get("residual"),
                "rounding": row.edit.notes.get("rounding"),
            }
            for row in rows
        ]
        show.as_json({**told, "edits": told_edits})
        return
    lines = []
    for row in rows:
        health = row.edit.notes.get("health")
        alone = [show.percent(p) for p in row.alone] if row.alone else ["–", "–"]
        measured = ["–", "–"]  # where the model's own hints do without probing
        if health:
            drift = "–" if health["drift"] is None else f"{health['drift']:.2g}"
            measured = [f"{health['relative_norm']:.3f}", drift + (" disabling" if health["disabling"] else "")]
        with_all = "–" if row.with_all is None else show.percent(row.with_all)
        lines.append((row.name, row.rewrite.statement, *alone, with_all, row.weak, *measured))
    if lines:
        show.table(("name", "edit", "P before", "after", "with all", "", "‖ΔW‖/‖W‖", "drift"), lines)
        show.line(f"{_by(told)}. Drift is in nats per token, on texts of the model's own.")
        shared = len(rows) - len({row.edit for row in rows})
        if shared:
            show.line("Requests of one subject are written together, by one edit.")


@dataclasses.dataclass(frozen=True)
class _Said:
    """A model's response to a prompt.

    Attributes:
        text: the start of its greedy continuation.
        p_new: probability of the new object.
        p_answer: probability of the answer that the unedited model gave; None if it gave none.
    """

    text: str
    p_new: float
    p_answer: float | None


def _answer(model: Model, prompt: str) -> str:
    """The model's own answer to a prompt, with the white space and quote before it; "" if it gives none."""
    said = model.complete(prompt, _ANSWER_TOKENS)[len(prompt) :]
    answer = phrase(said)
    return said[: said.index(answer) + len(answer)] if answer else ""


def _says(
    model: Model, prompts: Sequence[str], target: str, separator: str | None, answers: Sequence[str]
) -> list[_Said]:
    """The model's response to each prompt; `answers` are scored exactly as written."""
    from errata.models.scoring import score

    given = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    found = score(
        model,
        [*prompts, *(prompt for prompt, _ in given)],
        [*[target] * len(prompts), *(answer for _, answer in given)],
        [*[separator] * len(prompts), *[""] * len(given)],
    )
    probabilities = [math.exp(each.total) for each in found]
    own = iter(probabilities[len(prompts) :])
    return [
        _Said(
            model.complete(prompt, 6)[len(prompt) :].split("\n")[0].strip(),
            p_new,
            next(own) if answer else None,
        )
        for prompt, answer, p_new in zip(prompts, answers, probabilities[: len(prompts)], strict=True)
    ]


def _change(before: float | None, after: float | None) -> str:
    """A probability before and after, for a table."""
    from errata.cli import show

    return "–" if before is None or after is None else f"{show.percent(before)} → {show.percent(after)}"


# Drift, in nats per token, up to which unrelated text counts as hardly, and as noticeably moved.
_SMALL_DRIFT, _NOTICEABLE_DRIFT = 0.02, 0.2


def _verdict(to: str, before: float, after: float, health: Mapping[str, Any] | None) -> str:
    """Whether the edit is good, in one sentence.

    Args:
        to: the new object.
        before, after: its probability.
        health: the edit's; None if it was not measured.
    """
    from errata.cli import show

    if health is not None and health["disabling"]:
        begin = "The edit breaks the model"
    elif after < 0.5:
        begin = "The edit is weak"
    elif before >= 0.5:
        begin = "The edit changes little: the model gave this answer before"
    else:
        begin = "The edit took"
    said = f"{begin}: P({to}) {show.percent(after)}, {show.percent(before)} before"
    if health is None:
        return f"{said}; its effect on unrelated text was not measured."
    drift = health["drift"]
    if drift is None:
        return f"{said}; predictions on unrelated text are no longer numbers."
    how = "hardly moved" if drift <= _SMALL_DRIFT else "moved noticeably" if drift <= _NOTICEABLE_DRIFT else "moved far"
    return f"{said}; unrelated text {how} ({drift:.2g} nats per token)."


def _still_falling(made: Edit, told: Mapping[str, Any]) -> str | None:
    """Advice to take more steps, if the loss was still falling when they ran out."""
    steps, losses = made.config.get("steps"), [step["loss"] for step in made.notes.get("steps", ())]
    if not isinstance(steps, int) or len(losses) != steps or steps < 2:
        return None
    half = max(1, min(5, steps // 2))  # Adam's loss is noisy from step to step: compare means
    if not sum(losses[-half:]) < _FALLING * sum(losses[-2 * half : -half]):
        return None
    where = f"layer={told['layer']}," if "layer" in told else ""
    more = f"--editor {told['editor']}:{where}steps={2 * steps}"
    return f"Its loss was still falling after {steps} steps: allow more, {more}"


_FALLING = 0.95  # a loss that ends below this share of what it was a few steps earlier was still falling
