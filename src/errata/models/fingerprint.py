"""Digests of weights, to record which ones a result was computed with."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from errata.base.fingerprint import tensor_digest
from errata.models.modules import at_hand

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_digest(hf: PreTrainedModel) -> str:
    """sha256, in hex, of all weights by name. Computed on each call: some three seconds for GPT-2 XL in float32."""
    # A tied weight counts once; those that accelerate has offloaded are no longer one object.
    names = (name for name, each in hf.named_parameters() if not (each.is_meta and name in hf.all_tied_weights_keys))
    lines = [f"{name} {weight_digest(hf, name)}" for name in sorted(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weight_digest(hf: PreTrainedModel, name: str) -> str:
    """The digest of a parameter or buffer, wherever accelerate keeps it."""
    owner, _, leaf = name.rpartition(".")
    module = hf.get_submodule(owner)
    with at_hand(module):
        return tensor_digest(getattr(module, leaf))
