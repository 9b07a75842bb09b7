"""`rome`: from rewrites to edits. The model is the same, byte for byte, afterwards."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, ErrataError, FactError, StaleStatistics
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.rome import contexts, insert, value
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.examine import Examiner
from errata.editors.rome.key import Keys, Recorded, record_texts
from errata.editors.rome.layer import resolve
from errata.editors.rome.site import Site
from errata.editors.rome.texts import Text, texts_of
from errata.edits.edit import Edit
from errata.edits.ledger import ContradictoryEdits
from errata.models.memory import free_memory
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.statistics.second_moment import SecondMoment

# Facts that are optimised together, if memory allows: more make no batch fuller.
_FACTS_AT_ONCE = 64

# C of the edited layer; or one for each layer; or what makes it once the layer is known.
SecondMoments = SecondMoment | Mapping[int, SecondMoment] | Callable[[int], SecondMoment]
_Made = Edit | ErrataError


@overload
def rome(model: Model, rewrites: Rewrite, config: RomeConfig | None = None, **settings: Any) -> Edit: ...


@overload
def rome(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: RomeConfig | None = None,
    *,
    errors: Literal["raise"] = "raise",
    **settings: Any,
) -> list[Edit]: ...


@overload
def rome(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: RomeConfig | None = None,
    *,
    errors: Literal["keep"],
    **settings: Any,
) -> list[Edit | ErrataError]: ...


# A caller in inference mode gets gradients all the same.
@checked(model="Model", config="RomeConfig", second_moment="SecondMoment|callable|dict")  # type: ignore[misc]
@without_autocast  # the other settings are spelt out here alone
@torch.inference_mode(False)
def rome(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: RomeConfig | None = None,
    *,
    layer: int | Literal["auto"] | Site | None = None,
    second_moment: SecondMoments | None = None,
    seed: int = 0,
    sequential: bool = False,
    force: bool = False,
    errors: Literal["raise", "keep"] = "raise",
    progress: value.Progress | None = None,
) -> Edit | list[Edit] | list[Edit | ErrataError]:
    """The rank-one edit of one MLP down-projection that makes the model say the rewrite's new object; or of many.

    Many rewrites are edited independently, each as if it were alone, and computed together.

    Args:
        model: left as it is, byte for byte, on errors and interrupts too.
        rewrites: a fact and its new object, or a sequence of such.
        config: settings; None: the defaults, with what the model's own hints or a preset for it say otherwise.
        layer: the layer to edit, from 0; "auto"; or what `early_site` found. It goes before the config's, which goes
            before hint and preset.
        second_moment: C, of the keys of that layer; or by layer, as `statistics.collect(model, layers, texts)` gives
            it; or a function that is called with the layer once it is known.
        seed: of the sampled prefixes and probe texts.
        sequential: make each edit for the model with the earlier ones on it, rather than for the model as it is.
        force: make disabling edits too.
        errors: "raise" the first; or "keep" each in the place of the edit that could not be made.
        progress: called after every evaluation of a loss, with a `value.Step`.

    Returns:
        An edit for a rewrite, or a list for a sequence. Its `notes` hold the terms of the loss at every step, the
        prefixes, how the layer came to be chosen, how exactly Ŵk* = v* holds in the weight's own dtype (`residual`,
        `rounding`), and its `health`.

    Raises:
        UnsupportedModel: if accelerate has offloaded the weight that is to change.
        ConfigError: if no layer is named or it is not there, it has no later layer to act through, or no second
            moment is given.
        StaleStatistics: if the second moment is of another layer or size.
        FactError: if a text is too long for the model, or has no token in the wanted role.
        Diverged: if the optimisation meets a loss that is no finite number.
        DisablingEdit: if the edit would move what the model says of everything; see `RomeConfig.max_drift`.
    """
    if errors not in ("raise", "keep"):
        raise ConfigError(f"errors is {errors!r}: it is 'raise' or 'keep'")
    one = not isinstance(rewrites, (list, tuple))
    wanted: list[Rewrite] = [rewrites] if one else list(rewrites)  # type: ignore[arg-type,list-item]
    for rewrite in wanted:
        if not isinstance(rewrite, Rewrite):
            raise FactError(
                f"rome takes a Rewrite or a list of them, not a {type(rewrite).__name__}: write fact.rewrite('Paris')"
            )
    if not wanted:
        return []
    config, chosen_by = resolve(model, [each.fact for each in wanted], config, layer, seed)
    moment = functools.cache(functools.partial(second_moment_of, model, second_moment, config))
    if not callable(second_moment):  # what must first be collected waits until there is a rewrite that can be made
        moment()
    work = _Work(model, config, moment, chosen_by, seed, force, len(wanted), progress)
    if sequential:
        found = _in_sequence(work, wanted, errors == "raise")
    else:
        found = [edit for some in _batches(work, wanted) for edit in _together(work, some)]
    if errors == "raise":
        for edit in found:
            if isinstance(edit, ErrataError):
                raise edit
    return found[0] if one else found  # type: ignore[return-value]


@dataclass(frozen=True)
class _Work:
    """What all edits of one call share."""

    model: Model
    config: RomeConfig
    second_moment: Callable[[], SecondMoment]
    chosen_by: str
    seed: int
    force: bool
    facts: int
    progress: value.Progress | None

    @property
    def layer(self) -> int:
        assert isinstance(self.config.layer, int)  # resolve
        return self.config.layer


def _in_sequence(work: _Work, rewrites: Sequence[Rewrite], stop: bool) -> list[_Made]:
    """Each edit made with the ones before it on the model."""
    found: list[_Made] = []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())  # that a later edit takes an earlier one back is its purpose
        warnings.simplefilter("ignore", ContradictoryEdits)
        for numbered in enumerate(rewrites):
            (made,) = _together(work, [numbered])
            found.append(made)
            if isinstance(made, Edit):
                if made not in found[:-1]:  # else both change nothing: the fact was there
                    stack.enter_context(made.applied(work.model))
            elif stop:
                break
    return found


def _batches(work: _Work, rewrites: Sequence[Rewrite]) -> Iterator[list[tuple[int, Rewrite]]]:
    """Rewrites, numbered, as many at a time as memory holds."""
    model = work.model
    # Of texts of some 32 tokens: keys, values and states in every block above, twice while they are joined.
    texts = contexts.count(work.config.prefixes) + 2
    per_fact = texts * 32 * (model.n_layers - work.layer) * 6 * model.d_model * model.dtype.itemsize
    share = max(1, min(_FACTS_AT_ONCE, free_memory(*model.devices) // 4 // per_fact))
    numbered = list(enumerate(rewrites))
    yield from (numbered[begin : begin + share] for begin in range(0, len(numbered), share))


def _together(work: _Work, rewrites: Sequence[tuple[int, Rewrite]]) -> list[_Made]:
    """Edits of numbered rewrites for the model as it stands, computed together; where there is none, why."""
    model, config = work.model, work.config
    found: dict[int, _Made] = {}
    texts: dict[int, tuple[Text, ...]] = {}
    loss_layer = model.n_layers - 1
    for number, rewrite in rewrites:  # before anything is sampled: a prompt that does not do fails fast
        try:
            texts[number] = texts_of(model, rewrite, ("",), config)
            loss_layer = value.loss_layer_of(model, work.layer, texts[number], config)
        except (FactError, ConfigError) as error:
            found[number] = error
    prefixes = contexts.prefixes(model, config.prefixes, work.seed) if len(found) < len(rewrites) else ()
    for number, rewrite in rewrites:
        if number not in found:
            try:
                texts[number] = texts_of(model, rewrite, prefixes, config)
            except FactError as error:
                found[number] = error
    chosen = {number: rewrite for number, rewrite in rewrites if number not in found}
    if chosen:
        recorded = record_texts(model, work.layer, [text for number in chosen for text in texts[number]], loss_layer)
        found.update(zip(chosen, _edits(work, chosen, recorded, prefixes), strict=True))
    return [found[number] for number, _ in rewrites]


def _edits(work: _Work, rewrites: Mapping[int, Rewrite], recorded: Recorded, prefixes: Sequence[str]) -> list[_Made]:
    """Key, value and insertion of rewrites whose texts are recorded."""
    model, config, moment = work.model, work.config, work.second_moment()
    numbers = list(rewrites)
    each = len(recorded.texts) // len(numbers)  # every rewrite has as many texts
    owners = [i // each for i in range(len(recorded.texts))]

    def keys_of(fact: int, kind: str) -> Keys:
        return recorded.keys.of([i for i in range(fact * each, (fact + 1) * each) if recorded.texts[i].kind == kind])

    keys = [keys_of(fact, "context") for fact in range(len(numbers))]
    bare = [keys_of(fact, "bare") for fact in range(len(numbers))]
    anchors = keys if config.key == "consistent" else bare
    directions = moment.solve(torch.stack([some.mean_key for some in keys]))

    def tell(step: value.Step) -> None:
        if work.progress is not None:
            work.progress(dataclasses.replace(step, fact=numbers[step.fact], facts=work.facts))

    v0 = torch.stack([anchor.mean_value for anchor in anchors])
    values = value.optimise(model, work.layer, recorded, owners, v0, config, tell)
    if not any(isinstance(found, value.Found) for found in values):
        return [found for found in values if isinstance(found, ErrataError)]
    examiner = Examiner.of(model, config, work.seed)
    weight = down_weight_name(model, work.layer)
    fingerprints = {weight: tensor_digest(model.weight(weight))}
    made: list[_Made] = []
    for fact, rewrite in enumerate(rewrites.values()):
        try:
            found = values[fact]
            if isinstance(found, ErrataError):
                raise found
            read = insert.read_vector(directions[fact], anchors[fact].mean_key)
            change = insert.insert(model, weight, found.delta, read)
            notes: dict[str, Any] = {
                "layer": work.chosen_by,
                "steps": [step.numbers for step in found.steps],
                "prefixes": prefixes,
                "delta_norm": found.delta.norm(),
                "value_norm": v0[fact].norm(),
                "read_at_mean_key": float(read @ keys[fact].mean_key),
                "read_at_bare_prompt": float(read @ bare[fact].mean_key),
                "second_moment": {"tokens": moment.count, "ridge": moment.ridge, "fingerprint": moment.fingerprint},
            }
            notes |= examiner.examine(change, rewrite, anchors[fact], found.delta, work.force)
            made.append(
                Edit.of(
                    model,
                    [change],
                    "rome",
                    [rewrite],
                    config=config.model_dump(),
                    seed=work.seed,
                    notes=notes,
                    fingerprints=fingerprints,
                )
            )
        except ErrataError as error:
            made.append(error)
    return made


def second_moment_of(model: Model, given: SecondMoments | None, config: RomeConfig) -> SecondMoment:
    """The second moment for a config's layer of what was given.

    Raises:
        ConfigError: if there is none.
        StaleStatistics: if it is of another layer or size.
    """
    layer = config.layer
    assert isinstance(layer, int)  # resolve
    model.weight(down_weight_name(model, layer))  # raises, before anything is computed, if it is not at hand
    second_moment = given(layer) if callable(given) else given.get(layer) if isinstance(given, Mapping) else given
    if second_moment is None:
        raise ConfigError(
            f"ROME needs the second moment of the keys of layer {layer}: collect it with "
            f"errata.second_moments(model, [{layer}], texts)[{layer}], or do without what it protects, by "
            f"SecondMoment.identity({model.d_mlp})"
        )
    if second_moment.layer not in (None, layer):
        raise StaleStatistics(
            f"the second moment is of layer {second_moment.layer}, the edit of layer {layer}: collect it for that layer"
        )
    if second_moment.size != model.d_mlp:
        raise StaleStatistics(
            f"the second moment has size {second_moment.size}, the keys of {model.name} have {model.d_mlp}: "
            "it was collected on another model. Collect it on this one"
        )
    return second_moment
