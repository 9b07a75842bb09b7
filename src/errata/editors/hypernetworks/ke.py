"""KE's network: it reads the edit as text and computes masks for the gradient (De Cao et al., 2021, section 4.2).

A bidirectional LSTM over the embeddings of the old object, the new one and the prompt gives h. For each map W `[d_out,
d_in]` a conditioner computes, from h, vectors α, β of d_out numbers, γ, δ of d_in, and a number η:

    ΔW = −σ(η) · (α̂ ⊙ ∇W + β̂),   α̂ = softmax(α) γᵀ,   β̂ = softmax(β) δᵀ.

The gradient is Σ δ_t ⊗ u_t over tokens, and a mask of rank one goes into its factors: α̂ ⊙ ∇W = Σ (softmax(α) ⊙ δ_t) ⊗
(γ ⊙ u_t). So the change is of low rank too, one more than the edit has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from errata.editors.hypernetworks.factors import Factors
from errata.editors.hypernetworks.network import Network, NetworkConfig, Shapes


class KeConfig(NetworkConfig):
    """Settings of KE's network."""

    hidden: int = Field(128, ge=1, description="Width of the conditioners and of the LSTM, in each direction.")
    largest: float = Field(1.0, gt=0, description="Factor of σ(η), and so the largest scale of a change.")


class KeNetwork(Network):
    """KE's network for maps of these shapes, in a model with embeddings of width d_model."""

    method: ClassVar[str] = "ke"
    config: KeConfig

    def __init__(self, shapes: Shapes, d_model: int, config: KeConfig):
        super().__init__()
        self.config, self.shapes, self.d_model = config, dict(shapes), d_model
        self.lstm = nn.LSTM(d_model, config.hidden, bidirectional=True, batch_first=True)
        self.conditioners = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(2 * config.hidden, config.hidden),
                    nn.Tanh(),
                    nn.Linear(config.hidden, 2 * (d_out + d_in) + 1),
                )
                for d_out, d_in in self.shapes.values()
            ]
        )

    def forward(self, factors: Mapping[str, Factors], texts: Sequence[Tensor]) -> dict[str, Factors]:
        """See `Network.forward`."""
        _, (ends, _) = self.lstm(pack_sequence([*texts], enforce_sorted=False))
        h = torch.cat([ends[0], ends[1]], 1)
        edits = torch.arange(len(texts), device=h.device)
        found = {}
        for (name, (d_out, d_in)), conditioner in zip(self.shapes.items(), self.conditioners, strict=True):
            alpha, beta, gamma, delta, eta = conditioner(h).split([d_out, d_out, d_in, d_in, 1], 1)
            step = -self.config.largest * eta.sigmoid()
            given, of = factors[name], factors[name].owner
            entering = torch.cat([gamma[of] * given.entering, delta])
            leaving = torch.cat([(step * alpha.softmax(1))[of] * given.leaving, step * beta.softmax(1)])
            owner = torch.cat([of, edits])
            order = owner.argsort(stable=True)
            found[name] = Factors(entering[order], leaving[order], owner[order])
        return found

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group: all parameters have the same learning rate."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]
