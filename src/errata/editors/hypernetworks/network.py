"""Base of the networks of trained editors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from errata.base.config import Config
from errata.base.facts import Rewrite
from errata.editors.hypernetworks.factors import Factors

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) by name of the map


class NetworkConfig(Config):
    """Settings that all trained editors have."""

    blocks: int = Field(3, ge=1, description="Number of blocks, counted from the last, whose MLP weights are edited.")


class Network(nn.Module, ABC):
    """Base class of networks that turn each edit's gradient factors into a low-rank change.

    Attributes:
        config: its settings.
        shapes: shapes of the edited maps, in order.
        d_model: width of the model's embeddings.
    """

    method: ClassVar[str]
    config: NetworkConfig
    shapes: Shapes
    d_model: int

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors], texts: Sequence[Tensor]) -> dict[str, Factors]:
        """Read and write vectors of each map, so that ΔW = Σ write ⊗ read over an edit's rows.

        Args:
            factors: gradient factors of the edits' losses, by map.
            texts: for each edit, the embeddings `[n, d_model]` of `condition(rewrite)`.
        """

    @abstractmethod
    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameters with their learning rates, as torch's optimisers take them."""


def condition(rewrite: Rewrite) -> str:
    """An edit as text: the old object, the new one and the prompt (De Cao et al., 2021, section 3)."""
    return f"{rewrite.fact.object} >> {rewrite.new_object} || {rewrite.text}"
