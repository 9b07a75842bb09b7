"""The rank-one change that writes (k*, v*) into the weight: equation 2 of the paper.

    ΔW = write ⊗ read,   write = v* − v₀ = δ,   read = C⁻¹k* / (k₀ᵀ C⁻¹ k*)

(k₀, v₀), the anchor, is the point from which δ is measured. This is the only ΔW along C⁻¹k* with ΔW k₀ = δ. For k₀ = k*
it is also the ΔW that least changes W's output on the keys whose second moment is C.

* "consistent": k₀ = k* = k̄, the mean key, and v₀ = W k̄ + b, the mean of the contexts' own values. While
  v* was optimised, context j wrote v_j + δ; the mean of that over the contexts is W k̄ + b + δ = v*. After
  the edit it writes v_j + δ (read · k_j), and the mean of read · k_j is read · k̄ = 1: on average every
  context gets exactly the δ that it was optimised with, and Ŵ k* + b = v* holds to rounding. In the form
  "z", context j wrote z = v₀ + δ, so v* = z again.
* "reference": k₀ and v₀ are the bare prompt's; the direction is still C⁻¹k̄. Then Ŵ k₀ + b = v₀ + δ, and
  what happens at k̄ depends on how far the two keys are apart.

The bias b is the same before and after, so it cancels in ΔW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from errata.base.errors import Diverged
from errata.editors.rome.key import Keys
from errata.edits.delta import RankOne
from errata.models.model import Model


def read_vector(direction: Tensor, anchor_key: Tensor) -> Tensor:
    """read `[d_mlp]`: along C⁻¹k̄, `direction`, with read · anchor_key = 1. In float64 on the CPU.

    Raises:
        Diverged: if the anchor's key is orthogonal to that direction, or a key is zero.
    """
    scale = torch.dot(anchor_key, direction)
    if not torch.isfinite(scale) or scale == 0:
        raise Diverged(
            f"the key gives ROME's update a scale of {float(scale)}, so there is none. "
            'The model is as it was; try key="consistent", another layer or another prompt'
        )
    return direction / scale


def insert(model: Model, weight: str, write: Tensor, read: Tensor) -> RankOne:
    """ΔW = write ⊗ read in float32 (float64 for a float64 model)."""
    compute = torch.promote_types(model.dtype, torch.float32)
    return RankOne(weight, write.to(compute), read.to(compute))


def constraint(old: Tensor, new: Tensor, change: RankOne, anchor: Keys, delta: Tensor) -> dict[str, float]:
    """Errors of a weight `[d_out, d_in]` that was `old` and is `new` against the edit; computed in float64.

    Returns:
        residual: ‖Ŵk₀ + b − v*‖ / ‖v*‖. As v* = v₀ + δ and v₀ = W k₀ + b, the numerator is (Ŵ − W) k₀ − δ.
        rounding: ‖(Ŵ − W) − ΔW‖ / ‖ΔW‖, what the weight's dtype makes of the change.
    """
    if old.device.type == "mps":  # which has no float64
        old, new = old.cpu(), new.cpu()
    key, value, delta = (each.to(old.device, torch.float64) for each in (anchor.mean_key, anchor.mean_value, delta))
    gained, wanted = new.double() - old.double(), change.matrix().to(old.device, torch.float64)
    size = float(wanted.norm())
    return {
        "residual": float((gained @ key - delta).norm() / (value + delta).norm()),
        "rounding": float((gained - wanted).norm()) / size if size else 0.0,
    }
