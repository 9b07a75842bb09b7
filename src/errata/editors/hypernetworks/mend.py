"""MEND's network: it maps an edit's gradient factors to better ones (Mitchell et al., 2022, section 3).

Each row x = (u, δ) of a map's factors is normalised and goes through two residual layers of low rank,

    x ← x + σ(s ⊙ (U V x + b) + t),

where σ is ReLU in the first and the identity in the last, and is split into ũ and δ̃. The change is ΔW = −α Σ δ̃ ⊗ ũ:
its rank is at most the number of the edit's tokens. Maps of one shape share a network, but each has its own s, t, α,
mean and deviation. U is zero at first, so that training begins at the normalised gradient.

network="reference" is the published code's network: σ is ReLU in the last layer too, maps of one shape share mean and
deviation, and the change is +α Σ δ̃ ⊗ ũ, so that training begins with steps up the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from errata.editors.hypernetworks.factors import Factors
from errata.editors.hypernetworks.network import Network, NetworkConfig, Shapes

_TINY = 1e-7  # under a standard deviation


class MendConfig(NetworkConfig):
    """Settings of MEND's network; the defaults are those published for large models."""

    rank: int = Field(1920, ge=1, description="Rank of U and V, at most the length of a row of factors.")
    hidden: int = Field(1, ge=0, description="Number of layers before the last.")
    edit_lr: float = Field(1e-4, gt=0, description="Initial value of every map's α, the factor of its change.")
    edit_lr_lr: float = Field(1e-4, ge=0, description="Learning rate of α.")
    network: Literal["paper", "reference"] = Field(
        "paper", description='"paper": the network of the formulas. "reference": the network of the published code.'
    )


class MendNetwork(Network):
    """MEND's network for maps of these shapes."""

    method: ClassVar[str] = "mend"
    config: MendConfig

    def __init__(self, shapes: Shapes, d_model: int, config: MendConfig):
        super().__init__()
        self.config, self.shapes, self.d_model = config, dict(shapes), d_model
        alike: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            alike.setdefault(shape, []).append(name)
        self._alike = list(alike.values())
        self._reference = config.network == "reference"
        clamped = config.hidden + self._reference
        self.shared = nn.ModuleList(
            [_Residual(sum(shape), len(names), config.rank, config.hidden, clamped) for shape, names in alike.items()]
        )
        self.alpha = nn.Parameter(torch.full((len(self.shapes),), config.edit_lr))
        self.moments = nn.ModuleList(
            [_Moments(sum(shape)) for shape in (alike if self._reference else self.shapes.values())]
        )

    def forward(self, factors: Mapping[str, Factors], texts: Sequence[Tensor]) -> dict[str, Factors]:
        """See `Network.forward`; during training, it also accumulates the moments of the inputs."""
        found: dict[str, Factors] = {}
        order = list(self.shapes)
        sign = 1 if self._reference else -1
        for group, (names, shared) in enumerate(zip(self._alike, self.shared, strict=True)):
            rows, modes = [], []
            for mode, name in enumerate(names):
                each = factors[name]
                moments = cast(_Moments, self.moments[group if self._reference else order.index(name)])
                row = torch.cat([each.entering, each.leaving], 1)
                if self.training:
                    moments.gather(row)
                rows.append(moments.normalised(row))
                modes.append(torch.full((len(row),), mode, device=row.device))
            out = shared(torch.cat(rows), torch.cat(modes)).split([len(row) for row in rows])
            for name, row in zip(names, out, strict=True):
                each = factors[name]
                entering, leaving = row.split([each.entering.shape[1], each.leaving.shape[1]], 1)
                found[name] = Factors(entering, sign * self.alpha[order.index(name)] * leaving, each.owner)
        return {name: found[name] for name in order}

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups; α has its own learning rate."""
        others = [each for name, each in self.named_parameters() if name != "alpha"]
        return [{"params": others, "lr": learning_rate}, {"params": [self.alpha], "lr": self.config.edit_lr_lr}]


class _Residual(nn.Module):
    """The residual layers; the first `clamped` end in ReLU. Each of `maps` maps has its own scales and shifts."""

    def __init__(self, width: int, maps: int, rank: int, hidden: int, clamped: int):
        super().__init__()
        self.clamped = clamped
        rank = min(rank, width)
        layers = hidden + 1
        self.U = nn.ParameterList([torch.zeros(width, rank) for _ in range(layers)])
        self.V = nn.ParameterList([torch.randn(rank, width) for _ in range(layers)])
        self.bias = nn.ParameterList([torch.zeros(width) for _ in range(layers)])
        self.scale = nn.ParameterList([torch.ones(maps, width) for _ in range(layers)])
        self.shift = nn.ParameterList([torch.zeros(maps, width) for _ in range(layers)])

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        """Rows `[n, width]`, each of one of the maps, `[n]`."""
        for i in range(len(self.U)):
            inner = self.scale[i][maps] * ((x @ self.V[i].T) @ self.U[i].T + self.bias[i]) + self.shift[i][maps]
            # Not relu(), whose gradient at 0 is 0: U is zero at first, and the layer would stay at nothing for ever.
            x = x + (inner.clamp(min=0) if i < self.clamped else inner)
        return x


class _Moments(nn.Module):
    """Mean and variance of all rows so far, gathered in float64 without keeping them."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def gather(self, rows: Tensor) -> None:
        """Add rows `[n, width]` (Chan, Golub and LeVeque, 1979)."""
        if not len(rows):
            return
        wide = rows.double()
        mean, count = wide.mean(0), self.count + len(rows)
        apart = mean - self.mean
        self.squares += (wide - mean).square().sum(0) + apart.square() * self.count * len(rows) / count
        self.mean += apart * len(rows) / count
        self.count.copy_(count)

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows normalised to mean 0 and deviation 1 by the current moments."""
        if self.count < 2:
            return rows
        deviation = (self.squares / (self.count - 1)).sqrt()
        return ((rows.double() - self.mean) / (deviation + _TINY)).to(rows.dtype)
