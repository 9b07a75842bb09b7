"""The change of one weight: ΔW, always as `[d_out, d_in]`, however the model stores the weight.

`RankOne` is ROME's ΔW = write ⊗ read: the edited weight adds `write`, times the component of its input along `read`, to
its output. `LowRank` is a sum of r of those, ΔW = write @ read: what an adapter (LoRA) holds. `Dense` is any other
change. All keep copies on the CPU in float32 (or float64), so that changes of the caller's tensors do not affect an
edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.base.errors import ConfigError


def _kept(tensor: Tensor, what: str, dimensions: int) -> Tensor:
    """A private copy of `tensor`, or an error if it can be no part of a weight's change."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != dimensions:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ConfigError(f"{what} is {shape}: it must be a floating-point tensor of {dimensions} dimension(s)")
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    kept = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(kept).all():
        raise ConfigError(f"{what} holds NaN or infinity: applied, it would break the model. Make the edit again")
    return kept


def _finite(factor: float) -> float:
    """A number to scale a change by, or an error if it is none."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise ConfigError(f"an edit cannot be scaled by {factor!r}: give a finite number, such as 0.5")
    return float(factor)


@dataclass(frozen=True, eq=False, repr=False)
class RankOne:
    """ΔW = write ⊗ read for the weight called `weight`: `write` is `[d_out]`, `read` is `[d_in]`.

    Raises:
        ConfigError: if a part is not a finite vector.
    """

    weight: str
    write: Tensor
    read: Tensor
    kind: ClassVar[str] = "rank_one"

    def __post_init__(self) -> None:
        object.__setattr__(self, "write", _kept(self.write, f"write of {self.weight}", 1))
        object.__setattr__(self, "read", _kept(self.read, f"read of {self.weight}", 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.write), len(self.read)

    def matrix(self) -> Tensor:
        """ΔW, `[d_out, d_in]`."""
        return torch.outer(self.write, self.read)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(write `[d_out, 1]`, read `[1, d_in]`), whose product is ΔW."""
        return self.write[:, None], self.read[None]

    def scaled(self, factor: float) -> RankOne:
        """factor · ΔW; the factor goes into `write`.

        Raises:
            ConfigError: if the factor is not a finite number, or too large.
        """
        return RankOne(self.weight, _finite(factor) * self.write, self.read)

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return float(self.write.double().norm() * self.read.double().norm())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store, by name."""
        return {"write": self.write, "read": self.read}

    def __repr__(self) -> str:
        return f"RankOne({self.weight!r}, write[{self.shape[0]}] x read[{self.shape[1]}])"


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """ΔW = write @ read for the weight called `weight`: `write` is `[d_out, r]`, `read` is `[r, d_in]`, r ≥ 1.

    Raises:
        ConfigError: if a part is not a finite matrix, or they do not fit together.
    """

    weight: str
    write: Tensor
    read: Tensor
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "write", _kept(self.write, f"write of {self.weight}", 2))
        object.__setattr__(self, "read", _kept(self.read, f"read of {self.weight}", 2))
        if self.write.shape[1] != len(self.read) or not self.rank:
            raise ConfigError(
                f"write {list(self.write.shape)} and read {list(self.read.shape)} of {self.weight} do not fit: "
                "they are [d_out, r] and [r, d_in], with r at least 1"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.write), self.read.shape[1]

    @property
    def rank(self) -> int:
        """Number of rank-one changes that make up the sum, r; the matrix has at most this rank."""
        return len(self.read)

    def matrix(self) -> Tensor:
        """ΔW, `[d_out, d_in]`, in the wider dtype of the two parts."""
        dtype = torch.promote_types(self.write.dtype, self.read.dtype)
        return self.write.to(dtype) @ self.read.to(dtype)

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return float(torch.linalg.matrix_norm(self.write.double() @ self.read.double()))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(write `[d_out, r]`, read `[r, d_in]`), whose product is ΔW."""
        return self.write, self.read

    def scaled(self, factor: float) -> LowRank:
        """factor · ΔW; the factor goes into `write`.

        Raises:
            ConfigError: if the factor is not a finite number, or too large.
        """
        return LowRank(self.weight, _finite(factor) * self.write, self.read)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store, by name."""
        return {"write": self.write, "read": self.read}

    def __repr__(self) -> str:
        return f"LowRank({self.weight!r}, {list(self.shape)}, rank {self.rank})"


@dataclass(frozen=True, eq=False, repr=False)
class Dense:
    """ΔW given entry by entry for the weight called `weight`: `change` is `[d_out, d_in]`.

    Raises:
        ConfigError: if it is not a finite matrix.
    """

    weight: str
    change: Tensor
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", _kept(self.change, f"change of {self.weight}", 2))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.change.shape[0], self.change.shape[1]

    def matrix(self) -> Tensor:
        """ΔW, `[d_out, d_in]`."""
        return self.change.clone()

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return float(self.change.double().norm())

    def scaled(self, factor: float) -> Dense:
        """factor · ΔW.

        Raises:
            ConfigError: if the factor is not a finite number, or too large.
        """
        return Dense(self.weight, _finite(factor) * self.change)

    def truncated(self, rank: int) -> LowRank:
        """The nearest change of at most this rank in Frobenius norm, by SVD in float64.

        `self.residual(self.truncated(rank))` is the loss.

        Raises:
            ConfigError: if the rank is less than 1.
        """
        if rank < 1:
            raise ConfigError(f"a change cannot be truncated to rank {rank}: give a rank of at least 1")
        u, s, vh = torch.linalg.svd(self.change.double(), full_matrices=False)
        dtype = self.change.dtype
        return LowRank(self.weight, (u[:, :rank] * s[:rank]).to(dtype), vh[:rank].to(dtype))

    def residual(self, other: Delta) -> float:
        """‖ΔW − other‖ / ‖ΔW‖ in Frobenius norms; 0 if both are zero."""
        lost, norm = float((self.change.double() - other.matrix().double()).norm()), self.norm()
        return lost / norm if norm else math.inf if lost else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store, by name."""
        return {"change": self.change}

    def __repr__(self) -> str:
        return f"Dense({self.weight!r}, {list(self.shape)})"


Delta = RankOne | LowRank | Dense
KINDS: dict[str, type[RankOne] | type[LowRank] | type[Dense]] = {kind.kind: kind for kind in (RankOne, LowRank, Dense)}


def total(deltas: Sequence[Delta]) -> Tensor:
    """The sum of changes of one weight, `[d_out, d_in]`."""
    matrix = deltas[0].matrix()
    for delta in deltas[1:]:
        matrix = matrix + delta.matrix()
    return matrix


def lost(whole: Sequence[Delta], written: Sequence[Delta]) -> float:
    """‖whole − written‖ / ‖whole‖ of the changes of one weight."""
    if not any(isinstance(delta, Dense) for delta in whole):
        return 0.0
    return Dense(whole[0].weight, total(whole)).residual(Dense(whole[0].weight, total(written)))
