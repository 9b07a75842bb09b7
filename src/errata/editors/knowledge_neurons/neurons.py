"""The neurons of a fact: neurons with a large attribution that several prompts share (Dai et al., section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base.errors import FactError
from errata.editors.knowledge_neurons.config import KnowledgeNeuronsConfig


@dataclass(frozen=True)
class Neuron:
    """A neuron of an MLP.

    Attributes:
        layer, index: where it is, `index` among the `d_mlp` of its layer.
        attribution: attribution of the old object's probability, mean over the prompts.
        share: share of the prompts for which it is a candidate.
    """

    layer: int
    index: int
    attribution: float
    share: float


def coarse(attribution: Tensor, threshold: float) -> Tensor:
    """Mask `[layers, d_mlp]` of neurons above `threshold` × the largest attribution; empty if that is not above 0."""
    largest = attribution.max()
    return (attribution > threshold * largest) & (largest > 0)


def refined(by_prompt: Sequence[Tensor], config: KnowledgeNeuronsConfig) -> list[Neuron]:
    """The neurons that the prompts share, the strongest first.

    Args:
        by_prompt: attributions `[layers, d_mlp]` of each prompt.
        config: `threshold`, `share` and `max_neurons` are read.

    Raises:
        FactError: if there are none.
    """
    share = torch.stack([coarse(each, config.threshold) for each in by_prompt]).double().mean(0)
    mean = torch.stack(list(by_prompt)).mean(0)
    kept = ((share >= config.share) & (share > 0) & (mean > 0)).nonzero()
    if not len(kept):
        raise FactError(
            f"no neuron raises the old object's probability in {config.share:.0%} of {len(by_prompt)} prompts, so "
            "there is none to rewrite: lower `share` or `threshold`, or give other prefixes"
        )
    values = mean[tuple(kept.T)]
    order = values.argsort(descending=True, stable=True)[: config.max_neurons].tolist()
    return [
        Neuron(layer, index, float(values[place]), float(share[layer, index]))
        for place in order
        for layer, index in [kept[place].tolist()]
    ]
