"""CounterFact's metrics: efficacy, paraphrase and neighborhood, as scores and as magnitudes.

A prompt is scored by P[o*] against P[oᶜ], new object and old, each as exp of the mean log-probability per token (the
published code's way; FACTS: the paper speaks of the total probability, which is the same for one-token objects).

- ES, PS: share of rewrite and paraphrase prompts with P[o*] > P[oᶜ]; EM, PM: mean of P[o*] − P[oᶜ].
- NS: share of neighborhood prompts with P[oᶜ] > P[o*]; NM: mean of P[oᶜ] − P[o*].
- S: harmonic mean of ES, PS and NS.

Means are over a record's prompts, then over records. Everything is a fraction here; tables multiply by 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean, stdev

from errata.benchmarks.records import Record
from errata.models.model import Model
from errata.models.scoring import score


@dataclass(frozen=True)
class RecordScores:
    """One record's numbers on one model; NaN where the record has no such prompts.

    Attributes:
        es, ps, ns: shares of prompts that go the right way.
        em, pm, nm: mean differences of probabilities, in the right way.
    """

    es: float
    em: float
    ps: float
    pm: float
    ns: float
    nm: float


@dataclass(frozen=True)
class Mean:
    """A mean over records with the half width of its 95 % interval, 1.96·std/√n; NaN where it has none."""

    mean: float
    interval: float


def score_record(model: Model, record: Record) -> RecordScores:
    """Score one record on the model as it stands."""
    prompts = [record.rewrite.text, *record.paraphrase, *record.neighborhood]
    old, new = record.rewrite.fact.object, record.rewrite.new_object
    scores = score(model, prompts * 2, [new] * len(prompts) + [old] * len(prompts))
    gain = [
        math.exp(n.mean) - math.exp(o.mean) for n, o in zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)
    ]
    paraphrases = gain[1 : 1 + len(record.paraphrase)]
    neighbors = [-g for g in gain[1 + len(record.paraphrase) :]]
    return RecordScores(*_share_and_mean(gain[:1]), *_share_and_mean(paraphrases), *_share_and_mean(neighbors))


def _share_and_mean(gains: Sequence[float]) -> tuple[float, float]:
    if not gains:
        return math.nan, math.nan
    return fmean(g > 0 for g in gains), fmean(gains)


def summarise(scores: Sequence[RecordScores]) -> dict[str, Mean]:
    """Means over records of each number, and `s` from their means."""
    columns = {name: [getattr(s, name) for s in scores] for name in RecordScores.__dataclass_fields__}
    means = {name: _mean([v for v in values if not math.isnan(v)]) for name, values in columns.items()}
    parts = [means[name].mean for name in ("es", "ps", "ns")]
    s = math.nan if any(map(math.isnan, parts)) else harmonic_mean(parts)
    return {"s": Mean(s, math.nan), **means}


def _mean(values: Sequence[float]) -> Mean:
    if not values:
        return Mean(math.nan, math.nan)
    return Mean(fmean(values), 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan)
