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
from torch import Tensor

from errata.base import budgets
from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, ErrataError, FactError, StaleStatistics
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.rome import contexts, first_token, insert, value
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.examine import Examiner
from errata.editors.rome.key import Keys, record_texts
from errata.editors.rome.layer import resolve
from errata.editors.rome.site import Site
from errata.editors.rome.texts import Text, texts_of
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.edits.ledger import ContradictoryEdits
from errata.models.model import Model
from errata.models.weights import down_weight_name
from errata.passes.reading import read
from errata.passes.sinks import first_token_cosines, warn_of_sink
from errata.statistics.second_moment import SecondMoment

# Facts that are optimised together, if memory allows: more make no batch fuller.
_MOST = 64
# What may stand before a subject that is the first token of other texts.
_BEFORE = ("In the end. ", "The reason is simple. ")
_LATER = 16

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

    Many rewrites are edited independently, each as if it were alone, and computed together. Those of one subject share
    one edit, for at one token they have nearly one key and so need one value; rewrites of that subject that are on the
    model already are kept by it too (`RomeConfig.same_subject`).

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
        An edit for a rewrite, or a list for a sequence, in which rewrites of one subject have the same edit. Its
        `notes` hold the terms of the loss at every step, the prefixes, how the layer came to be chosen, how exactly
        Ŵk* = v* holds in the weight's own dtype (`residual`, `rounding`), and its `health`; `parts`, where it writes at
        two layers.

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
    ordinary = functools.partial(_ordinary_at_first_layer, second_moment)
    work = _Work(model, config, moment, ordinary, chosen_by, seed, force, len(wanted), progress)
    found = _in_sequence(work, wanted, errors == "raise") if sequential else _all_at_once(work, wanted)
    if errors == "raise":
        for edit in found:
            if isinstance(edit, ErrataError):
                raise edit
    return found[0] if one else found  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Work:
    """What all edits of one call share."""

    model: Model
    config: RomeConfig
    second_moment: Callable[[], SecondMoment]
    ordinary: Callable[[], SecondMoment | None]
    chosen_by: str
    seed: int
    force: bool
    facts: int
    progress: value.Progress | None

    @property
    def layer(self) -> int:
        assert isinstance(self.config.layer, int)  # resolve
        return self.config.layer

    @functools.cache  # noqa: B019 - as long as the call
    def sink(self) -> bool:
        """Whether all first tokens have one key at the layer."""
        return first_token_cosines(self.model, self.layer).sink

    @functools.cache  # noqa: B019 - as long as the call
    def first_tokens(self) -> first_token.FirstTokens:
        """The keys of all first tokens, where one must be told from the others."""
        return first_token.FirstTokens(self.model, self.ordinary())


@dataclass(frozen=True)
class _Request:
    """Rewrites that one edit writes.

    Attributes:
        numbers: places of its rewrites among those of the call.
        rewrites: of one subject.
        kept: rewrites of that subject that are on the model already, and are to hold beside the edit.
    """

    numbers: tuple[int, ...]
    rewrites: tuple[Rewrite, ...]
    kept: tuple[Rewrite, ...] = ()

    @property
    def all(self) -> tuple[Rewrite, ...]:
        """The rewrites that its value serves."""
        return (*self.kept, *self.rewrites)


def _in_sequence(work: _Work, rewrites: Sequence[Rewrite], stop: bool) -> list[_Made]:
    """Each edit made with the ones before it on the model."""
    found: list[_Made] = []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())  # that a later edit takes an earlier one back is its purpose
        warnings.simplefilter("ignore", ContradictoryEdits)
        for number, rewrite in enumerate(rewrites):
            (made,) = _together(work, [_Request((number,), (rewrite,), _on_model(work, [rewrite]))])
            found.append(made)
            if isinstance(made, Edit):
                if made not in found[:-1]:  # else both change nothing: the fact was there
                    stack.enter_context(made.applied(work.model))
            elif stop:
                break
    return found


def _all_at_once(work: _Work, rewrites: Sequence[Rewrite]) -> list[_Made]:
    """Edits for the model as it stands; those of one subject are one."""
    found: dict[int, _Made] = {}
    groups: list[list[int]] = []
    for number, rewrite in enumerate(rewrites):
        try:  # check before sampling: a bad prompt fails fast, and alone of its subject
            texts = texts_of(work.model, [rewrite], ("",), work.config)
            value.loss_layer_of(work.model, work.layer, texts, work.config)
        except (FactError, ConfigError) as error:
            found[number] = error
            continue
        fitting = [group for group in groups if _go_together([rewrites[i] for i in group], rewrite)]
        if fitting and work.config.same_subject == "joint":
            fitting[0].append(number)
        else:
            groups.append([number])
    requests = []
    for numbers in groups:
        wanted = tuple(dict.fromkeys(rewrites[number] for number in numbers))
        requests.append(_Request(tuple(numbers), wanted, _on_model(work, wanted)))
    for some in _batches(work, requests):
        for request, made in zip(some, _together(work, some), strict=True):
            found.update(dict.fromkeys(request.numbers, made))
    return [found[number] for number in range(len(rewrites))]


def _go_together(group: Sequence[Rewrite], rewrite: Rewrite) -> bool:
    """Whether a rewrite is of the group's subject and contradicts none of it."""
    return _subject(group[0]) == _subject(rewrite) and all(
        one.text != rewrite.text or one.new_object == rewrite.new_object for one in group
    )


def _subject(rewrite: Rewrite) -> str:
    """Subject in a form that is equal for any letter case and spacing."""
    return " ".join(rewrite.subject.casefold().split())


def _on_model(work: _Work, rewrites: Sequence[Rewrite]) -> tuple[Rewrite, ...]:
    """Rewrites of the subject that are on the model, as the last edit of each prompt says; not of these prompts."""
    if work.config.same_subject == "apart":
        return ()
    subject, prompts = _subject(rewrites[0]), {rewrite.text for rewrite in rewrites}
    on = {one.text: one for entry in work.model.applied for one in entry.edit.rewrites if _subject(one) == subject}
    return tuple(one for text, one in on.items() if text not in prompts)


def _batches(work: _Work, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Requests, as many at a time as memory holds."""
    model = work.model
    # Of texts of some 32 tokens: keys, values and states in every block above, twice while they are joined.
    texts = contexts.count(work.config.prefixes) + 2
    per_rewrite = texts * 32 * (model.n_layers - work.layer) * 6 * model.d_model * model.dtype.itemsize
    most = min(_MOST, budgets.fitting(model.devices, per_rewrite))
    for group in budgets.groups([len(request.all) for request in requests], most):
        yield [requests[i] for i in group]


def _together(work: _Work, requests: Sequence[_Request]) -> list[_Made]:
    """Edits of requests for the model as it stands, computed together; where there is none, why."""
    model, config = work.model, work.config
    found: dict[int, _Made] = {}
    plans: dict[int, _Plan] = {}
    prefixes = None
    for place, request in enumerate(requests):
        try:
            bare = texts_of(model, request.all, ("",), config)
            value.loss_layer_of(model, work.layer, bare, config)
            if prefixes is None:
                prefixes = contexts.prefixes(model, config.prefixes, work.seed)
            plans[place] = _plan(work, request, prefixes)
        except (FactError, ConfigError) as error:
            found[place] = error
    parts: dict[int, list[_Part | ErrataError]] = {place: [] for place in plans}
    for layer in sorted({layer for plan in plans.values() for layer in plan.texts}, reverse=True):
        chosen = [place for place, plan in plans.items() if layer in plan.texts]
        made = _parts(work, layer, [requests[place] for place in chosen], [plans[place] for place in chosen])
        for place, part in zip(chosen, made, strict=True):
            parts[place].append(part)
    if any(not isinstance(part, ErrataError) for made in parts.values() for part in made):
        examiner = Examiner.of(model, config, work.seed)
        digests: dict[str, str] = {}
        for place, made in parts.items():
            found[place] = _edit(work, requests[place], made, prefixes or (), examiner, digests)
    else:
        found.update(
            {place: next(part for part in made if isinstance(part, ErrataError)) for place, made in parts.items()}
        )
    return [found[place] for place in range(len(requests))]


@dataclass(frozen=True)
class _Plan:
    """The texts of one edit, by the layer whose value is searched with them.

    Attributes:
        texts: by layer.
        later: keys at block 0 of a subject that begins a text where it does not, `[n, d_mlp]`; None: not needed.
    """

    texts: dict[int, tuple[Text, ...]]
    later: Tensor | None = None


def _plan(work: _Work, request: _Request, prefixes: Sequence[str]) -> _Plan:
    """At which layers an edit writes: at the configured one; where the subject begins a text and is a sink, at two."""
    model, config = work.model, work.config
    whole = texts_of(model, request.all, prefixes, config)
    bare = [text for text in whole if text.kind == "bare"]
    begins = work.layer > first_token.LAYER and any(text.lookup == 0 for text in bare)
    if not (begins and work.sink()):
        return _Plan({work.layer: whole})
    if config.attention_sink == "ignore" or config.key == "reference":
        warn_of_sink(
            model,
            f"the subject {request.rewrites[0].subject!r}",
            f"an edit of layer {work.layer} cannot be specific to it",
        )
        return _Plan({work.layer: whole})
    plan = {work.layer: texts_of(model, request.all, prefixes, config, first=False)}
    if not any(text.kind == "context" for text in plan[work.layer]):  # nothing stands before the subject anywhere
        plan = {}
    begun = tuple(rewrite for rewrite, text in zip(request.all, bare, strict=True) if text.lookup == 0)
    plan[first_token.LAYER] = texts_of(model, begun, ("",), config, first=True)
    return _Plan(plan, _later_keys(work, begun[0], prefixes))


@dataclass(frozen=True)
class _Part:
    """The change that an edit makes at one layer, and how it came about.

    Attributes:
        change: ΔW.
        anchor, delta: (k₀, v₀) and δ, for the examination.
        notes: steps and sizes.
    """

    layer: int
    change: RankOne
    anchor: Keys
    delta: Tensor
    notes: dict[str, Any]


def _parts(work: _Work, layer: int, requests: Sequence[_Request], plans: Sequence[_Plan]) -> list[_Part | ErrataError]:
    """Key, value and change of requests at one layer, computed together."""
    model, config, texts = work.model, work.config, [plan.texts[layer] for plan in plans]
    if layer != work.layer:  # what the lowest block writes is heard through all others: a longer way
        config = RomeConfig(**{**config.model_dump(), "steps": 2 * config.steps})
    loss_layer = value.loss_layer_of(model, layer, [text for some in texts for text in some], config)
    recorded = record_texts(model, layer, [text for some in texts for text in some], loss_layer)
    owners = [place for place, some in enumerate(texts) for _ in some]

    def keys_of(place: int, *kinds: str) -> Keys:
        """Those of the first of these kinds that the request has texts of."""
        own = [i for i, owner in enumerate(owners) if owner == place]
        found = ([i for i in own if recorded.texts[i].kind == kind] for kind in kinds)
        return recorded.keys.of(next(rows for rows in found if rows))

    places = range(len(requests))
    keys = [keys_of(place, "subject", "context") for place in places]
    bare = [keys_of(place, "bare") for place in places]
    anchors = keys if config.key == "consistent" else bare
    reads, read_notes = _reads(work, layer, plans, keys, anchors)

    def tell(step: value.Step) -> None:
        if work.progress is not None:
            work.progress(dataclasses.replace(step, fact=requests[step.fact].numbers[0], facts=work.facts))

    v0 = torch.stack([anchor.mean_value for anchor in anchors])
    values = value.optimise(model, layer, recorded, owners, v0, config, tell, [len(one.all) for one in requests])
    weight = down_weight_name(model, layer)
    parts: list[_Part | ErrataError] = []
    for place, found in enumerate(values):
        try:
            if isinstance(found, ErrataError):
                raise found
            read = reads[place]
            if isinstance(read, ErrataError):
                raise read
            notes = {
                "steps": [step.numbers for step in found.steps],
                "delta_norm": found.delta.norm(),
                "value_norm": v0[place].norm(),
                "read_at_mean_key": float(read @ keys[place].mean_key),
                "read_at_bare_prompt": float(read @ bare[place].mean_key),
                **read_notes[place],
            }
            change = insert.insert(model, weight, found.delta, read)
            parts.append(_Part(layer, change, anchors[place], found.delta, notes))
        except ErrataError as error:
            parts.append(error)
    return parts


def _reads(
    work: _Work, layer: int, plans: Sequence[_Plan], keys: Sequence[Keys], anchors: Sequence[Keys]
) -> tuple[list[Tensor | ErrataError], list[dict[str, Any]]]:
    """The read vector of each request, or why there is none, and notes on it."""
    reads: list[Tensor | ErrataError] = []
    if layer != work.layer:  # the subject is the first token of its texts
        tokens = [plan.texts[layer][0].ids[0] for plan in plans]
        found = [work.first_tokens().read_vector(token, plan.later) for token, plan in zip(tokens, plans, strict=True)]
        notes = [{"leak": one.leak, "leak_token": work.model.tokenizer.decode([one.token])} for one in found]
        return [one.vector for one in found], notes
    moment = work.second_moment()
    directions = moment.solve(torch.stack([some.mean_key for some in keys]))
    for direction, anchor in zip(directions, anchors, strict=True):
        try:
            reads.append(insert.read_vector(direction, anchor.mean_key))
        except ErrataError as error:
            reads.append(error)
    told = {"tokens": moment.count, "ridge": moment.ridge, "fingerprint": moment.fingerprint}
    return reads, [{"second_moment": told} for _ in reads]


def _edit(
    work: _Work,
    request: _Request,
    parts: Sequence[_Part | ErrataError],
    prefixes: Sequence[str],
    examiner: Examiner,
    digests: dict[str, str],
) -> _Made:
    """The edit of its parts, examined; or why there is none."""
    made: list[_Part] = []
    try:
        for part in parts:
            if isinstance(part, ErrataError):
                raise part
            made.append(part)
        for part in made:
            weight = part.change.weight
            digests.setdefault(weight, tensor_digest(work.model.weight(weight)))
        main, *others = made
        notes: dict[str, Any] = {"layer": work.chosen_by, "prefixes": prefixes, **main.notes}
        if others or main.layer != work.layer:
            notes["parts"] = [{"layer": part.layer, **part.notes} for part in made]
        notes |= examiner.examine(
            [(part.change, part.anchor, part.delta) for part in made], request.rewrites, work.force
        )
        return Edit.of(
            work.model,
            [part.change for part in made],
            "rome",
            request.rewrites,
            config=work.config.model_dump(),
            seed=work.seed,
            notes=notes,
            fingerprints={part.change.weight: digests[part.change.weight] for part in made},
        )
    except ErrataError as error:
        return error


def _later_keys(work: _Work, rewrite: Rewrite, prefixes: Sequence[str]) -> Tensor:
    """Keys `[n, d_mlp]` at block 0 of a subject that other words stand before, of which the other part takes care."""
    model, rows = work.model, []
    for prefix in (*_BEFORE, *(one for one in prefixes if one)):
        ids, index = contexts.Context.of(rewrite.fact, prefix, model.tokenizer).lookup(model, work.config.fact_token)
        if 0 < index < model.max_length:
            rows.append(ids[: index + 1])
    if not rows:
        return torch.empty(0, model.d_mlp)
    batch = model.batch(rows[:_LATER])
    keys = read(model, batch, [("key", first_token.LAYER)])["key", first_token.LAYER]
    return keys[torch.arange(len(batch), device=keys.device), batch.last]


def _ordinary_at_first_layer(given: SecondMoments | None) -> SecondMoment | None:
    """C of ordinary text at block 0 of what was given; None if that is of the edited layer alone."""
    layer = first_token.LAYER
    found = given(layer) if callable(given) else given.get(layer) if isinstance(given, Mapping) else given
    return found if found is not None and found.layer in (None, layer) else None


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
