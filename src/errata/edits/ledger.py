"""The ledger: the edits that are applied to a model, with their contradictions; and the merged model on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.facts import Rewrite
from errata.edits.contradictions import ContradictoryEdits, contradiction
from errata.edits.edit import Edit
from errata.edits.stack import Stack
from errata.models.model import Model
from errata.models.saving import save_pretrained

__all__ = ["AppliedEdit", "ContradictoryEdits", "ledger", "save_merged"]


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
    """The edits that are applied to the model now, in order of application."""
    edits = [cast(Edit, entry.edit) for entry in Stack(model).entries]
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


@checked(model="Model")
@without_autocast
def save_merged(model: Model, folder: str | Path) -> None:
    """Write the model with its applied edits atomically, as a folder that `from_pretrained` loads.

    Beside weights, config and tokenizer there is errata.json, which names model and edits.

    Raises:
        OutputError: if the folder holds something already, or cannot be written.
    """
    save_pretrained(model, folder, {"model": model.name, "edits": [_summary(line.edit) for line in ledger(model)]})


def _summary(edit: Edit) -> dict[str, Any]:
    return {
        "id": edit.id,
        "method": edit.method,
        "weights": list(edit.weights),
        "rewrites": [rewrite.as_dict() for rewrite in edit.rewrites],
    }
