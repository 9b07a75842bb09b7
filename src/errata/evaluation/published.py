"""The rows of the paper's Tables 1 and 2, to stand beside one's own.

K. Meng, D. Bau, A. Andonian, Y. Belinkov: Locating and Editing Factual Associations in GPT. NeurIPS 2022. Numbers are
as printed, × 100; the paper's intervals are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

UNEDITED = ""

_TABLE_1 = ("efficacy", "paraphrase", "specificity")
_TABLE_2 = ("s", "es", "em", "ps", "pm", "ns", "nm", "ge", "rs")

ROWS: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("zsre", "gpt2-xl"): {
        UNEDITED: (22.2, 21.3, 24.2),
        "FT": (99.6, 82.1, 23.2),
        "FT+L": (92.3, 47.2, 23.4),
        "KE": (65.5, 61.4, 24.9),
        "KE-zsRE": (92.4, 90.0, 23.8),
        "MEND": (75.9, 65.3, 24.1),
        "MEND-zsRE": (99.4, 99.3, 24.1),
        "ROME": (99.8, 88.1, 24.2),
    },
    ("counterfact", "gpt2-xl"): {
        UNEDITED: (30.5, 22.2, -4.8, 24.7, -5.0, 78.1, 5.0, 626.6, 31.9),
        "FT": (65.1, 100.0, 98.8, 87.9, 46.6, 40.4, -6.2, 607.1, 40.5),
        "FT+L": (66.9, 99.1, 91.5, 48.7, 28.9, 70.3, 3.5, 621.4, 37.4),
        "KN": (35.6, 28.7, -3.4, 28.0, -3.3, 72.9, 3.7, 570.4, 30.3),
        "KE": (52.2, 84.3, 33.9, 75.4, 14.6, 30.9, -11.0, 586.6, 31.2),
        "KE-CF": (18.1, 99.9, 97.0, 95.8, 59.2, 6.9, -63.2, 383.0, 24.5),
        "MEND": (57.9, 99.1, 70.9, 65.4, 12.2, 37.9, -11.6, 624.2, 34.8),
        "MEND-CF": (14.9, 100.0, 99.2, 97.0, 65.6, 5.5, -69.9, 570.0, 33.2),
        "ROME": (89.2, 100.0, 97.9, 96.4, 62.7, 75.4, 4.2, 621.9, 41.9),
    },
    ("counterfact", "gpt-j-6b"): {
        UNEDITED: (23.6, 16.3, -7.2, 18.6, -7.4, 83.0, 7.3, 621.8, 29.8),
        "FT": (25.5, 100.0, 99.9, 96.6, 71.0, 10.3, -50.7, 387.8, 24.6),
        "FT+L": (68.7, 99.6, 95.0, 47.9, 30.4, 78.6, 6.8, 622.8, 35.5),
        "MEND": (63.2, 97.4, 71.5, 53.6, 11.0, 53.9, -6.0, 620.5, 32.6),
        "ROME": (91.5, 99.9, 99.4, 99.1, 74.1, 78.9, 5.2, 620.1, 43.0),
    },
}
RECORDS = {("zsre", "gpt2-xl"): 10_000, ("counterfact", "gpt2-xl"): 7_500, ("counterfact", "gpt-j-6b"): 2_000}


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    Attributes:
        editor: as the paper writes it; "" of the unedited model.
        records: how many it is over, the first by case id.
        numbers: by the names that they have in `evaluation.results` ("s" for S), as printed, × 100.
    """

    editor: str
    records: int
    numbers: Mapping[str, float]


def published(kind: str, model: str, editor: str = UNEDITED) -> Published | None:
    """The paper's row of a model and an editor; None if it has none.

    Args:
        kind: "counterfact" or "zsre".
        model: a name, hub id or folder whose last part is what the paper's models are called: gpt2-xl, gpt-j-6b.
        editor: its name, or that of the row. Case and signs do not matter, so that "ft_l" is FT+L.
    """
    block = kind, re.split(r"[/\\]", model.rstrip("/\\"))[-1].casefold()
    rows = {_plain(each): each for each in ROWS.get(block, ())}
    found = rows.get(_plain(editor))
    if found is None or bool(found) != bool(editor):
        return None
    numbers = zip(_TABLE_1 if kind == "zsre" else _TABLE_2, ROWS[block][found], strict=True)
    return Published(found, RECORDS[block], dict(numbers))


def beside(kind: str, model: str, rows: Mapping[str, str]) -> dict[str, Published]:
    """The paper's rows to stand beside one's own, each once: by the row's name, or else by its editor's.

    Args:
        kind, model: as of `published`.
        rows: by the names of rows, in order, those of their editors; "" where it is not known.
    """
    found: dict[str, Published] = {}
    for row, name in [*((row, row) for row in rows), *rows.items()]:
        paper = published(kind, model, name) if name else None
        if row not in found and paper and paper not in found.values():
            found[row] = paper
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
