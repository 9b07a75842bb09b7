"""CounterFact: tests whether the new object beats the old one, also in paraphrases, and whether other facts stay.

A prompt's score compares P[o*] of the new object with P[oᶜ] of the old one. P is, by name,

- `per_token`: exp of the mean log-probability per token (the published code, and the numbers of the paper's tables),
- `total`: the probability of the whole object (the paper's wording); for objects of one token they are the same.

Means are over a record's prompts, then over records. All numbers are fractions here; tables multiply by 100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from errata.base.autocast import without_autocast
from errata.data.counterfact import flat_record, nested_record
from errata.data.records import Record
from errata.metrics.requests import Request
from errata.models.model import Model
from errata.models.scoring import Score, score
from errata.tasks.task import Column, Measurement, PaperRows, Probability, Schema, Scored, Task, Training, Value


def _prompts(record: Record) -> dict[str, tuple[Request, ...]]:
    """Every prompt with the new and the old object."""
    targets, separator = (record.rewrite.new_object, record.rewrite.fact.object), record.rewrite.separator
    kinds = {
        "rewrite": (record.rewrite.text,),
        "paraphrase": record.paraphrase,
        "neighborhood": record.neighborhood,
        "attribute": record.attribute,
    }
    return {kind: tuple(Request(text, targets, separator) for text in texts) for kind, texts in kinds.items()}


def probability_of(score: Score, probability: Probability) -> float:
    """The probability of a target, per token or in total."""
    log = score.mean if probability == "per_token" else score.total
    return 0.0 if math.isnan(log) else math.exp(log)  # a broken model's NaN is not probable


def _gains(answers: Scored | None, kind: str, probability: Probability) -> list[float]:
    """P[o*] − P[oᶜ] after each prompt of a kind; of neighbourhood prompts P[oᶜ] − P[o*]."""
    sign = -1 if kind == "neighborhood" else 1
    pairs = answers[kind] if answers else ()
    return [sign * (probability_of(new, probability) - probability_of(old, probability)) for new, old in pairs]


def _share(kind: str) -> Value:
    """Share of the prompts of a kind that go the right way."""

    def value(measurement: Measurement, probability: Probability) -> float | None:
        gains = _gains(measurement.answers, kind, probability)
        return fmean(gain > 0 for gain in gains) if gains else None

    return value


def _difference(kind: str) -> Value:
    """Mean difference of the two probabilities after the prompts of a kind."""

    def value(measurement: Measurement, probability: Probability) -> float | None:
        gains = _gains(measurement.answers, kind, probability)
        return fmean(gains) if gains else None

    return value


_COLUMNS = (
    Column(
        "s",
        "S",
        "Score",
        "harmonic mean of ES, PS and NS",
        harmonic=("es", "ps", "ns"),
        fails="below unedited",
    ),
    Column("es", "ES", "Efficacy", "rewrite prompts with P[o*] > P[oᶜ]", _share("rewrite"), fails="below half"),
    Column(
        "em",
        "EM",
        "Efficacy",
        "P[o*] − P[oᶜ] after rewrite prompts",
        _difference("rewrite"),
        "points",
        fails="below zero",
        axis="difference",
    ),
    Column("ps", "PS", "Generalization", "paraphrases with P[o*] > P[oᶜ]", _share("paraphrase"), fails="below half"),
    Column(
        "pm",
        "PM",
        "Generalization",
        "P[o*] − P[oᶜ] after paraphrases",
        _difference("paraphrase"),
        "points",
        fails="below zero",
        axis="difference",
    ),
    Column(
        "ns",
        "NS",
        "Specificity",
        "neighborhood prompts with P[oᶜ] > P[o*]",
        _share("neighborhood"),
        fails="below half",
    ),
    Column(
        "nm",
        "NM",
        "Specificity",
        "P[oᶜ] − P[o*] after neighborhood prompts",
        _difference("neighborhood"),
        "points",
        fails="below zero",
        axis="difference",
    ),
    Column(
        "ge",
        "GE",
        "Fluency",
        "entropy of bi- and trigrams of generated texts",
        lambda measurement, probability: measurement.entropy,
        "bits × 100",
        fails="below 95 %",
        axis="range",
    ),
    Column(
        "rs",
        "RS",
        "Consistency",
        "cosine of TF-IDF vectors of generated and reference texts",
        lambda measurement, probability: measurement.reference,
        "× 100",
        fails="below unedited",
        axis="range",
    ),
    Column("ats", "AS", "Attribute", "attribute prompts with P[o*] > P[oᶜ]", _share("attribute"), own=True),
    Column(
        "atm",
        "AM",
        "Attribute",
        "P[o*] − P[oᶜ] after attribute prompts",
        _difference("attribute"),
        "points",
        own=True,
        axis="difference",
    ),
    Column(
        "essence",
        "Essence",
        "Essence",
        "perplexity of what is known of the subject",
        lambda measurement, probability: measurement.essence,
        "perplexity",
        1,
        own=True,
        fails="above twice",
        lower_is_better=True,
        axis="log",
    ),
)

# K. Meng, D. Bau, A. Andonian, Y. Belinkov: Locating and Editing Factual Associations in GPT, NeurIPS 2022, Table 2.
_TABLE_2 = ("s", "es", "em", "ps", "pm", "ns", "nm", "ge", "rs")
_PAPER: Mapping[str, PaperRows] = {
    "gpt2-xl": PaperRows(
        7_500,
        _TABLE_2,
        {
            "": (30.5, 22.2, -4.8, 24.7, -5.0, 78.1, 5.0, 626.6, 31.9),
            "FT": (65.1, 100.0, 98.8, 87.9, 46.6, 40.4, -6.2, 607.1, 40.5),
            "FT+L": (66.9, 99.1, 91.5, 48.7, 28.9, 70.3, 3.5, 621.4, 37.4),
            "KN": (35.6, 28.7, -3.4, 28.0, -3.3, 72.9, 3.7, 570.4, 30.3),
            "KE": (52.2, 84.3, 33.9, 75.4, 14.6, 30.9, -11.0, 586.6, 31.2),
            "KE-CF": (18.1, 99.9, 97.0, 95.8, 59.2, 6.9, -63.2, 383.0, 24.5),
            "MEND": (57.9, 99.1, 70.9, 65.4, 12.2, 37.9, -11.6, 624.2, 34.8),
            "MEND-CF": (14.9, 100.0, 99.2, 97.0, 65.6, 5.5, -69.9, 570.0, 33.2),
            "ROME": (89.2, 100.0, 97.9, 96.4, 62.7, 75.4, 4.2, 621.9, 41.9),
        },
    ),
    "gpt-j-6b": PaperRows(
        2_000,
        _TABLE_2,
        {
            "": (23.6, 16.3, -7.2, 18.6, -7.4, 83.0, 7.3, 621.8, 29.8),
            "FT": (25.5, 100.0, 99.9, 96.6, 71.0, 10.3, -50.7, 387.8, 24.6),
            "FT+L": (68.7, 99.6, 95.0, 47.9, 30.4, 78.6, 6.8, 622.8, 35.5),
            "MEND": (63.2, 97.4, 71.5, 53.6, 11.0, 53.9, -6.0, 620.5, 32.6),
            "ROME": (91.5, 99.9, 99.4, 99.1, 74.1, 78.9, 5.2, 620.1, 43.0),
        },
    ),
}


COUNTERFACT = Task(
    name="counterfact",
    title="CounterFact",
    record=Record,
    schemas=(
        Schema(
            "nested",
            frozenset({"paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"}),
            lambda entry, place: nested_record(entry),
        ),
        Schema("flat", frozenset({"rephrase_prompt", "locality_prompt"}), flat_record),
    ),
    prompts=_prompts,
    columns=_COLUMNS,
    training=lambda record: Training(
        (record.rewrite.text, *record.paraphrase),
        tuple((prompt, record.rewrite.fact.object) for prompt in record.neighborhood),
    ),
    relation=lambda record: record.relation,
    generation=lambda record: record.generation,
    titles={
        "rewrite": "Rewrite",
        "paraphrase": "Paraphrases",
        "neighborhood": "Neighborhood: other subjects that keep the old object",
        "attribute": "Attribute: other subjects that have the new object",
    },
    preferred={"neighborhood": 1},
    files=("counterfact.json", "multi_counterfact.json"),
    parts={
        "subjects": lambda r: (r.rewrite.subject,),
        "objects": lambda r: (r.rewrite.fact.object,),
        "new objects": lambda r: (r.rewrite.new_object,),
        "counterfactual statements": lambda r: ((r.rewrite.text, r.rewrite.new_object),),
        "rewrite prompts": lambda r: (r.rewrite.text,),
        "paraphrase prompts": lambda r: r.paraphrase,
        "neighborhood prompts": lambda r: r.neighborhood,
        "attribute prompts": lambda r: r.attribute,
        "generation prompts": lambda r: r.generation,
    },
    paper=_PAPER,
    snippets=True,
)


@without_autocast
def score_record(model: Model, record: Record, probability: Probability = "per_token") -> dict[str, float | None]:
    """A record's numbers on the model in its current state, computed alone and without sharing work.

    Raises:
        FactError: if a prompt or an object cannot be scored.
    """
    asked = COUNTERFACT.requests(record)
    each = [(request.prompt, target, request.separator) for request in asked for target in request.targets]
    flat = score(model, *map(list, zip(*each, strict=True)))
    answers = COUNTERFACT.scored(record, list(zip(flat[::2], flat[1::2], strict=True)))
    return COUNTERFACT.numbers(_Scored(answers), probability)


@dataclass(frozen=True)
class _Scored:
    """A measurement of answers alone."""

    answers: Scored
    texts: tuple[str, ...] = ()
    entropy: float | None = None
    reference: float | None = None
    essence: float | None = None
