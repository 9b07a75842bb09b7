"""Which weights a result was computed with."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from errata.base.fingerprint import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE = 64  # numbers of a weight by which a change behind torch's back is noticed

# The last fingerprint of each live model, and by what it is known to hold still.
_LAST: weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, str]] = weakref.WeakKeyDictionary()


def weights_digest(hf: PreTrainedModel) -> str:
    """sha256, in hex, of all weights by name. Read once, as long as they stay as they are: seconds for a GPT-2 XL."""
    weights = sorted(hf.named_parameters())
    state = _hashed(f"{name} {w.data_ptr()} {w._version} {tensor_digest(_sample(w))}" for name, w in weights)
    known = _LAST.get(hf)
    if known is None or known[0] != state:
        known = _LAST[hf] = (state, _hashed(f"{name} {tensor_digest(w)}" for name, w in weights))
    return known[1]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


def _hashed(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
