"""Tiny models, and what of them is compared before and after."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from errata.base.fingerprint import tensor_digest
from errata.models.loading import load_pretrained
from errata.models.model import Model
from tiny import byte_tokenizer, llama_tokenizer, short_windows, tiny

TOKENIZERS = {"byte": byte_tokenizer, "llama": llama_tokenizer}


def fresh_model(
    family: str = "gpt2",
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = byte_tokenizer,
    name: str | None = None,
    **changes: Any,
) -> Model:
    """A tiny model of its own, for a test that changes it."""
    return load_pretrained((tiny(family, dtype=dtype, **changes), tokenizer()), name=name or family)


# One model for all tests that leave it as it is.
shared_model = functools.cache(fresh_model)


@functools.cache
def narrow_model(
    family: str, attention: str = "eager", dtype: torch.dtype = torch.float64, layers: int = 4, seed: int = 0
) -> Model:
    """A model with short windows in families that have windows; one for all tests that leave it as it is."""
    changes = short_windows(family, layers) | {"attn_implementation": attention}
    return Model(tiny(family, layers, dtype, seed, **changes), byte_tokenizer(), family)


def digests(model: Model) -> dict[str, str]:
    """A digest of each weight."""
    return {name: tensor_digest(parameter) for name, parameter in model.hf.named_parameters()}


def hooks_of(model: Model) -> int:
    """How many hooks there are on its modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of a token's features, relative to the largest of them."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())
