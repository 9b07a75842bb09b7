"""`knowledge_neurons`: from rewrites to edits. The model is the same, byte for byte, afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, overload

import torch
from torch import Tensor

from errata.base.errors import ConfigError, ErrataError, FactError, UnsupportedModel
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.knowledge_neurons.attribution import attributions
from errata.editors.knowledge_neurons.config import KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.neurons import Neuron, refined
from errata.editors.prefixes import sampled
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.scoring import target_ids
from errata.models.tokens import after_prefix
from errata.models.weights import down_weight_name
from errata.passes.reading import read

# Tokens of sampled prefixes, one after the other.
_LENGTHS = (4, 9)


@overload
def knowledge_neurons(
    model: Model, rewrites: Rewrite, config: KnowledgeNeuronsConfig | None = None, **settings: Any
) -> Edit: ...


@overload
def knowledge_neurons(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: KnowledgeNeuronsConfig | None = None,
    *,
    errors: Literal["raise"] = "raise",
    **settings: Any,
) -> list[Edit]: ...


@overload
def knowledge_neurons(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: KnowledgeNeuronsConfig | None = None,
    *,
    errors: Literal["keep"],
    **settings: Any,
) -> list[Edit | ErrataError]: ...


def knowledge_neurons(  # type: ignore[misc]  # the other settings are spelt out here alone
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: KnowledgeNeuronsConfig | None = None,
    *,
    seed: int = 0,
    errors: Literal["raise", "keep"] = "raise",
    progress: Callable[[int, int], None] | None = None,
) -> Edit | list[Edit] | list[Edit | ErrataError]:
    """The neurons that express a fact, moved from its old object to the new one.

    From the down-projection's column of each neuron `erase` times the embedding of the old object's token is
    subtracted, and `write` times that of the new object's added: of the first token in which they differ, unless
    `written` says otherwise. The neurons are those to which the
    old object, or without one what the model says, is attributed.

    Args:
        model: left as it is, byte for byte, on errors and interrupts too.
        rewrites: a fact and its new object, or a sequence of such, each as if it were alone.
        config: settings; None: the defaults, with what the model's own config hints under "kn".
        seed: of sampled prefixes.
        errors: "raise" the first; or "keep" each in the place of the edit that could not be made.
        progress: called with (done, of) after every rewrite.

    Returns:
        An edit for a rewrite, or a list for a sequence; its deltas are of rank one, one a layer. Its `notes` hold the
        `neurons` with their attributions, and the objects' tokens, `erased` and `written`.

    Raises:
        ConfigError: if neurons are to be taken before a nonlinearity that this model does not have.
        UnsupportedModel: if embeddings are not as wide as what the down-projection writes, or a weight is not at hand.
        FactError: if a text is too long for the model, no neuron is found, or the objects do not differ.
    """
    if errors not in ("raise", "keep"):
        raise ConfigError(f"errors is {errors!r}: it is 'raise' or 'keep'")
    one = not isinstance(rewrites, (list, tuple))
    wanted: list[Rewrite] = [rewrites] if one else list(rewrites)  # type: ignore[arg-type,list-item]
    for rewrite in wanted:
        if not isinstance(rewrite, Rewrite):
            raise FactError(
                f"knowledge_neurons takes a Rewrite or a list of them, not a {type(rewrite).__name__}: write "
                "fact.rewrite('Paris')"
            )
    config = settled(model, config, seed)
    fingerprints: dict[str, str] = {}
    found: list[Edit | ErrataError] = []
    for number, rewrite in enumerate(wanted):
        try:
            found.append(_edit(model, rewrite, config, seed, fingerprints))
        except FactError as error:
            if errors == "raise":
                raise
            found.append(error)
        if progress is not None:
            progress(number + 1, len(wanted))
    return found[0] if one else found  # type: ignore[return-value]


def known_settings(model: Model) -> KnowledgeNeuronsConfig:
    """The defaults, with what the model's own config hints under "kn".

    Raises:
        ConfigError: if that does not do.
    """
    hints = model.hints.get("kn", {})
    if not isinstance(hints, dict):
        raise ConfigError(f"the config of {model.name} hints {hints!r} for 'kn': it is an object of settings")
    return KnowledgeNeuronsConfig(**hints)


def settled(model: Model, config: KnowledgeNeuronsConfig | None, seed: int) -> KnowledgeNeuronsConfig:
    """The settings, with prefixes sampled once from the model as it is now.

    Raises:
        ConfigError: if it is no such config, or the tokenizer has no token to start sampling from.
        UnsupportedModel: if embeddings are not as wide as what the down-projection writes.
    """
    if config is None:
        config = known_settings(model)
    if not isinstance(config, KnowledgeNeuronsConfig):
        raise ConfigError(f"config is a {type(config).__name__}: write KnowledgeNeuronsConfig(steps=20, ...)")
    width = _embeddings(model).shape[-1]
    if width != model.d_model:
        raise UnsupportedModel(
            f"{model.name} has embeddings of {width} numbers, and its MLPs write {model.d_model}: an object's "
            "embedding cannot be written there"
        )
    if isinstance(config.prefixes, int):
        lengths = [_LENGTHS[i % len(_LENGTHS)] for i in range(config.prefixes)]
        texts = ("", *sampled(model, lengths, seed, "knowledge neurons"))
        config = KnowledgeNeuronsConfig(**{**config.model_dump(), "prefixes": texts})
    if not config.prefixes:
        raise ConfigError('prefixes is empty: give "" for the prompt by itself')
    return config


def _edit(
    model: Model, rewrite: Rewrite, config: KnowledgeNeuronsConfig, seed: int, fingerprints: dict[str, str]
) -> Edit:
    assert not isinstance(config.prefixes, int)  # settled
    said = _prediction(model, rewrite.text)
    old = _object_ids(model, rewrite, rewrite.fact.object, config) if rewrite.fact.object else [said]
    new = _object_ids(model, rewrite, rewrite.new_object, config)
    # New York and New Jersey differ in their second token.
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)) - 1)
    erased = old[place] if config.erased == "object" else said
    written = new if config.written == "all" else [new[place]]
    if written == [erased] and config.erase == config.write:
        raise FactError(
            f"the new object {rewrite.new_object!r} has the tokens of the old one where they would be told apart, so "
            "nothing would be moved: name another object"
        )
    texts = [after_prefix(model.tokenizer, prefix, rewrite.text) for prefix in config.prefixes]
    by_prompt = [_of_prompt(model, text, old, config) for text in texts]
    neurons = refined(by_prompt, config)
    embeddings = _embeddings(model).to(torch.promote_types(model.dtype, torch.float32))
    vector = config.write * embeddings[written].sum(0) - config.erase * embeddings[erased]
    deltas = [
        RankOne(down_weight_name(model, layer), vector, _chosen(model, layer, neurons))
        for layer in sorted({neuron.layer for neuron in neurons})
    ]
    for delta in deltas:
        if delta.weight not in fingerprints:
            fingerprints[delta.weight] = tensor_digest(model.weight(delta.weight))
    tokens = model.tokenizer.convert_ids_to_tokens([erased, *written])
    return Edit.of(
        model,
        deltas,
        "kn",
        [rewrite],
        config=config.model_dump(),
        seed=seed,
        notes={"neurons": [asdict(each) for each in neurons], "erased": tokens[0], "written": " ".join(tokens[1:])},
        fingerprints={delta.weight: fingerprints[delta.weight] for delta in deltas},
    )


def _of_prompt(model: Model, text: str, old: Sequence[int], config: KnowledgeNeuronsConfig) -> Tensor:
    """Attributions `[layers, d_mlp]`, mean over the object's tokens, each after what `attributed` says."""
    ids = model.ids(text)
    before = old if config.attributed == "in_turn" else ()
    found = [attributions(model, [*ids, *before[:place]], token, config) for place, token in enumerate(old)]
    return torch.stack(found).mean(0)


def _object_ids(model: Model, rewrite: Rewrite, text: str, config: KnowledgeNeuronsConfig) -> list[int]:
    if config.leading_space:
        ids, n_prompt = target_ids(model.tokenizer, rewrite.text, text, rewrite.separator)
        return ids[n_prompt:]
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise FactError(f"the tokenizer leaves nothing of the object {text!r}")
    return list(ids)


def _prediction(model: Model, text: str) -> int:
    """The token that the model says after a prompt."""
    ids = model.ids(text)
    model.require_room(ids, text)
    last = ("state", model.n_layers - 1)
    with torch.no_grad():
        return int(model.unembed(read(model, model.batch([ids]), [last])[last][:, -1]).argmax())


def _embeddings(model: Model) -> Tensor:
    """`[v, d]`."""
    return model.weight(f"{model.path(('embedding', 0))}.weight").detach()


def _chosen(model: Model, layer: int, neurons: Sequence[Neuron]) -> Tensor:
    """`[d_mlp]`: 1 for each of the neurons of a layer."""
    read_ = torch.zeros(model.d_mlp)
    read_[[neuron.index for neuron in neurons if neuron.layer == layer]] = 1
    return read_
