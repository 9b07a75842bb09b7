"""Floor 2: edits as values: what changes in which weight, where it came from, how it goes on and off."""

from errata.edits.delta import Delta, Dense, RankOne
from errata.edits.edit import Edit

__all__ = ["Delta", "Dense", "Edit", "RankOne"]
