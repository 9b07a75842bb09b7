"""zsRE's metrics: the share of target tokens that are the most probable ones under teacher forcing.

| number | of | paper's Table 1 |
|---|---|---|
| efficacy | the edited question and its new answer | Efficacy |
| paraphrase | the same question in other words | Paraphrase |
| specificity | a question of something else and its answer | Specificity |

Of a record, all tokens of a kind's targets count alike; then the mean over records. Fractions; tables multiply by 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errata.benchmarks.records import ZsreRecord
from errata.metrics.asking import Answers, Question

KINDS = ("rewrite", "paraphrase", "locality")


@dataclass(frozen=True)
class ZsreAnswers:
    """What a model says to a record's questions: of each kind, the score of its one target after each."""

    rewrite: tuple[Answers, ...]
    paraphrase: tuple[Answers, ...]
    locality: tuple[Answers, ...]


@dataclass(frozen=True)
class ZsreScores:
    """One record's numbers on one model; NaN where the record has no such questions."""

    efficacy: float
    paraphrase: float
    specificity: float


def questions(record: ZsreRecord) -> list[Question]:
    """What a record asks, in the order of `KINDS`."""
    new, between = (record.rewrite.new_object,), record.rewrite.separator
    own = [Question(prompt, new, between) for prompt in (record.rewrite.text, *record.paraphrase)]
    return own + [Question(prompt, (answer,), between) for prompt, answer in record.locality]


def answered(record: ZsreRecord, answers: Sequence[Answers]) -> ZsreAnswers:
    """The answers to `questions`, by kind."""
    end = 1 + len(record.paraphrase)
    return ZsreAnswers(tuple(answers[:1]), tuple(answers[1:end]), tuple(answers[end:]))


def record_scores(said: ZsreAnswers) -> ZsreScores:
    """A record's numbers from what a model says to its questions."""
    return ZsreScores(_hits(said.rewrite), _hits(said.paraphrase), _hits(said.locality))


def _hits(kind: Sequence[Answers]) -> float:
    tokens = sum(each.n_tokens for one in kind for each in one)
    return sum(each.hits for one in kind for each in one) / tokens if tokens else math.nan
