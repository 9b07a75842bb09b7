"""The second moment of a layer's keys, C = E[k kᵀ], not centred, and solving with it.

ROME needs C⁻¹k* (equation 2 of the paper): the direction along which k* is large and other keys are small. It is found
by a Cholesky factorisation in float64; nothing is inverted. If C cannot be factorised (fewer tokens than features, or a
feature that is always zero), the smallest ridge that makes it factorisable is added to its diagonal; `ridge` is its
size. A requested ridge (`with_ridge`) is always added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, StaleStatistics
from errata.statistics.fingerprint import LABELS, different

# What the parts of one corpus may differ in and still be merged.
_OF_TEXTS = (*LABELS, "texts", "max_tokens", "merged")


@dataclass(frozen=True)
class Halves:
    """Difference in C⁻¹k between C of one half of the tokens and C of the other half.

    Both are medians over sampled keys. The whole C is about half as far from its limit as its halves are from each
    other, and four times as many tokens halve the difference.

    Attributes:
        cosine: between the two C⁻¹k, from -1 to 1.
        difference: ‖u₁ - u₂‖ / ‖(u₁ + u₂) / 2‖, where u = C⁻¹k / kᵀC⁻¹k is what ROME's edit reads.
        keys: how many keys were sampled.
    """

    cosine: float
    difference: float
    keys: int

    @classmethod
    def of(cls, first: SecondMoment, second: SecondMoment, keys: Tensor) -> Halves | None:
        """The comparison for some keys `[n, d_mlp]`; None where there is none, or a half cannot be solved with."""
        try:
            one, other = first.solve(keys.double()), second.solve(keys.double())
        except ConfigError:
            return None
        cosine = torch.cosine_similarity(one, other, dim=-1).median()
        one, other = (u / (keys * u).sum(-1, keepdim=True) for u in (one, other))
        difference = ((one - other).norm(dim=-1) / ((one + other) / 2).norm(dim=-1)).median()
        if not torch.isfinite(cosine + difference):
            return None
        return cls(float(cosine), float(difference), len(keys))


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Mean of key keyᵀ over the tokens of a corpus.

    Attributes:
        matrix: `[d_mlp, d_mlp]` float64, symmetric.
        count: number of tokens.
        layer: whose keys; None where it fits any layer (the identity).
        fingerprint: all that the numbers depend on; see `fingerprint.fingerprints`. Empty where nothing is known.
        asked_ridge: a ridge that was asked for, in units of the mean of C's diagonal.
        halves: how far C⁻¹k moves between halves of the tokens; None where that was not measured, as with fewer
            tokens in a half than features.

    Raises:
        ConfigError: if the matrix is not square, symmetric and finite, or the ridge is negative.
    """

    matrix: Tensor
    count: int
    layer: int | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    asked_ridge: float = 0.0
    halves: Halves | None = None

    def __post_init__(self) -> None:
        matrix = torch.as_tensor(self.matrix).detach().to(torch.float64)
        object.__setattr__(self, "matrix", matrix)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
            raise ConfigError(f"a second moment is a square matrix, not {list(matrix.shape)}. Collect it again")
        low, high = torch.aminmax(matrix)
        if not torch.isfinite(high - low):
            raise ConfigError("the second moment holds NaN or infinity: the model's keys overflow. Use a wider dtype")
        slack = 1e-6 * max(float(high), -float(low))
        if not (torch.equal(matrix, matrix.T) or torch.allclose(matrix, matrix.T, rtol=1e-4, atol=slack)):
            raise ConfigError("the second moment is not symmetric, so it is not a mean of k kᵀ. Collect it again")
        if not 0 <= self.asked_ridge < float("inf"):
            raise ConfigError(f"the ridge is {self.asked_ridge}: it is a share of C's mean diagonal, 0 or more")

    @classmethod
    def identity(cls, d: int) -> SecondMoment:
        """The identity matrix of size `d`: with it, ROME edits along k* itself and ignores other keys."""
        return cls(torch.eye(d, dtype=torch.float64), 0, None)

    @classmethod
    @checked(moments=["SecondMoment"])
    @without_autocast
    def merged(cls, moments: Sequence[SecondMoment]) -> SecondMoment:
        """The second moment of all tokens of several, such as of the shards of a corpus.

        Raises:
            ConfigError: if there is none, or the same texts are in it twice.
            StaleStatistics: if they are not of one layer of one model, collected in one way.
        """
        if not moments:
            raise ConfigError("there is no second moment to merge: give at least one")
        first, *others = moments
        for other in others:
            names = different(other.fingerprint, first.fingerprint, ignore=_OF_TEXTS)
            if (other.layer, other.size) != (first.layer, first.size) or names:
                raise StaleStatistics(
                    f"{first} and {other} differ in {', '.join(names) or 'layer or size'}, so they are not parts of "
                    "one second moment. Merge those of one layer, model and way of collecting"
                )
        parts = [part for moment in moments for part in moment.fingerprint.get("merged", [_texts_of(moment)])]
        if any(parts.count(part) > 1 for part in parts if part["texts"]):
            raise ConfigError("the same texts are in two of the second moments, and would count twice: leave one out")
        count = sum(moment.count for moment in moments)
        if not count:
            raise ConfigError("the second moments to merge are of no tokens, so none has a weight")
        matrix = sum(moment.matrix * (moment.count / count) for moment in moments)
        common = {name: value for name, value in first.fingerprint.items() if name not in ("corpus", "texts")}
        if common:
            common |= {
                "corpus": " + ".join(str(part["corpus"]) for part in parts),
                "texts": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
                "max_tokens": sum(part["max_tokens"] for part in parts),
                "merged": parts,
            }
        return cls(torch.as_tensor(matrix), count, first.layer, common)

    @without_autocast
    def with_ridge(self, ridge: float) -> SecondMoment:
        """The same C, solved with a ridge of at least `ridge` times the mean of its diagonal.

        Raises:
            ConfigError: if it is negative.
        """
        return dataclasses.replace(self, asked_ridge=ridge)

    @property
    def size(self) -> int:
        """d_mlp."""
        return self.matrix.shape[0]

    @without_autocast
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
        """Value added to C's diagonal, because it was requested or needed for the factorisation; 0.0 if none."""
        return self._factor[1]

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of C, ridge included, `[d_mlp]` float64, ascending; negative ones, from rounding, are zero."""
        return torch.linalg.eigvalsh(self.matrix).clamp_min(0.0) + self.ridge

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of C, ridge included. Solving loses its logarithm of float64's 16 digits."""
        values = self.eigenvalues
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")

    @property
    def effective_rank(self) -> float:
        """Effective number of the keys' directions, 1 to d_mlp: exp of the entropy of the normalised eigenvalues.

        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
        """
        shares = self.eigenvalues / self.eigenvalues.sum()
        return float(torch.special.entr(shares).sum().exp())

    @cached_property
    def _factor(self) -> tuple[Tensor, float]:
        """Cholesky factor L of C + ridge, and the ridge."""
        diagonal = self.matrix.diagonal()
        scale = float(diagonal.mean())
        # A pivot of the size of rounding means that C is singular: that it is not negative is chance.
        smallest = self.size * torch.finfo(torch.float64).eps * float(diagonal.max())
        asked = self.asked_ridge
        for share in (asked, *(tenth for e in range(-10, -1) if (tenth := 10.0**e) > asked)):
            ridge = scale * share
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


def _texts_of(moment: SecondMoment) -> dict[str, Any]:
    return {name: moment.fingerprint.get(name) for name in ("corpus", "texts", "max_tokens")}
