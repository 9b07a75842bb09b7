"""Which weights a result was computed with."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from errata.base.fingerprint import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_digest(hf: PreTrainedModel) -> str:
    """sha256, in hex, of all weights by name, read anew each time: some three seconds for GPT-2 XL in float32."""
    lines = [f"{name} {tensor_digest(weight)}" for name, weight in sorted(hf.named_parameters())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
