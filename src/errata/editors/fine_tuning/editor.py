"""Fine-tuning: edits from rewrites. The model stays unchanged, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from errata.base import budgets
from errata.base.errors import ConfigError, ErrataError, FactError
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.editor import Editor, Progress, Step
from errata.editors.fine_tuning.config import ATTENTION, PUBLISHED, REFERENCE, FineTuningConfig
from errata.editors.fine_tuning.optimise import Found, optimise
from errata.editors.fine_tuning.trained import full_name, trained
from errata.editors.method import Method, Preset, Setup
from errata.editors.texts import Text, text_of
from errata.edits.delta import Dense
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.weights import matrix

# Facts that are trained together, if memory allows: more make no batch fuller.
_MOST = 32


def make_editor(method: str, model: Model, config: FineTuningConfig, setup: Setup) -> Editor:
    """FT, FT+L or the attention edit for one model.

    Raises:
        ConfigError: if the settings are those of another of the three methods.
        UnsupportedModel: if what is to be trained is not there, or offloaded.
    """
    if config.method != method:
        raise ConfigError(f"these settings make {config.method!r}, not {method!r}: call errata.{_names[config.method]}")
    trained(model, config)  # raises if it is not there
    make = partial(_make, config=config, seed=setup.seed)
    return Editor(method, config.model_dump(mode="json"), make)


def _make(
    model: Model,
    rewrites: Sequence[Rewrite],
    *,
    progress: Progress | None = None,
    config: FineTuningConfig,
    seed: int,
) -> list[Edit | ErrataError]:
    """The change of one layer's weights from training on each rewrite: independent results, computed together.

    An edit's deltas are dense, of a bias one column. Its `notes` hold the losses, how often the weights were changed
    (`updates`), what ended it (`stopped`: "loss" or "steps") and the largest entry of the change by magnitude
    (`largest_change`). Where the loss is below `stop_below` at once, the fact is there already, and the edit changes
    nothing: `updates` is 0.
    """
    layer = config.layer
    assert layer is not None  # required
    found: dict[int, Edit | ErrataError] = {}
    texts: dict[int, Text] = {}
    for number, rewrite in enumerate(rewrites):
        try:
            texts[number] = text_of(
                model,
                rewrite.text,
                rewrite.new_object,
                rewrite.separator,
                forced=config.loss == "teacher_forcing",
            )
        except FactError as error:
            found[number] = error
    names = trained(model, config)
    weights = {name: full_name(model, layer, name) for name in names}
    fingerprints = {full: tensor_digest(model.weight(full)) for full in weights.values()}
    for share in _batches(model, list(fingerprints), list(texts)):

        def tell(step: Step, share: Sequence[int] = share) -> None:
            if progress is not None:
                progress(dataclasses.replace(step, fact=share[step.fact], facts=len(rewrites)))

        made = optimise(model, names, [texts[number] for number in share], config, tell)
        for number, each in zip(share, made, strict=True):
            found[number] = (
                each
                if isinstance(each, ErrataError)
                else _edit(model, rewrites[number], each, weights, config, fingerprints, seed)
            )
    return [found[number] for number in range(len(rewrites))]


def _edit(
    model: Model,
    rewrite: Rewrite,
    found: Found,
    weights: Mapping[str, str],
    config: FineTuningConfig,
    fingerprints: Mapping[str, str],
    seed: int,
) -> Edit:
    notes = {
        "losses": found.losses,
        "updates": found.updates,
        "stopped": "loss" if found.updates < len(found.losses) else "steps",
        "largest_change": max(float(change.abs().max()) for change in found.changes.values()),
    }
    return Edit.of(
        model,
        [Dense(weights[name], _as_matrix(model, weights[name], change)) for name, change in found.changes.items()],
        config.method,
        [rewrite],
        config=config.model_dump(),
        seed=seed,
        notes=notes,
        fingerprints=fingerprints,
    )


def _as_matrix(model: Model, name: str, change: Tensor) -> Tensor:
    """A parameter's change as `[d_out, d_in]`; a bias's as `[d_out, 1]`, a map of the constant 1."""
    if change.dim() == 1:
        return change[:, None]
    return change if matrix(model, name).stride() == model.weight(name).stride() else change.T


def _batches(model: Model, names: Sequence[str], facts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Facts, as many at a time as memory holds."""
    # Of each: the change, its gradient, Adam's two moments and the sum with the weight, wide and rounded.
    per_fact = sum(6 * model.weight(name).numel() * 4 for name in names)
    most = min(_MOST, budgets.fitting(model.devices, per_fact, part=2))
    yield from ([facts[i] for i in group] for group in budgets.groups([1] * len(facts), most))


_names = {"ft": "ft", "ft-l": "ft_l", "attention": "attention"}
_LAYER = {"layer": "{layers}"}
_EPSILON = {"epsilon": "such as 5e-4, the largest change of any entry of the weight"}
_PRESETS = {
    "reference": Preset(
        "the published code's training: every target token from the prompt's end, biases too", REFERENCE
    )
}

ft = Method(
    name="ft",
    summary="Fine-tuning of one MLP's down-projection",
    source="the baseline of Meng et al., 2022, appendix E.1",
    config=FineTuningConfig,
    make_editor=partial(make_editor, "ft"),
    presets=_PRESETS,
    published=PUBLISHED["ft"],
    required=_LAYER,
)
ft_l = Method(
    name="ft-l",
    summary="Fine-tuning of one MLP's down-projection, with each entry changed by at most ε",
    source="Zhu et al., 2020: Modifying Memories in Transformer Models",
    config=FineTuningConfig,
    make_editor=partial(make_editor, "ft-l"),
    presets=_PRESETS,
    published=PUBLISHED["ft-l"],
    required={**_LAYER, **_EPSILON},
)
attention = Method(
    name="attention",
    summary="Fine-tuning of one layer's query, key and value maps, with each entry changed by at most ε",
    source="AttnEdit of Meng et al., 2022, appendix I",
    config=FineTuningConfig,
    make_editor=partial(make_editor, "attention"),
    presets=_PRESETS,
    published=PUBLISHED["attention"],
    defaults=ATTENTION,
    required={**_LAYER, **_EPSILON},
)
