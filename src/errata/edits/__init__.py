"""Floor 2: edits as objects: changes of weights, their origin, and how they are applied and undone."""

from errata.edits.delta import Delta, Dense, LowRank, RankOne
from errata.edits.edit import Edit
from errata.edits.ledger import AppliedEdit, ContradictoryEdits, ledger, save_merged

__all__ = [
    "AppliedEdit",
    "ContradictoryEdits",
    "Delta",
    "Dense",
    "Edit",
    "LowRank",
    "RankOne",
    "ledger",
    "save_merged",
]
