"""Causal traces by plain passes: one full pass of the model a site."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from errata.base.facts import Fact
from errata.models.model import Model
from errata.tracing.result import CausalTrace
from plain_trace import PlainTrace, window_around

PARTS = ("state", "mlp", "attention", "severed_mlp", "severed_attention")

LAYERS, SAMPLES = 4, 2

MIDDLE = Fact("Space", "The {} is in the city of")  # The| S p a ce| is in the c it y of


def drawn(model: Model, form: str, subject: str, tokens: int, seed: int = 1) -> np.ndarray:
    """Noise `[samples, tokens, d]`, as the table in `tracing.noise` says it, σ measured on the fact's subject."""
    embedding = model.hf.get_input_embeddings()
    ids = model.tokenizer(subject, add_special_tokens=False)["input_ids"]
    shape = (SAMPLES, tokens, embedding.weight.shape[1])
    with torch.no_grad():
        vocabulary = embedding(torch.arange(len(model.tokenizer))).double().numpy()
    sigma = vocabulary[ids].std(ddof=1)
    normal = np.random.RandomState(seed).randn(*shape)
    if form[0] == "s":
        return float(form[1:]) * sigma * normal
    if form[0] == "u":
        return float(form[1:]) * sigma * np.random.RandomState(seed).uniform(-1, 1, shape)
    if form[0] not in "mt":
        return float(form) * normal
    values, vectors = np.linalg.eigh(np.cov(vocabulary.T))
    spread = normal @ (vectors @ np.diag(values**0.5) @ vectors.T)
    if form[0] == "t":
        degrees = float(form[1:])
        chi = np.random.RandomState(seed + 1).chisquare(degrees, SAMPLES * tokens).reshape(SAMPLES, tokens, 1)
        spread = spread * np.sqrt((degrees - 2) / chi)
    return vocabulary.mean(0) + spread


def plainly(
    model: Model,
    fact: Fact,
    subject: tuple[int, int],
    form: str = "s2",
    *,
    replace: bool = False,
    after: int = 0,
    object_tokens: int = 0,
) -> PlainTrace:
    """The fact's trace by plain passes; of its object so many tokens, or the model's own answer."""
    ids = model.tokenizer(fact.text)["input_ids"]
    whole = model.tokenizer(f"{fact.text} {fact.object}")["input_ids"]
    corrupted = range(subject[0], min(subject[1] + 1 + after, len(ids)))
    noise = drawn(model, form, fact.subject, len(corrupted))
    target = whole[len(ids) :][:object_tokens] or None
    return PlainTrace(model.hf, model.name, ids, corrupted, noise, target, replace)


def sites(found: CausalTrace, parts: Iterable[str] = PARTS) -> list[tuple[str, int, int]]:
    """All of a trace, from the subject's first token on."""
    tokens, layers = next(iter(found.restored.values())).shape
    return [
        (part, token, layer) for part in parts for token in range(found.subject[0], tokens) for layer in range(layers)
    ]


def some(found: CausalTrace, count: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """Sites at random, as many of each part."""
    rng = np.random.default_rng(seed)
    return [
        places[index]
        for part in found.restored
        for places in [sites(found, [part])]
        for index in rng.choice(len(places), min(count, len(places)), replace=False)
    ]


def largest_difference(found: CausalTrace, plain: PlainTrace, places: Iterable[tuple[str, int, int]]) -> float:
    """Between probabilities of a trace and plain ones, relative to these."""
    width, edges = found.settings["window"], found.settings["window_edges"]
    pairs = [(found.clean, plain.clean), (found.corrupted, plain.disturbed)]
    for part, token, layer in places:
        window = window_around(layer, width, edges, plain.layers)
        pairs.append((found.restored[part][token, layer], plain.restored(part, token, layer, window)))
    return max(abs(one - other) / other for one, other in pairs)


def require_something_moved(found: CausalTrace) -> None:
    """A trace in which nothing happens would agree with any."""
    assert abs(found.total_effect) > 1e-4 * found.clean
    for part in found.restored:
        effects = found.indirect_effect(part)[found.subject[0] :]
        assert np.abs(effects).max() > 1e-4 * found.clean
        assert len(np.unique(effects.round(12))) > 1 or effects.size == LAYERS
