"""Collecting second moments: C = E[k kᵀ] over all tokens of a corpus, all asked layers in one pass.

Every token counts, padding alone does not. Products are taken in float32 (float64 for a float64 model) and
summed in float64. The forward pass stops at the highest layer asked for, before its down-projection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.base.errors import ConfigError
from errata.base.fingerprint import tensor_digest
from errata.models.model import Model
from errata.passes.reading import read
from errata.statistics.corpus import Corpus, TextDigest
from errata.statistics.second_moment import SecondMoment

ALGORITHM = 1  # to be raised with every change that changes the numbers
MAX_TOKENS = 100_000

Progress = Callable[[int, int], None]  # (tokens read, tokens wanted)


def collect(
    model: Model,
    layers: Iterable[int],
    texts: Corpus | Iterable[str],
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[int, SecondMoment]:
    """Second moments of the keys of some layers over a corpus.

    Texts are read in order until `max_tokens` tokens are there; the last one is cut to fit. Memory: one
    `[d_mlp, d_mlp]` float64 matrix a layer, and the keys of a batch in every layer.

    Args:
        layers: 0-based layers.
        texts: a `Corpus`, or any iterable of texts, which is read once and as far as needed.
        max_tokens: how many tokens to read at most.
        max_length: cut every text to so many tokens; None: to what the model can read.
        batch_size: texts in one forward pass. It changes the result by rounding alone.
        progress: called after every batch with (tokens read, `max_tokens`).

    Raises:
        ConfigError: if a layer is not there, a number is out of range, or the texts have no tokens.
    """
    wanted = checked_layers(model, layers)
    max_length = checked_length(model, max_tokens, max_length)
    if isinstance(texts, str):
        raise ConfigError("texts is one string, whose letters would be the texts: put it in a list")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: at least one text a forward pass is needed")
    sums = {layer: _zeros(model) for layer in wanted}
    consumed = TextDigest()
    count = 0
    for rows in _batches(_rows(model, texts, max_tokens, max_length, consumed), batch_size):
        batch = model.batch(rows)
        keys = read(model, batch, [("key", layer) for layer in wanted])
        tokens = batch.attention_mask.bool()
        for layer in wanted:
            here = keys.pop(("key", layer))[tokens]
            here = here.to(torch.promote_types(here.dtype, torch.float32))
            sums[layer] += (here.T @ here).to(sums[layer].device).double()
        count += sum(map(len, rows))
        if progress is not None:
            progress(count, max_tokens)
    if not count:
        raise ConfigError("the corpus has no tokens, so there are no keys to average. Give at least one text")
    name, digest = (texts.name, texts.digest) if isinstance(texts, Corpus) else ("texts", consumed.hex)
    prints = fingerprints(model, wanted, name, digest, max_tokens, max_length)
    return {layer: SecondMoment((sums[layer] / count).cpu(), count, layer, prints[layer]) for layer in wanted}


def fingerprints(
    model: Model, layers: Sequence[int], corpus: str, digest: str, max_tokens: int, max_length: int
) -> dict[int, dict[str, Any]]:
    """For each layer, all that its second moment depends on, as a flat JSON-able dict.

    The weights that count are the embeddings and the blocks up to the layer without its down-projection:
    keys are taken before it, so that ROME's edits of the layer leave its statistics valid.
    """
    weights = _weight_digests(model, layers)
    common = {
        "algorithm": ALGORITHM,
        "tokenizer": _tokenizer_digest(model),
        "corpus": corpus,
        "texts": digest,
        "max_tokens": max_tokens,
        "max_length": max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return {layer: {"layer": layer, "weights": weights[layer], **common} for layer in layers}


def checked_length(model: Model, max_tokens: int, max_length: int | None) -> int:
    """The length to which texts are cut.

    Raises:
        ConfigError: if a number is out of range.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}: at least one token is needed")
    if max_length is None:
        return model.max_length
    if not 1 <= max_length <= model.max_length:
        raise ConfigError(f"max_length is {max_length}: {model.name} reads 1 to {model.max_length} tokens")
    return max_length


def checked_layers(model: Model, layers: Iterable[int]) -> list[int]:
    """Layers in order, each once.

    Raises:
        ConfigError: if there is none, or the model has not one of them.
    """
    wanted = sorted(set(layers))
    if not wanted:
        raise ConfigError(f"no layer to collect: name at least one of 0 to {model.n_layers - 1}")
    for layer in wanted:
        model.path(("key", layer))  # raises for a layer that is not there
    return wanted


def _zeros(model: Model) -> Tensor:
    # Apple's GPUs have no float64
    device = "cpu" if model.device.type == "mps" else model.device
    return torch.zeros(model.d_mlp, model.d_mlp, dtype=torch.float64, device=device)


def _rows(
    model: Model, texts: Iterable[str], max_tokens: int, max_length: int, consumed: TextDigest
) -> Iterator[list[int]]:
    """Token ids of text after text, cut to `max_length`, `max_tokens` in all."""
    left = max_tokens
    for text in texts:
        consumed.add(text)
        ids = model.tokenizer(text, verbose=False)["input_ids"][: min(max_length, left)]
        if ids:
            yield ids
        left -= len(ids)
        if not left:
            return


def _batches(rows: Iterable[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Rows in batches, out of order within a window so that rows of a length are together: less padding."""
    window: list[list[int]] = []

    def sorted_batches() -> Iterator[list[list[int]]]:
        window.sort(key=len)
        yield from (window[start : start + size] for start in range(0, len(window), size))

    for row in rows:
        window.append(row)
        if len(window) == 16 * size:
            yield from sorted_batches()
            window = []
    yield from sorted_batches()


def _weight_digests(model: Model, layers: Sequence[int]) -> dict[int, str]:
    hf, anatomy = model.hf, model.anatomy
    embedding = {id(p) for p in hf.get_submodule(anatomy.embedding).parameters()}
    after = {id(p) for path in (anatomy.final_norm, anatomy.head) for p in hf.get_submodule(path).parameters()}
    known: dict[str, str] = {}

    def digest(layer: int) -> str:
        above = {id(p) for block in list(model.blocks)[layer + 1 :] for p in block.parameters()}
        down = {id(p) for p in model.module(("key", layer)).parameters()}
        skipped = (after | above | down) - embedding  # a head that is tied to the embedding counts
        parts = []
        for name, parameter in sorted(hf.named_parameters()):
            if id(parameter) not in skipped:
                if name not in known:
                    known[name] = tensor_digest(parameter)
                parts.append([name, known[name]])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    return {layer: digest(layer) for layer in layers}


def _tokenizer_digest(model: Model) -> str:
    """Digest of the tokenizer's rules, without the padding and truncation that calls leave behind in it."""
    rules = json.loads(model.tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
