"""WikiBigEdit: facts of Wikidata, scored like zsRE; its entries are described in `errata.data.wikibigedit`."""

from __future__ import annotations

from errata.data.records import WikiBigEditRecord
from errata.data.wikibigedit import wikibigedit_record
from errata.tasks import questions
from errata.tasks.task import Schema, Task

WIKIBIGEDIT = Task(
    name="wikibigedit",
    title="WikiBigEdit",
    record=WikiBigEditRecord,
    schemas=(
        Schema(
            "questions",
            frozenset({"rephrase_prompt", "locality_prompt"}),
            wikibigedit_record,
            needs=frozenset({"locality_ground_truth"}),
            lacks=frozenset({"ground_truth"}),
        ),
    ),
    prompts=questions.prompts,
    columns=questions.COLUMNS,
    training=questions.training,
    titles=questions.TITLES,
    files=("wikibigedit.json",),
    parts=questions.PARTS,
)
