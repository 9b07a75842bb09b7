"""Fingerprints of second moments: everything that the numbers depend on, for finding the right stored one.

| name | of what |
|---|---|
| algorithm | how errata collects; raised whenever the numbers change |
| layer, weights, config, tokenizer, dtype | the model up to the layer's keys |
| texts, max_tokens, max_length, which | the tokens that count |
| model, corpus | names for information; not compared |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from errata.models.fingerprint import weight_digest
from errata.models.model import Model

ALGORITHM = 2  # to be raised with every change that changes the numbers
LABELS = ("model", "corpus")

# Of a model's config, what says where it came from or how it generates, and changes no key.
_NOISE = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "dtype",
    "errata",
    "id2label",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprints(
    model: Model, layers: Sequence[int], corpus: str, digest: str, max_tokens: int, max_length: int, which: str = "all"
) -> dict[int, dict[str, Any]]:
    """For each layer, all that its second moment depends on, as a flat JSON-able dict."""
    of_texts = {
        "corpus": corpus,
        "texts": digest,
        "max_tokens": max_tokens,
        "max_length": max_length,
        "which": which,
    }
    return {layer: {**of_model, **of_texts} for layer, of_model in model_fingerprints(model, layers).items()}


def model_fingerprints(model: Model, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """For each layer, all of the model that its keys depend on.

    The weights that count are the embeddings and the blocks up to the layer without its down-projection:
    keys are taken before it, so that ROME's edits of the layer leave its statistics valid.
    """
    weights = _weight_digests(model, layers)
    common = {
        "algorithm": ALGORITHM,
        "model": model.name,
        "config": _config_digest(model),
        "tokenizer": _tokenizer_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return {layer: {"layer": layer, "weights": weights[layer], **common} for layer in layers}


def different(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, ignore: Container[str] = LABELS, partly: bool = False
) -> list[str]:
    """The names of what differs between two fingerprints; `partly`, only of what `wanted` tells."""
    names = wanted.keys() if partly else {*found, *wanted}
    return sorted(name for name in names if name not in ignore and found.get(name) != wanted.get(name))


def short(fingerprint: Mapping[str, Any]) -> str:
    """Sixteen hex digits for all of a fingerprint that decides."""
    deciding = {name: value for name, value in fingerprint.items() if name not in LABELS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _weight_digests(model: Model, layers: Sequence[int]) -> dict[int, str]:
    hf, anatomy = model.hf, model.anatomy
    embedding = {id(p) for p in hf.get_submodule(anatomy.embedding).parameters()}
    after = {id(p) for path in (anatomy.final_norm, anatomy.head) for p in hf.get_submodule(path).parameters()}
    every = _tensors(model)
    known: dict[str, str] = {}

    def digest(layer: int) -> str:
        above = {id(t) for block in list(model.blocks)[layer + 1 :] for t in (*block.parameters(), *block.buffers())}
        down = {id(p) for p in model.module(("key", layer)).parameters()}
        skipped = (after | above | down) - embedding  # a head that is tied to the embedding counts
        parts = []
        for name, tensor in every:
            if id(tensor) not in skipped:
                if name not in known:
                    known[name] = weight_digest(hf, name)
                parts.append([name, known[name]])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    return {layer: digest(layer) for layer in layers}


def _tensors(model: Model) -> list[tuple[str, Tensor]]:
    """Parameters, and the buffers that are stored with them (others follow from the config), by name."""
    stored = model.hf.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.hf.named_buffers() if name in stored)
    return sorted((*model.hf.named_parameters(), *buffers), key=lambda item: item[0])


def _config_digest(model: Model) -> str:
    """Digest of the config: activation, rotary base, soft caps and the like are in no weight."""
    config = json.loads(model.hf.config.to_json_string(use_diff=False))
    return hashlib.sha256(json.dumps(_without_noise(config), sort_keys=True).encode()).hexdigest()


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        kept = ((name, inner) for name, inner in value.items() if name not in _NOISE and not name.endswith("token_id"))
        return {name: _without_noise(inner) for name, inner in kept}
    return value


def _tokenizer_digest(model: Model) -> str:
    """Digest of the tokenizer's rules, without the padding and truncation that calls leave behind in it."""
    rules = json.loads(model.tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
