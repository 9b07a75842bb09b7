"""Digests of tensors, which record the bytes that a result was made from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """sha256, in hex, of a tensor's dtype, shape and bytes in row-major order.

    The same for equal values on any device and in any memory layout; another for the same numbers in
    another dtype, and for 0.0 and -0.0, which compare equal.
    """
    import torch  # here, because floor 0 is imported where no torch is wanted

    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
