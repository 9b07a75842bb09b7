"""A model through which gradients flow without reaching a weight."""

from __future__ import annotations

from collections.abc import Iterator

from errata.base.interrupt import unbroken
from errata.models.model import Model


@unbroken
def frozen(model: Model) -> Iterator[None]:
    """No weight asks for a gradient meanwhile, so that autograd keeps nothing for one. Afterwards all are as before."""
    trainable = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
