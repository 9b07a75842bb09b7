"""Knowledge Neurons: edits from rewrites. The model stays unchanged, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from errata.base.config import changed
from errata.base.errors import ConfigError, ErrataError, FactError, UnsupportedModel
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.editor import Editor, Progress, Step
from errata.editors.knowledge_neurons.attribution import attributions, require_neurons
from errata.editors.knowledge_neurons.config import REFERENCE, KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.neurons import Neuron, refined
from errata.editors.method import Method, Preset, Setup
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


def make_editor(model: Model, config: KnowledgeNeuronsConfig, setup: Setup) -> Editor:
    """Knowledge Neurons for one model, with prefixes sampled once from the model as it is now.

    Raises:
        ConfigError: if the tokenizer has no token to start sampling from, or the MLP has no nonlinearity to read
            before.
        UnsupportedModel: if embeddings are not as wide as what the down-projection writes.
    """
    width = _embeddings(model).shape[-1]
    if width != model.d_model:
        raise UnsupportedModel(
            f"{model.name} has embeddings of {width} numbers, and its MLPs write {model.d_model}: an object's "
            "embedding cannot be written there"
        )
    if isinstance(config.prefixes, int):
        lengths = [_LENGTHS[i % len(_LENGTHS)] for i in range(config.prefixes)]
        config = changed(config, prefixes=("", *sampled(model, lengths, setup.seed, "knowledge neurons")))
    if not config.prefixes:
        raise ConfigError('prefixes is empty: give "" for the prompt by itself')
    require_neurons(model, config)
    return Editor(
        "kn", {**config.model_dump(mode="json"), "seed": setup.seed}, partial(_make, config=config, seed=setup.seed)
    )


def _make(
    model: Model,
    rewrites: Sequence[Rewrite],
    *,
    progress: Progress | None = None,
    config: KnowledgeNeuronsConfig,
    seed: int,
) -> list[Edit | ErrataError]:
    """The neurons that express each fact, moved from its old object to the new one.

    From the down-projection's column of each neuron `erase` times the embedding of the old object's token is
    subtracted, and `write` times that of the new object's added: of the first token in which they differ, unless
    `written` says otherwise. The neurons are those to which the old object, or without one the model's prediction, is
    attributed. An edit's deltas are of rank one, one a layer. Its `notes` hold the `neurons` with their attributions,
    and the objects' tokens, `erased` and `written`.
    """
    fingerprints: dict[str, str] = {}
    found: list[Edit | ErrataError] = []
    for number, rewrite in enumerate(rewrites):
        try:
            found.append(_edit(model, rewrite, config, seed, fingerprints))
        except FactError as error:
            found.append(error)
        if progress is not None:
            progress(Step(0, 1, None, number, len(rewrites)))
    return found


def _edit(
    model: Model, rewrite: Rewrite, config: KnowledgeNeuronsConfig, seed: int, fingerprints: dict[str, str]
) -> Edit:
    assert not isinstance(config.prefixes, int)  # make_editor
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


_CODE = "the published code's way: before the nonlinearity, objects without a space"

kn = Method(
    name="kn",
    summary="Knowledge Neurons: the few neurons that express the fact are changed to write the new object's embedding",
    source="Dai et al., 2022: Knowledge Neurons in Pretrained Transformers",
    config=KnowledgeNeuronsConfig,
    make_editor=make_editor,
    presets={
        "reference": Preset("the published code's way: before the nonlinearity, objects without a space", REFERENCE)
    },
)
