"""The second moment of a layer's keys, C = E[k kᵀ], not centred, and solving with it.

ROME needs C⁻¹k* (equation 2 of the paper): the direction that k* has and other keys have least. It is found
by a Cholesky factorisation in float64; nothing is inverted. If C cannot be factorised (fewer tokens than
features, or a feature that is always zero), the smallest ridge that mends it is added to its diagonal, and
`ridge` says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from errata.base.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Mean of key keyᵀ over the tokens of a corpus.

    Attributes:
        matrix: `[d_mlp, d_mlp]` float64, symmetric.
        count: number of tokens.
        layer: whose keys; None where it fits any layer (the identity).
        fingerprint: all that the numbers depend on; see `collect.fingerprint`. Empty where nothing is known.

    Raises:
        ConfigError: if the matrix is not square, symmetric and finite.
    """

    matrix: Tensor
    count: int
    layer: int | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        matrix = torch.as_tensor(self.matrix).detach().to(torch.float64)
        object.__setattr__(self, "matrix", matrix)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
            raise ConfigError(f"a second moment is a square matrix, not {list(matrix.shape)}. Collect it again")
        if not torch.isfinite(matrix).all():
            raise ConfigError("the second moment holds NaN or infinity: the model's keys overflow. Use a wider dtype")
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
            raise ConfigError("the second moment is not symmetric, so it is no mean of k kᵀ. Collect it again")

    @classmethod
    def identity(cls, d: int) -> SecondMoment:
        """C = 1 of size `d`: with it, ROME listens to k* itself, whatever other keys there are."""
        return cls(torch.eye(d, dtype=torch.float64), 0, None)

    @property
    def size(self) -> int:
        """d_mlp."""
        return self.matrix.shape[0]

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹k in float64, for one key `[d_mlp]` or several `[n, d_mlp]`.

        Raises:
            ConfigError: if the keys are of another size, or C is beyond mending by a small ridge.
        """
        if keys.dim() not in (1, 2) or keys.shape[-1] != self.size:
            raise ConfigError(
                f"keys of shape {list(keys.shape)} do not fit a second moment of size {self.size}. "
                "Collect it on this model and layer"
            )
        columns = keys.detach().to(self.matrix.device, torch.float64).reshape(-1, self.size).T
        return torch.cholesky_solve(columns, self._factor[0]).T.reshape(keys.shape).to(keys.device)

    @property
    def ridge(self) -> float:
        """What was added to C's diagonal so that it could be factorised; 0.0 if nothing was."""
        return self._factor[1]

    @cached_property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of C, ridge included: of 16 digits, solving loses its logarithm."""
        values = torch.linalg.eigvalsh(self.matrix).clamp_min(0.0) + self.ridge
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")

    @cached_property
    def _factor(self) -> tuple[Tensor, float]:
        """Cholesky factor L of C + ridge, and the ridge."""
        diagonal = self.matrix.diagonal()
        scale = float(diagonal.mean())
        # A pivot of the size of rounding means that C is singular: that it is not negative is chance.
        smallest = self.size * torch.finfo(torch.float64).eps * float(diagonal.max())
        for ridge in (0.0, *(scale * 10.0**exponent for exponent in range(-10, -1))):
            shifted = self.matrix
            if ridge:
                shifted = self.matrix.clone()
                shifted.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not failed and float(factor.diagonal().square().min()) > smallest:
                return factor, ridge
        raise ConfigError(
            f"the second moment of layer {self.layer} ({self.count} tokens for {self.size} features) "
            "cannot be factorised even with a ridge of 1 % of its mean diagonal. Collect it over more text"
        )

    def __repr__(self) -> str:
        return f"SecondMoment({self.size} x {self.size}, {self.count} tokens, layer {self.layer})"
