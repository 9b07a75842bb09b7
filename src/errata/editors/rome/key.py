"""The key k*: what the edited MLP's down-projection reads at the fact's token, averaged over contexts.

k* = 1/N Σ_j k(x_j + p) (equation 3 of the paper), where p is the prompt up to the fact's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.rome.contexts import Context
from errata.models.model import Model
from errata.models.tokens import Role
from errata.passes.reading import read


@dataclass(frozen=True)
class Keys:
    """What one layer's down-projection reads and writes at the fact's token of each context.

    Attributes:
        keys: `[n, d_mlp]`, as the model computed them.
        values: `[n, d_model]`, bias included.
        lookups: index of the fact's token in each context.
    """

    keys: Tensor
    values: Tensor
    lookups: tuple[int, ...]

    @property
    def mean_key(self) -> Tensor:
        """k̄ `[d_mlp]`, float64 on the CPU."""
        return self.keys.cpu().double().mean(0)

    @property
    def mean_value(self) -> Tensor:
        """W k̄ + b `[d_model]`, float64 on the CPU: an affine map's mean output is its output at the mean."""
        return self.values.cpu().double().mean(0)


def read_keys(model: Model, layer: int, contexts: Sequence[Context], role: Role) -> Keys:
    """Keys and values of a layer at the token in that role, all contexts in one batch.

    Raises:
        FactError: if a context has no token in that role, or more tokens than the model can read.
    """
    found = [context.lookup(model, role) for context in contexts]
    batch = model.batch([ids for ids, _ in found], [context.text for context in contexts])
    lookups = tuple(index for _, index in found)
    rows, columns = torch.arange(len(lookups)), torch.tensor(lookups)
    streams = read(model, batch, [("key", layer), ("value", layer)])
    return Keys(streams["key", layer][rows, columns], streams["value", layer][rows, columns], lookups)
