"""What is on a model: every applied edit, in order, and which of them contradict each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.facts import Rewrite
from errata.models.saving import save_pretrained

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.models.model import Model


class ContradictoryEdits(UserWarning):
    """Two edits give the same prompt another object: the later wins if made with the earlier on, else they mix."""


@dataclass(frozen=True)
class AppliedEdit:
    """A line of the ledger.

    Attributes:
        place: 1 for the edit that was applied first.
        edit: the edit.
        weights: names of the weights that it changes.
        rewrites: the facts that it rewrites.
        contradicts: places of the earlier edits that give one of its prompts another object.
    """

    place: int
    edit: Edit
    weights: tuple[str, ...]
    rewrites: tuple[Rewrite, ...]
    contradicts: tuple[int, ...]


@checked(model="Model")
def ledger(model: Model) -> tuple[AppliedEdit, ...]:
    """The edits that are on the model now, in the order in which they were applied."""
    edits: list[Edit] = [entry.edit for entry in model.applied]
    return tuple(
        AppliedEdit(
            place=place,
            edit=edit,
            weights=edit.weights,
            rewrites=edit.rewrites,
            contradicts=tuple(i for i, other in enumerate(edits[: place - 1], 1) if contradiction(other, edit)),
        )
        for place, edit in enumerate(edits, 1)
    )


def contradiction(earlier: Edit, later: Edit) -> tuple[Rewrite, Rewrite] | None:
    """The first two rewrites that give one prompt, subject in its place, different objects; None if none do."""
    wanted = {rewrite.text: rewrite for rewrite in earlier.rewrites}
    for rewrite in later.rewrites:
        other = wanted.get(rewrite.text)
        if other is not None and other.new_object != rewrite.new_object:
            return other, rewrite
    return None


def warn_of_contradictions(earlier: Iterable[Edit], later: Edit) -> None:
    """A `ContradictoryEdits` for each of the earlier edits that the later one contradicts."""
    for edit in earlier:
        if found := contradiction(edit, later):
            old, new = found
            warnings.warn(
                f"{later} contradicts {edit}, which comes before it: {new.text!r} was to go on with "
                f"{old.new_object!r}, now with {new.new_object!r}. Made one after the other, the later one wins; made "
                "for the same weights, they mix. Take "
                "the earlier one off if it is no longer wanted",
                ContradictoryEdits,
                stacklevel=4,
            )


@checked(model="Model")
@without_autocast
def save_merged(model: Model, folder: str | Path) -> None:
    """Write the model with the edits that are on it, whole or not at all: `from_pretrained` loads the folder.

    Beside weights, config and tokenizer there is errata.json, which names model and edits.

    Raises:
        OutputError: if the folder holds something already, or cannot be written.
    """
    save_pretrained(model, folder, {"model": model.name, "edits": [told(line.edit) for line in ledger(model)]})


def told(edit: Edit) -> dict[str, Any]:
    """An edit in a few words, ready for JSON."""
    return {
        "id": edit.id,
        "method": edit.method,
        "weights": list(edit.weights),
        "rewrites": [rewrite.as_dict() for rewrite in edit.rewrites],
    }
