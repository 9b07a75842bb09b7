"""Edits from rewrites by a trained network. The model stays unchanged, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from errata.base import budgets
from errata.base.errors import ConfigError, Diverged, ErrataError, FactError
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.config import EditorConfig
from errata.editors.editor import Editor, Progress, Step
from errata.editors.hypernetworks.files import Trained
from errata.editors.hypernetworks.network import condition
from errata.editors.hypernetworks.objective import changes_of, words_of
from errata.editors.method import Method, Setup
from errata.editors.texts import Text, text_of
from errata.edits.delta import LowRank
from errata.edits.edit import Edit
from errata.models.model import Model

# Rewrites that go through the network together.
_MOST = 16


def _name(value: object) -> object:
    """A folder may have a number for its name."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class TrainedConfig(EditorConfig):
    """Settings of an editor that was trained."""

    trained: Annotated[str | None, BeforeValidator(_name)] = Field(
        default=None, description="File of the trained network, or the folder that errata train-editor wrote."
    )
    scale: float = Field(default=1.0, description="Factor by which the change is multiplied.")


def make_editor(method: str, model: Model, config: TrainedConfig, setup: Setup) -> Editor:
    """MEND or KE for the model that it was trained for.

    Raises:
        ConfigError: if the file is another method's.
        ResultFileError: if the file is missing or broken.
        EditMismatch: if it was trained for another model.
    """
    assert config.trained is not None  # required
    path = Path(config.trained)
    trained = Trained.load(path / "editor.safetensors" if path.is_dir() else path)
    if trained.method != method:
        raise ConfigError(f"{path} holds a trained {trained.method!r}, not {method!r}: use it by its name")
    trained.require(model)
    digests = {name: tensor_digest(each) for name, each in trained.network.state_dict().items()}
    told = {**trained.header(), "scale": config.scale, "weights": digests}
    told.pop("versions")
    make = partial(trained_edits, trained=trained, scale=config.scale)
    return Editor(method, told, make, trained_on=trained.trained_on)


def trained_edits(
    model: Model,
    rewrites: Sequence[Rewrite],
    *,
    progress: Progress | None = None,
    trained: Trained,
    scale: float = 1.0,
) -> list[Edit | ErrataError]:
    """The edits of a trained network, each computed independently, with one low-rank delta for each map."""
    place = trained.require(model)
    network = trained.network.to(model.device)
    fingerprints = {f"{name}.weight": tensor_digest(model.weight(f"{name}.weight")) for name in place.maps}
    found: dict[int, Edit | ErrataError] = {}
    texts: dict[int, Text] = {}
    for number, rewrite in enumerate(rewrites):
        try:
            texts[number] = text_of(model, rewrite.text, rewrite.new_object, rewrite.separator)
        except FactError as error:
            found[number] = error
    numbers = list(texts)
    for group in budgets.groups([1] * len(numbers), _MOST):
        share = [numbers[i] for i in group]
        words = [words_of(model, condition(rewrites[number])) for number in share]
        with torch.no_grad():
            changes = changes_of(model, network, place, [texts[number] for number in share], words)
        for row, number in enumerate(share):
            parts = {name: each.of(row) for name, each in changes.items()}
            if problem := _no_edit(model, trained.method, rewrites[number], list(parts.values())):
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
                [rewrites[number]],
                config={**trained.network.config.model_dump(), "scale": scale},
                notes={"trained_for": trained.model, "card": dict(trained.card)},
                fingerprints={delta.weight: fingerprints[delta.weight] for delta in deltas},
            )
            if progress is not None:
                progress(Step(0, 1, None, number, len(rewrites)))
    return [found[number] for number in range(len(rewrites))]


def _no_edit(model: Model, method: str, rewrite: Rewrite, parts: Sequence[tuple[Tensor, Tensor]]) -> ErrataError | None:
    """Why what the network made is not an edit, if it is none."""
    if not all(bool(each.isfinite().all()) for part in parts for each in part):
        return Diverged(
            f"the change that {method} makes for {rewrite.text!r} is not a finite number: the numbers of {model.name} "
            f"overflow in {model.dtype}. Load it with a wider dtype"
        )
    if not any(write.shape[1] for write, _ in parts):
        return FactError(
            f"the loss of {rewrite.new_object!r} after {rewrite.text!r} has no gradient in {model.dtype}, and {method} "
            "makes its change of one: the model says it already, or wants a wider dtype"
        )
    return None


_REQUIRED = {"trained": "the folder that errata train-editor wrote for this model"}

mend = Method(
    name="mend",
    summary="MEND: a network trained for the model turns the gradient's factors into a better change",
    source="Mitchell et al., 2022: Fast Model Editing at Scale",
    config=TrainedConfig,
    make_editor=partial(make_editor, "mend"),
    required=_REQUIRED,
)
ke = Method(
    name="ke",
    summary="KE: a network trained for the model reads the edit as text and masks the gradient",
    source="De Cao et al., 2021: Editing Factual Knowledge in Language Models",
    config=TrainedConfig,
    make_editor=partial(make_editor, "ke"),
    required=_REQUIRED,
)
