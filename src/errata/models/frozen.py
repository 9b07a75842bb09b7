"""Context in which gradients flow through a model but not to its weights."""

from __future__ import annotations

from collections.abc import Iterator

from errata.base.interrupt import unbroken
from errata.models.model import Model


@unbroken
def frozen(model: Model) -> Iterator[None]:
    """Context in which no weight requires a gradient, so that autograd stores nothing for it; restored afterwards."""
    trainable = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
