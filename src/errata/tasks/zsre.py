"""zsRE, in the schema of MEND's file, scored as the published code of ROME scores it (Table 1 of the paper)."""

from __future__ import annotations

from errata.data.records import ZsreRecord
from errata.data.zsre import zsre_record
from errata.tasks import questions
from errata.tasks.task import PaperRows, Schema, Task

ZSRE = Task(
    name="zsre",
    title="zsRE",
    record=ZsreRecord,
    schemas=(Schema("zsre", frozenset({"src", "loc", "loc_ans"}), zsre_record),),
    prompts=questions.prompts,
    columns=questions.COLUMNS,
    training=questions.training,
    titles=questions.TITLES,
    files=("zsre_mend_eval.json", "zsre.json"),
    parts=questions.PARTS,
    # K. Meng, D. Bau, A. Andonian, Y. Belinkov: Locating and Editing Factual Associations in GPT, NeurIPS 2022.
    paper={
        "gpt2-xl": PaperRows(
            10_000,
            ("efficacy", "paraphrase", "specificity"),
            {
                "": (22.2, 21.3, 24.2),
                "FT": (99.6, 82.1, 23.2),
                "FT+L": (92.3, 47.2, 23.4),
                "KE": (65.5, 61.4, 24.9),
                "KE-zsRE": (92.4, 90.0, 23.8),
                "MEND": (75.9, 65.3, 24.1),
                "MEND-zsRE": (99.4, 99.3, 24.1),
                "ROME": (99.8, 88.1, 24.2),
            },
        )
    },
)
