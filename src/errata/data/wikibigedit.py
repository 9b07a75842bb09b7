"""WikiBigEdit: facts of Wikidata as flat entries of a question, its answer, a rephrasing, and a question to keep.

| key | is |
|---|---|
| `subject`, `prompt` | the subject of the question, and the question |
| `target_new` | the answer that the model should give |
| `rephrase_prompt` | the question in other words; one, or a list |
| `locality_prompt`, `locality_ground_truth` | a question of something else and its answer; one, or a list of each |
| `separator` | white space between questions and answers, if the text does not decide it |
| `case_id` | number of the record; by default its position in the file, from 0 |

Entries with an old object (`ground_truth`) are CounterFact's flat schema, which compares the two objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.base.errors import FactError
from errata.base.facts import Fact
from errata.data.entries import case_id, require_keys, text_in, texts_in
from errata.data.fact_table import separator_in, with_slot
from errata.data.records import WikiBigEditRecord


def wikibigedit_record(entry: Mapping[str, Any], place: int) -> WikiBigEditRecord:
    """A record from an entry; `place` is its number if it has no `case_id`.

    Raises:
        FactError: if it makes none.
    """
    require_keys(
        entry, "subject", "prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"
    )
    subject = text_in(entry, "subject")
    fact = Fact(subject, with_slot(subject, text_in(entry, "prompt")), separator=separator_in(entry))
    others, answers = texts_in(entry, "locality_prompt"), texts_in(entry, "locality_ground_truth")
    if len(others) != len(answers):
        raise FactError(f"it has {len(others)} locality_prompt and {len(answers)} locality_ground_truth: one for each")
    return WikiBigEditRecord(
        case_id({"case_id": place, **entry}),
        fact.rewrite(text_in(entry, "target_new")),
        texts_in(entry, "rephrase_prompt"),
        tuple(zip(others, answers, strict=True)),
    )
