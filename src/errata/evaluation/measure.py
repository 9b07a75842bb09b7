"""Measurements of records: the model's predictions on their prompts and its generated texts, before and after an edit.

All numbers depend only on the model, the records and the settings, not on the other editors, and repetition gives the
same numbers (up to rounding, if FT and KN have memory for fewer facts at once than before). Texts before and after are
sampled with the same random numbers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from errata.base.autocast import without_autocast
from errata.base.config import Config
from errata.base.errors import Diverged, EditMismatch, ErrataError, FactError
from errata.base.facts import Fact
from errata.base.seeds import derive
from errata.data.snippets import Snippets
from errata.editors.editor import Editor
from errata.edits.edit import Edit
from errata.evaluation.results import UNEDITED, Result
from errata.metrics import side_effects
from errata.metrics.edited import Plan, alike
from errata.metrics.requests import PassageRequest, Request, score_requests
from errata.metrics.text import ESSENCE_LENGTH, as_scored, generation_entropy
from errata.metrics.tfidf import TfIdf
from errata.models.generation import generate, prompt_ids
from errata.models.model import Model
from errata.models.scoring import Score
from errata.passes.rowwise import rowwise
from errata.tasks.task import Case, Scored, Task

Around = Callable[[Sequence[int]], AbstractContextManager[object]]


class Generation(Config):
    """Settings of text generation."""

    top_k: int = Field(default=5, ge=1, description="Sample from this many of the most probable tokens.")
    length: int = Field(default=100, ge=1, description="Length of a text in tokens, prompt included.")
    end_of_text: Literal["stop", "continue"] = Field(
        default="stop",
        description='"stop": a text ends at an end-of-text token. "continue": it goes on to its full length '
        "(published code).",
    )


@dataclass(frozen=True)
class Measures:
    """Settings of a measurement.

    Attributes:
        generation: how texts are written; None: none are.
        snippets: reference texts; None: there are none.
        tfidf: vocabulary and IDF for RS; None without snippets.
        probes: texts on which edits' drift is measured; empty: side effects are not measured.
        seed: seed of the texts.
        essence: "paper": perplexity of the essence texts. "reference": as in the published code, which divides by one
            token more than it scores.
    """

    generation: Generation | None = None
    snippets: Snippets | None = None
    tfidf: TfIdf | None = None
    probes: tuple[str, ...] = ()
    seed: int = 0
    essence: Literal["paper", "reference"] = "paper"


@dataclass(frozen=True)
class Measured:
    """Results of some records by row name, with their edits."""

    results: Mapping[str, Sequence[Result]]
    edits: Mapping[str, Sequence[Edit | None]]


@without_autocast
def measure(
    model: Model,
    task: Task,
    records: Sequence[Case],
    editors: Mapping[str, Editor],
    before: bool,
    measures: Measures,
) -> Measured:
    """Edit records with each editor and measure them; with `before`, measure the unedited model too.

    An editor's error is the result of its record, and so is a prompt that this model cannot be asked. The model is left
    as it was.
    """
    refused = {record.case_id: reason for record in records if (reason := _refusal(model, task, record, measures))}
    found = _measured(model, task, [each for each in records if each.case_id not in refused], editors, before, measures)
    if not refused:
        return found
    results, edits = {}, {}
    for name in [*([UNEDITED] if before else []), *editors]:
        told = iter(found.results.get(name, ()))
        made = iter(found.edits.get(name, ()))
        asked = [record.case_id not in refused for record in records]
        results[name] = [
            next(told) if fine else Result(record.case_id, None, error=refused[record.case_id])
            for record, fine in zip(records, asked, strict=True)
        ]
        if name != UNEDITED:
            edits[name] = [next(made, None) if fine else None for fine in asked]
    return Measured(results, edits)


def _refusal(model: Model, task: Task, record: Case, measures: Measures) -> str | None:
    """Why not all that is measured of a record can be asked on a model."""
    try:
        for request in task.requests(record):
            for ids, _ in request.rows(model):
                model.require_room(ids, request.prompt)
        if measures.probes:
            essence = Fact(record.rewrite.subject, side_effects.ESSENCE).text
            model.require_room(model.ids(essence), essence)
        for text in task.generation(record) if measures.generation else ():
            ids = prompt_ids(model, text)
            model.require_room(ids and [*ids, 0], text)  # and for one token more
    except FactError as error:
        return str(error)
    return None


def _measured(
    model: Model,
    task: Task,
    records: Sequence[Case],
    editors: Mapping[str, Editor],
    before: bool,
    measures: Measures,
) -> Measured:
    if not records:
        return Measured({}, {})
    made: dict[str, list[Edit | ErrataError]] = {}
    seconds: dict[str, dict[str, float]] = {}
    share = 1 / len(records)
    for name, editor in editors.items():
        begin = time.perf_counter()
        made[name] = _fitting(model, editor.make(model, [record.rewrite for record in records]))
        seconds[name] = {"edit": (time.perf_counter() - begin) * share}
    edits = {name: [each if isinstance(each, Edit) else None for each in some] for name, some in made.items()}
    rows: dict[str, list[Edit | None]] = {UNEDITED: [None] * len(records)} if before or measures.probes else {}
    rows |= edits

    begin = time.perf_counter()
    scored = _scored(model, task, records, list(rows.values()), measures)
    per_row = (time.perf_counter() - begin) * share / len(rows)
    scores = dict(zip(rows, scored, strict=True))
    found: dict[str, list[Result]] = {}
    for name, with_edits in rows.items():
        if name == UNEDITED and not before:
            continue
        times = {**seconds.get(name, {}), "ask": per_row}
        texts: list[tuple[str, ...]] = [()] * len(records)
        if measures.generation:
            begin = time.perf_counter()
            texts = _written(model, task, records, with_edits, measures)
            times["generate"] = (time.perf_counter() - begin) * share
        effects: list[Mapping[str, Any] | None] = [None] * len(records)
        if measures.probes and name != UNEDITED:
            begin = time.perf_counter()
            effects = _side_effects(model, records, with_edits, scores[UNEDITED], scores[name], measures.probes)
            times["health"] = (time.perf_counter() - begin) * share
        found[name] = [
            _result(task, record, each, scores[name][i], texts[i], effects[i], times, measures)
            for i, (record, each) in enumerate(zip(records, made.get(name, with_edits), strict=True))
        ]
    return Measured(found, edits)


def _fitting(model: Model, made: Sequence[Edit | ErrataError]) -> list[Edit | ErrataError]:
    """Edits; where they must be put on the model, those that its weights cannot hold become the reason."""

    def tried(each: Edit | ErrataError) -> Edit | ErrataError:
        try:
            with each.applied(model) if isinstance(each, Edit) else contextlib.nullcontext():
                return each
        except EditMismatch as error:
            return error

    by_row = Plan.of(model, [each for each in made if isinstance(each, Edit)]).changes is not None
    return list(made) if by_row else [tried(each) for each in made]


@dataclass(frozen=True)
class _RecordScores:
    """Scores of a record's prompts, and the perplexity of texts about its subject."""

    answers: Scored
    essence: float | None


def _scored(
    model: Model,
    task: Task,
    records: Sequence[Case],
    variants: Sequence[Sequence[Edit | None]],
    measures: Measures,
) -> list[list[_RecordScores]]:
    requests: list[Request | PassageRequest] = []
    owners: list[int] = []
    essences: dict[int, int] = {}
    for i, record in enumerate(records):
        own: list[Request | PassageRequest] = []
        own += task.requests(record)
        text = " ".join(each.text for each in _about(task, record, measures))
        passage = PassageRequest(text, min(ESSENCE_LENGTH, model.max_length))
        if text and len(passage.rows(model)[0][0]) > 1:
            essences[i] = len(requests) + len(own)
            own.append(passage)
        requests += own
        owners += [i] * len(own)
    scores = score_requests(model, requests, [[edits[owner] for owner in owners] for edits in variants])
    return [
        [
            _RecordScores(
                task.scored(record, [each for each, owner in zip(row, owners, strict=True) if owner == i]),
                _perplexity(row[essences[i]][0], measures.essence == "reference") if i in essences else None,
            )
            for i, record in enumerate(records)
        ]
        for row in scores
    ]


def _about(task: Task, record: Any, measures: Measures) -> Sequence[Any]:
    """Texts about a record's subject."""
    if measures.snippets is None or measures.generation is None or not task.snippets:
        return ()
    return measures.snippets.about(record)


def _perplexity(said: Score, reference: bool) -> float | None:
    mean = -said.total / (said.n_tokens + reference)
    return math.exp(mean) if mean < 700 else None  # beyond what a number holds


def _written(
    model: Model, task: Task, records: Sequence[Case], edits: Sequence[Edit | None], measures: Measures
) -> list[tuple[str, ...]]:
    """Texts of each record with its edit on, all in one batch if the edits are of low rank."""
    assert measures.generation is not None
    prompts, owners, seeds = [], [], []
    for i, record in enumerate(records):
        for number, prompt in enumerate(task.generation(record)):
            prompts.append(prompt)
            owners.append(i)
            seeds.append(derive(measures.seed, "text", record.case_id, number))
    length, top_k = measures.generation.length, measures.generation.top_k
    stop = measures.generation.end_of_text == "stop"

    def write(rows: Sequence[int], around: Around | None = None) -> list[str]:
        chosen, own = [prompts[row] for row in rows], [seeds[row] for row in rows]
        try:
            return generate(model, chosen, length, length=length, top_k=top_k, seed=own, around=around, stop=stop)
        except Diverged:
            if len(rows) == 1:
                return chosen  # a model that an edit broke says nothing
            return [text for row in rows for text in write([row], around and alone(row, around))]

    def alone(row: int, around: Around) -> Around:
        return lambda _: around([row])

    plan = Plan.of(model, [edits[owner] for owner in owners])
    changes = plan.changes
    texts = [""] * len(prompts)
    if changes is not None:
        texts = write(range(len(prompts)), lambda rows: rowwise(model, changes.of(torch.tensor(rows))))
    else:
        for edit, rows in alike(plan.edits):
            with edit.applied(model) if edit else contextlib.nullcontext():
                for row, text in zip(rows, write(rows), strict=True):
                    texts[row] = text
    return [tuple(text for text, owner in zip(texts, owners, strict=True) if owner == i) for i in range(len(records))]


def _side_effects(
    model: Model,
    records: Sequence[Case],
    edits: Sequence[Edit | None],
    before: Sequence[_RecordScores],
    after: Sequence[_RecordScores],
    texts: Sequence[str],
) -> list[Mapping[str, Any] | None]:
    """Side effects, size and exactness of each edit."""
    chosen = [i for i, edit in enumerate(edits) if edit is not None]
    made = [edit for edit in edits if edit is not None]
    found = side_effects.side_effects_of(
        model,
        [records[i].rewrite for i in chosen],
        made,
        [(_probability(before[i]), _probability(after[i])) for i in chosen],
        texts=texts,
        before=side_effects.predict_texts(model, texts),
    )
    told: list[Mapping[str, Any] | None] = [None] * len(edits)
    for i, edit, each in zip(chosen, made, found, strict=True):
        exact = {name: edit.notes[name] for name in ("residual", "rounding") if name in edit.notes}
        if "rounding" not in exact and any(model.weight(name).dtype.itemsize < 4 for name in edit.weights):
            exact["rounding"] = edit.rounding(model)
        told[i] = {**each.as_dict(), "relative_norm": edit.relative_norm(model), **exact}
    return told


def _probability(scores: _RecordScores) -> float:
    """Probability of the new object after the bare prompt."""
    return math.exp(scores.answers["rewrite"][0][0].total)


def _result(
    task: Task,
    record: Case,
    made: Edit | ErrataError | None,
    scores: _RecordScores,
    texts: tuple[str, ...],
    effects: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    measures: Measures,
) -> Result:
    if isinstance(made, ErrataError):
        return Result(record.case_id, None, error=str(made), seconds={"edit": seconds["edit"]})
    return Result(
        record.case_id,
        scores.answers,
        texts=texts,
        entropy=generation_entropy(as_scored(texts)) if texts else None,
        reference=_similarity(task, record, texts, measures),
        essence=scores.essence,
        health=effects,
        seconds=seconds,
    )


def _similarity(task: Task, record: Any, texts: Sequence[str], measures: Measures) -> float | None:
    if not texts or measures.snippets is None or measures.tfidf is None or not task.snippets:
        return None
    references = [each.text for each in measures.snippets.of(record)]
    return measures.tfidf.reference_score(as_scored(texts), references) if references else None
