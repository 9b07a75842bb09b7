"""From rewrites to edits by a trained network. The model is the same, byte for byte, afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import torch
from pydantic import BeforeValidator
from torch import Tensor

from errata.base import budgets
from errata.base.config import Config
from errata.base.errors import ConfigError, Diverged, ErrataError, FactError
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.editor import Editor
from errata.editors.hypernetworks.files import Trained
from errata.editors.hypernetworks.network import condition
from errata.editors.hypernetworks.objective import Place, changes_of, words_of
from errata.editors.texts import Text, text_of
from errata.edits.delta import LowRank
from errata.edits.edit import Edit
from errata.models.model import Model

# Rewrites that go through the network together.
_MOST = 16


def _name(value: object) -> object:
    """A folder may have a number for its name."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class TrainedConfig(Config):
    """Settings of an editor that was trained.

    Attributes:
        trained: the file, or the folder of its training; errata train-editor writes it.
        scale: the change is multiplied by this.
    """

    trained: Annotated[str, BeforeValidator(_name)]
    scale: float = 1.0


@overload
def trained_edit(model: Model, rewrites: Rewrite, trained: Trained, **settings: Any) -> Edit: ...


@overload
def trained_edit(
    model: Model, rewrites: Sequence[Rewrite], trained: Trained, *, errors: Literal["raise"] = "raise", **settings: Any
) -> list[Edit]: ...


@overload
def trained_edit(
    model: Model, rewrites: Sequence[Rewrite], trained: Trained, *, errors: Literal["keep"], **settings: Any
) -> list[Edit | ErrataError]: ...


def trained_edit(  # type: ignore[misc]  # the other settings are spelt out here alone
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    trained: Trained,
    *,
    scale: float = 1.0,
    errors: Literal["raise", "keep"] = "raise",
) -> Edit | list[Edit] | list[Edit | ErrataError]:
    """The edits that a trained network makes, each as if it were alone.

    Args:
        model: that which it was trained for; left as it is, byte for byte, on errors and interrupts too.
        rewrites: a fact and its new object, or a sequence of such.
        trained: the network.
        scale: the change is multiplied by this.
        errors: "raise" the first; or "keep" each in the place of the edit that could not be made.

    Returns:
        An edit for a rewrite, or a list for a sequence; its deltas are of low rank, one a map.

    Raises:
        EditMismatch: if the network was trained for another model.
        FactError: if a text is too long for the model, nothing is left of the target, or its loss has no gradient.
        Diverged: if a change is no finite number.
    """
    if errors not in ("raise", "keep"):
        raise ConfigError(f"errors is {errors!r}: it is 'raise' or 'keep'")
    one = not isinstance(rewrites, (list, tuple))
    wanted: list[Rewrite] = [rewrites] if one else list(rewrites)  # type: ignore[arg-type,list-item]
    for rewrite in wanted:
        if not isinstance(rewrite, Rewrite):
            raise FactError(
                f"a trained editor takes a Rewrite or a list of them, not a {type(rewrite).__name__}: write "
                "fact.rewrite('Paris')"
            )
    found = _made(model, wanted, trained, trained.require(model), scale, errors)
    return found[0] if one else found  # type: ignore[return-value]


def _made(
    model: Model, wanted: Sequence[Rewrite], trained: Trained, place: Place, scale: float, errors: str
) -> list[Edit | ErrataError]:
    network = trained.network.to(model.device)
    fingerprints = {f"{name}.weight": tensor_digest(model.weight(f"{name}.weight")) for name in place.maps}
    found: dict[int, Edit | ErrataError] = {}
    texts: dict[int, Text] = {}
    for number, rewrite in enumerate(wanted):
        try:
            texts[number] = text_of(model, rewrite.text, rewrite.new_object, rewrite.separator)
        except FactError as error:
            if errors == "raise":
                raise
            found[number] = error
    numbers = list(texts)
    for group in budgets.groups([1] * len(numbers), _MOST):
        share = [numbers[i] for i in group]
        words = [words_of(model, condition(wanted[number])) for number in share]
        with torch.no_grad():
            changes = changes_of(model, network, place, [texts[number] for number in share], words)
        for row, number in enumerate(share):
            parts = {name: each.of(row) for name, each in changes.items()}
            if problem := _no_edit(model, trained.method, wanted[number], list(parts.values())):
                if errors == "raise":
                    raise problem
                found[number] = problem
                continue
            deltas = [
                LowRank(f"{name}.weight", scale * write, read)
                for name, (write, read) in parts.items()
                if write.shape[1]
            ]
            found[number] = Edit.of(
                model,
                deltas,
                trained.method,
                [wanted[number]],
                config={**trained.network.config.model_dump(), "scale": scale},
                notes={"trained_for": trained.model, "card": dict(trained.card)},
                fingerprints={delta.weight: fingerprints[delta.weight] for delta in deltas},
            )
    return [found[number] for number in range(len(wanted))]


def _no_edit(model: Model, method: str, rewrite: Rewrite, parts: Sequence[tuple[Tensor, Tensor]]) -> ErrataError | None:
    """Why what the network made is no edit, if it is none."""
    if not all(bool(each.isfinite().all()) for part in parts for each in part):
        return Diverged(
            f"the change that {method} makes for {rewrite.text!r} is no finite number: the numbers of {model.name} "
            f"overflow in {model.dtype}. Load it with a wider dtype"
        )
    if not any(write.shape[1] for write, _ in parts):
        return FactError(
            f"the loss of {rewrite.new_object!r} after {rewrite.text!r} has no gradient in {model.dtype}, and {method} "
            "makes its change of one: the model says it already, or wants a wider dtype"
        )
    return None


def prepare_mend(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """MEND as an editor of many.

    Args:
        model: that which it was trained for.
        settings: of `TrainedConfig`.
        second_moment: not needed.
        seed: not needed, for nothing here is random.

    Raises:
        ConfigError: if no file is named, or it is another method's.
        ResultFileError: if the file is missing or broken.
        EditMismatch: if it was trained for another model.
    """
    return _prepare("mend", model, settings)


def prepare_ke(model: Model, settings: Mapping[str, Any], second_moment: object, seed: int) -> Editor:
    """KE as an editor of many. As `prepare_mend`."""
    return _prepare("ke", model, settings)


def _prepare(method: str, model: Model, settings: Mapping[str, Any]) -> Editor:
    if "trained" not in settings:
        raise ConfigError(
            f"{method!r} is an editor that is trained: train one for {model.name} by errata train-editor {method}, and "
            f"name it, as in {method}:trained=FOLDER"
        )
    config = TrainedConfig(**settings)
    path = Path(config.trained)
    trained = Trained.load(path / "editor.safetensors" if path.is_dir() else path)
    if trained.method != method:
        raise ConfigError(f"{path} holds a trained {trained.method!r}, not {method!r}: evaluate it by its name")
    place = trained.require(model)
    digests = {name: tensor_digest(each) for name, each in trained.network.state_dict().items()}
    told = {**trained.header(), "scale": config.scale, "weights": digests}
    told.pop("versions")
    return Editor(method, told, partial(_make, trained=trained, place=place, scale=config.scale), trained.seen)


def _make(
    model: Model, rewrites: Sequence[Rewrite], *, trained: Trained, place: Place, scale: float
) -> list[Edit | ErrataError]:
    return _made(model, list(rewrites), trained, place, scale, "keep")
