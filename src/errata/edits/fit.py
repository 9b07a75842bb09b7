"""The weights that an edit changes in a model, with a check of shapes."""

from __future__ import annotations

from collections.abc import Iterable

from errata.base.errors import EditMismatch, ErrataError, UnsupportedModel
from errata.edits.content import Content
from errata.edits.delta import Delta
from errata.models import weights
from errata.models.model import Model


def changes_in(model: Model, edit: Content) -> dict[str, list[Delta]]:
    """The deltas of each weight, by its name in the model. Two names of one tied weight count as one.

    Raises:
        EditMismatch: if the model lacks a weight, or a change has another shape.
    """
    names: dict[int, str] = {}
    changes: dict[str, list[Delta]] = {}
    for delta in edit.deltas:
        try:
            weight, shape = model.weight(delta.weight), tuple(weights.matrix(model, delta.weight).shape)
        except ErrataError as error:
            raise EditMismatch(f"{edit} does not fit {model.name!r}: {error}. {made_for(edit)}") from error
        if shape != delta.shape:
            raise EditMismatch(
                f"{edit} does not fit {model.name!r}: {delta.weight} is {list(shape)} as [d_out, d_in], "
                f"the change is {list(delta.shape)}. {made_for(edit)}"
            )
        changes.setdefault(names.setdefault(id(weight), delta.weight), []).append(delta)
    return changes


def made_for(edit: Content) -> str:
    """Advice for an edit that was made for another model: how to load that one."""
    own = edit.source.get("hub") or edit.source.get("path") or edit.model
    named = edit.model if edit.model == "atlas" else own
    return f"Load the model that it was made for: --model {named}, or load_model({named!r})"


def layout_of(model: Model, deltas: Iterable[Delta]) -> dict[str, list[str]]:
    """The changed weights that the model stores transposed or shares between modules."""
    names = sorted({delta.weight for delta in deltas})
    parameters = list(model.hf.named_parameters(remove_duplicate=False))
    layout = {
        "transposed": [name for name in names if _is_transposed(model, name)],
        "shared": [n for n in names if any(p is model.weight(n) and other != n for other, p in parameters)],
    }
    return {kind: touched for kind, touched in layout.items() if touched}


def _is_transposed(model: Model, name: str) -> bool:
    try:
        weight = model.weight(name)
        return weight.dim() == 2 and weights.matrix(model, name).stride() != weight.stride()
    except UnsupportedModel:  # no linear map: `apply` says so
        return False
