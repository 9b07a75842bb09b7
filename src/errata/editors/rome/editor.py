"""ROME: edits from rewrites. The model stays unchanged, byte for byte."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.base import budgets
from errata.base.config import changed
from errata.base.errors import ConfigError, ErrataError, FactError, StaleStatistics
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.editor import Editor, Progress
from errata.editors.layer_choice import LayerChoice
from errata.editors.method import Method, Moments, Preset, Setup
from errata.editors.rome import contexts, first_token, insert, value
from errata.editors.rome.config import PAPER, PUBLISHED, REFERENCE, RomeConfig
from errata.editors.rome.exactness import exactness
from errata.editors.rome.key import Keys, record_texts
from errata.editors.rome.texts import Text, texts_of
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
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

_Made = Edit | ErrataError


def make_editor(model: Model, config: RomeConfig, setup: Setup) -> Editor:
    """ROME for one model.

    Raises:
        ConfigError: if the loss layer is out of range, or there is no second moment for the layer.
        StaleStatistics: if the second moment is of another layer or size.
        UnsupportedModel: if the weight to change is offloaded.
    """
    layer = config.layer
    assert isinstance(layer, int)  # Method.resolve
    model.weight(down_weight_name(model, layer))  # raises, before anything is computed, if it is not at hand
    if config.loss_layer is not None and not layer <= config.loss_layer < model.n_layers:
        raise ConfigError(
            f"loss_layer={config.loss_layer} is out of range: it must be from {layer}, the edited layer, to "
            f"{model.n_layers - 1}, the last"
        )
    moment: Moment = functools.cache(functools.partial(second_moment_of, model, setup.second_moment, layer))
    ordinary: Callable[[], SecondMoment | None] = functools.partial(_ordinary_at_first_layer, setup.second_moment)
    alone = changed(config, same_subject="apart")
    told = {**alone.model_dump(mode="json"), "seed": setup.seed}
    if setup.sample_now:
        config = changed(config, prefixes=contexts.prefixes(model, config.prefixes, setup.seed))
        alone = changed(config, same_subject="apart")
        now = moment()
        moment, ordinary = functools.partial(_given, now), functools.partial(_ordinary_of, now)
        told = {**alone.model_dump(mode="json"), "seed": setup.seed, "second_moment": tensor_digest(now.matrix)}
        if isinstance(setup.layer_by, LayerChoice):
            told["layer_by"] = "auto"
    make = functools.partial(
        _make, config=alone, second_moment=moment, ordinary=ordinary, layer_by=str(setup.layer_by), seed=setup.seed
    )
    together = functools.partial(make, config=config) if config.same_subject == "joint" else None
    return Editor("rome", told, make, together)


Moment = Callable[[], SecondMoment]


def _given(moment: SecondMoment) -> SecondMoment:
    return moment


def _make(
    model: Model,
    rewrites: Sequence[Rewrite],
    *,
    progress: Progress | None = None,
    config: RomeConfig,
    second_moment: Moment,
    ordinary: Callable[[], SecondMoment | None],
    layer_by: str,
    seed: int,
) -> list[Edit | ErrataError]:
    """Edits for the model in its current state; rewrites of one subject share one edit if `same_subject` says so."""
    work = _Work(model, config, second_moment, ordinary, layer_by, seed, len(rewrites), progress)
    return _all_at_once(work, rewrites)


@dataclass(frozen=True, eq=False)
class _Work:
    """Inputs that all edits of one call share."""

    model: Model
    config: RomeConfig
    second_moment: Callable[[], SecondMoment]
    ordinary: Callable[[], SecondMoment | None]
    layer_by: str
    seed: int
    facts: int
    progress: Progress | None

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
        """The keys of all first tokens, among which the edit must single out one."""
        return first_token.FirstTokens(self.model, self.ordinary())


@dataclass(frozen=True)
class _Request:
    """Rewrites that one edit writes.

    Attributes:
        numbers: places of its rewrites among those of the call.
        rewrites: rewrites of one subject.
        kept: rewrites of that subject that are on the model already, and are to hold beside the edit.
    """

    numbers: tuple[int, ...]
    rewrites: tuple[Rewrite, ...]
    kept: tuple[Rewrite, ...] = ()

    @property
    def all(self) -> tuple[Rewrite, ...]:
        """The rewrites that its value serves."""
        return (*self.kept, *self.rewrites)


def _all_at_once(work: _Work, rewrites: Sequence[Rewrite]) -> list[_Made]:
    """Edits for the model in its current state; rewrites of one subject share an edit."""
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
    """Edits of requests for the model in its current state, computed together; or the reason why there is none."""
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
    digests: dict[str, str] = {}
    for place, made in parts.items():
        found[place] = _edit(work, requests[place], made, prefixes or (), digests)
    return [found[place] for place in range(len(requests))]


@dataclass(frozen=True)
class _Plan:
    """The texts of one edit, by the layer whose value is searched with them.

    Attributes:
        texts: texts by layer.
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
        config = changed(config, steps=2 * config.steps)
    loss_layer = value.loss_layer_of(model, layer, [text for some in texts for text in some], config)
    recorded = record_texts(model, layer, [text for some in texts for text in some], loss_layer)
    owners = [place for place, some in enumerate(texts) for _ in some]

    def keys_of(place: int, *kinds: str) -> Keys:
        """Keys of the texts of the first of these kinds that the request has."""
        own = [i for i, owner in enumerate(owners) if owner == place]
        found = ([i for i in own if recorded.texts[i].kind == kind] for kind in kinds)
        return recorded.keys.of(next(rows for rows in found if rows))

    places = range(len(requests))
    keys = [keys_of(place, "subject", "context") for place in places]
    bare = [keys_of(place, "bare") for place in places]
    anchors = keys if config.key == "consistent" else bare
    reads, read_notes = _reads(work, layer, plans, keys, anchors)

    def tell(step: value.RomeStep) -> None:
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
    """The read vector of each request, or its error, and notes on it."""
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
    digests: dict[str, str],
) -> _Made:
    """The edit from its parts, or the error."""
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
        notes: dict[str, Any] = {"layer": work.layer_by, "prefixes": prefixes, **main.notes}
        if others or main.layer != work.layer:
            notes["parts"] = [{"layer": part.layer, **part.notes} for part in made]
        notes |= exactness(work.model, [(part.change, part.anchor, part.delta) for part in made])
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
    """Keys `[n, d_mlp]` at block 0 of the subject behind other words; the other part of the edit handles these."""
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


def _ordinary_at_first_layer(moments: Moments) -> SecondMoment | None:
    """C of ordinary text at block 0; None if there is none."""
    return _ordinary_of(moments(first_token.LAYER))


def _ordinary_of(moment: SecondMoment | None) -> SecondMoment | None:
    """C of a layer, if it can stand for block 0."""
    return moment if moment is not None and moment.layer in (None, first_token.LAYER) else None


def second_moment_of(model: Model, moments: Moments, layer: int) -> SecondMoment:
    """C of a layer's keys.

    Raises:
        ConfigError: if there is none.
        StaleStatistics: if it is of another layer or size.
    """
    moment = moments(layer)
    if moment is None:
        raise ConfigError(
            f"ROME needs the second moment of the keys of layer {layer}: collect it with errata stats or with "
            f"errata.second_moments(model, [{layer}], texts)[{layer}], or do without what it protects, by "
            f"SecondMoment.identity({model.d_mlp})"
        )
    if moment.layer not in (None, layer):
        raise StaleStatistics(
            f"the second moment is of layer {moment.layer}, the edit of layer {layer}: collect it for that layer"
        )
    if moment.size != model.d_mlp:
        raise StaleStatistics(
            f"the second moment has size {moment.size}, the keys of {model.name} have {model.d_mlp}: "
            "it was collected on another model. Collect it on this one"
        )
    return moment


rome = Method(
    name="rome",
    summary="Rank-One Model Editing: a rank-one change of an MLP gives a new value for the subject's key",
    source="Meng et al., 2022: Locating and Editing Factual Associations in GPT",
    config=RomeConfig,
    make_editor=make_editor,
    presets={
        "paper": Preset("all settings as in the paper", PAPER),
        "reference": Preset("all settings as in its published code", REFERENCE),
    },
    published=PUBLISHED,
    required={"layer": '{layers}, or layer="auto" to have a quick trace of the fact choose it'},
    uses_second_moment=True,
    layer_auto=True,
)
