"""Floor 2: edits as values: what changes in which weight, where it came from, how it goes on and off."""

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
