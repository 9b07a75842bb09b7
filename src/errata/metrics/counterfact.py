"""CounterFact's metrics: efficacy, paraphrase and neighborhood, as scores and as magnitudes.

A prompt is scored by P[o*] against P[oᶜ], new object and old. P is, by name,

- `per_token`: exp of the mean log-probability per token (the published code, and the numbers of the paper's tables),
- `total`: the probability of the whole object (the paper's words); for objects of one token they are the same.

- ES, PS: share of rewrite and paraphrase prompts with P[o*] > P[oᶜ]; EM, PM: mean of P[o*] − P[oᶜ].
- NS: share of neighborhood prompts with P[oᶜ] > P[o*]; NM: mean of P[oᶜ] − P[o*].
- AS, AM: of attribute prompts, whose subjects have the new object, as ES and EM. The paper reports none.
- S: harmonic mean of ES, PS and NS.

Means are over a record's prompts, then over records. Everything is a fraction here; tables multiply by 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from errata.base.autocast import without_autocast
from errata.benchmarks.records import Record
from errata.metrics.asking import Answers, Question
from errata.metrics.summary import Estimate, Method, estimate, harmonic_score
from errata.models.model import Model
from errata.models.scoring import Score, score

KINDS = ("rewrite", "paraphrase", "neighborhood", "attribute")
Probability = Literal["per_token", "total"]


@dataclass(frozen=True)
class RecordAnswers:
    """What a model says to a record's prompts: of each kind, the scores of new and old object after each prompt."""

    rewrite: tuple[Answers, ...]
    paraphrase: tuple[Answers, ...]
    neighborhood: tuple[Answers, ...]
    attribute: tuple[Answers, ...]


@dataclass(frozen=True)
class RecordScores:
    """One record's numbers on one model; NaN where the record has no such prompts.

    Attributes:
        es, ps, ns, ats: shares of rewrite, paraphrase, neighborhood and attribute prompts that go the right way.
        em, pm, nm, atm: mean differences of probabilities, in the right way.
    """

    es: float
    em: float
    ps: float
    pm: float
    ns: float
    nm: float
    ats: float
    atm: float


def questions(record: Record) -> list[Question]:
    """What a record asks, in the order of `KINDS`: every prompt with new and old object.

    Raises:
        FactError: if the record has no old object.
    """
    targets = record.rewrite.new_object, record.rewrite.fact.object
    prompts = (record.rewrite.text, *record.paraphrase, *record.neighborhood, *record.attribute)
    return [Question(prompt, targets, record.rewrite.separator) for prompt in prompts]


def answered(record: Record, answers: Sequence[Answers]) -> RecordAnswers:
    """The answers to `questions`, by kind."""
    counts = 1, len(record.paraphrase), len(record.neighborhood), len(record.attribute)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return RecordAnswers(*(tuple(answers[end - n : end]) for end, n in zip(ends, counts, strict=True)))


def record_scores(said: RecordAnswers, probability: Probability = "per_token") -> RecordScores:
    """A record's numbers from what a model says to its prompts."""

    def gains(kind: tuple[Answers, ...], sign: int = 1) -> tuple[float, float]:
        if not kind:
            return math.nan, math.nan
        found = [sign * (_probability(new, probability) - _probability(old, probability)) for new, old in kind]
        return fmean(gain > 0 for gain in found), fmean(found)

    return RecordScores(
        *gains(said.rewrite), *gains(said.paraphrase), *gains(said.neighborhood, -1), *gains(said.attribute)
    )


@without_autocast
def score_record(model: Model, record: Record, probability: Probability = "per_token") -> RecordScores:
    """Score one record on the model as it stands, by itself and in the plain way.

    Raises:
        FactError: if a prompt or an object cannot be scored.
    """
    asked = questions(record)
    each = [(question.prompt, target, question.separator) for question in asked for target in question.targets]
    flat = score(model, *map(list, zip(*each, strict=True)))
    return record_scores(answered(record, list(zip(flat[::2], flat[1::2], strict=True))), probability)


def summarise(scores: Sequence[RecordScores], method: Method = "normal") -> dict[str, Estimate]:
    """Means over records of each number, with 95 % intervals, and `s` from the means of ES, PS and NS."""
    columns = {name: [getattr(each, name) for each in scores] for name in RecordScores.__dataclass_fields__}
    s = harmonic_score({name: columns[name] for name in ("es", "ps", "ns")}, method)
    return {"s": s, **{name: estimate(values, method) for name, values in columns.items()}}


def _probability(said: Score, kind: Probability) -> float:
    log = said.mean if kind == "per_token" else said.total
    return 0.0 if math.isnan(log) else math.exp(log)  # what a broken model says is not probable
