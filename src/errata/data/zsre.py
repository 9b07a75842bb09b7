"""zsRE records from the schema of MEND's file, made in the same way as in ROME's published code.

| key | is |
|---|---|
| `subject` | what the question is about |
| `src` | the question, with the subject in it, once |
| `answers` | a list; the first is the new answer |
| `rephrase` | the question in other words; one, or a list |
| `separator` | white space between questions and answers, if the text does not decide it |
| `loc`, `loc_ans` | a question of something else, without its question mark, and its answer |

Other keys are not read: `alt`, a wrong answer, and `pred`, some model's answer. Records have no numbers, so `case_id`
is the position in the file, from 0. `loc` gets its question mark here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.base.errors import FactError
from errata.base.facts import SLOT, Fact
from errata.data.entries import require_keys, text_in, texts_in
from errata.data.fact_table import separator_in, shortened
from errata.data.records import ZsreRecord


def zsre_record(entry: Mapping[str, Any], number: int) -> ZsreRecord:
    """A record from an entry of MEND's schema.

    Raises:
        FactError: if it makes none.
    """
    require_keys(entry, "subject", "src", "answers", "rephrase", "loc", "loc_ans")
    subject, question = text_in(entry, "subject"), text_in(entry, "src")
    place = question.find(subject)
    if place < 0 or place != question.rfind(subject):
        raise FactError(f"its subject {shortened(subject)} does not stand in src {shortened(question)} exactly once")
    answers = texts_in(entry, "answers")
    if not answers:
        raise FactError("its answers are an empty list: the first one is what the model is to answer")
    return ZsreRecord(
        number,
        Fact(
            subject, question[:place] + SLOT + question[place + len(subject) :], separator=separator_in(entry)
        ).rewrite(answers[0]),
        texts_in(entry, "rephrase"),
        ((text_in(entry, "loc") + "?", text_in(entry, "loc_ans").strip()),),
    )
