"""The change of one weight: ΔW, always as `[d_out, d_in]`, whichever way the model stores the weight.

`RankOne` is ROME's ΔW = write ⊗ read: an edited weight that listens to the direction `read` of its input
and adds `write` to its output as far as it hears it. `Dense` is any other change. Both keep copies on the
CPU, in float32 (float64 stays), so that nothing that happens to the caller's tensors reaches an edit.
"""

from __future__ import annotations

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


@dataclass(frozen=True, eq=False, repr=False)
class RankOne:
    """ΔW = write ⊗ read for the weight called `weight`: `write` is `[d_out]`, `read` is `[d_in]`.

    Raises:
        ConfigError: if a part is no finite vector.
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

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return float(self.write.double().norm() * self.read.double().norm())

    def tensors(self) -> dict[str, Tensor]:
        """What is to be stored, by name."""
        return {"write": self.write, "read": self.read}

    def __repr__(self) -> str:
        return f"RankOne({self.weight!r}, write[{self.shape[0]}] x read[{self.shape[1]}])"


@dataclass(frozen=True, eq=False, repr=False)
class Dense:
    """ΔW given entry by entry for the weight called `weight`: `change` is `[d_out, d_in]`.

    Raises:
        ConfigError: if it is no finite matrix.
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

    def tensors(self) -> dict[str, Tensor]:
        """What is to be stored, by name."""
        return {"change": self.change}

    def __repr__(self) -> str:
        return f"Dense({self.weight!r}, {list(self.shape)})"


Delta = RankOne | Dense
KINDS: dict[str, type[RankOne] | type[Dense]] = {kind.kind: kind for kind in (RankOne, Dense)}
