"""Question tasks: records of a question, its rephrasings, and questions of other facts, scored by predicted tokens.

| number | share of target tokens that the model ranks first, each after the ones before it |
|---|---|
| efficacy | of the new answer after the edited question |
| paraphrase | of the new answer after the question in other words |
| specificity | of other questions' own answers |

Within a record, all target tokens of a kind count equally; then the mean over records. All numbers are fractions;
tables multiply by 100. zsRE and WikiBigEdit are two such tasks.
"""

from __future__ import annotations

from errata.data.records import QuestionRecord
from errata.metrics.requests import Request
from errata.tasks.task import Column, Measurement, Probability, Training, Value


def prompts(record: QuestionRecord) -> dict[str, tuple[Request, ...]]:
    """The questions of a record, each with its one answer."""
    new, separator = (record.rewrite.new_object,), record.rewrite.separator
    return {
        "rewrite": (Request(record.rewrite.text, new, separator),),
        "paraphrase": tuple(Request(text, new, separator) for text in record.paraphrase),
        "locality": tuple(Request(text, (answer,), separator) for text, answer in record.locality),
    }


def training(record: QuestionRecord) -> Training:
    """Training prompts: the question and its rephrasings should give the answer; other questions should keep theirs."""
    return Training((record.rewrite.text, *record.paraphrase), record.locality)


def hits(kind: str) -> Value:
    """Share of a kind's target tokens that the model ranks first."""

    def value(measurement: Measurement, probability: Probability) -> float | None:
        scores = [score for scores in (measurement.answers or {}).get(kind, ()) for score in scores]
        tokens = sum(score.n_tokens for score in scores)
        return sum(score.hits for score in scores) / tokens if tokens else None

    return value


COLUMNS = (
    Column(
        "efficacy",
        "Efficacy",
        "",
        "target tokens of edited questions that are the most probable",
        hits("rewrite"),
        fails="below half",
    ),
    Column(
        "paraphrase",
        "Paraphrase",
        "",
        "target tokens of paraphrased questions that are the most probable",
        hits("paraphrase"),
        fails="below half",
    ),
    Column(
        "specificity",
        "Specificity",
        "",
        "target tokens of other questions that are the most probable",
        hits("locality"),
        fails="below 95 %",
    ),
)

TITLES = {
    "rewrite": "Edited question",
    "paraphrase": "Paraphrases",
    "locality": "Other questions, which should not move",
}

PARTS = {
    "subjects": lambda r: (r.rewrite.subject,),
    "answers": lambda r: (r.rewrite.new_object,),
    "questions": lambda r: (r.rewrite.text,),
    "paraphrase prompts": lambda r: r.paraphrase,
    "locality prompts": lambda r: r.locality,
}
