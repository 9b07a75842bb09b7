"""Edits that contradict each other: they give the same prompt different objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from errata.base.facts import Rewrite
from errata.edits.content import Content


class ContradictoryEdits(UserWarning):
    """Warning: two edits give one prompt different objects. The later wins if it was made on top of the earlier."""


def contradiction(earlier: Content, later: Content) -> tuple[Rewrite, Rewrite] | None:
    """The first two rewrites that give one filled prompt different objects; None if there are none."""
    wanted = {rewrite.text: rewrite for rewrite in earlier.rewrites}
    for rewrite in later.rewrites:
        other = wanted.get(rewrite.text)
        if other is not None and other.new_object != rewrite.new_object:
            return other, rewrite
    return None


def warn_of_contradictions(earlier: Iterable[Content], later: Content) -> None:
    """Issue a `ContradictoryEdits` warning for each earlier edit that the later one contradicts."""
    for edit in earlier:
        if found := contradiction(edit, later):
            old, new = found
            warnings.warn(
                f"{later} contradicts {edit}, which comes before it: {new.text!r} was to go on with "
                f"{old.new_object!r}, now with {new.new_object!r}. Made one after the other, the later one wins; made "
                "for the same weights, they mix. Take the earlier one off if it is no longer wanted",
                ContradictoryEdits,
                stacklevel=4,
            )
