"""A fixture: softmax in the dtype of its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def softmax_in_its_own_dtype(monkeypatch):
    """Attention in eager mode computes its softmax in float32, whatever the model's dtype; here in float64 too."""
    plain = nn.functional.softmax

    def softmax(scores, dim=-1, dtype=None, **kwargs):
        return plain(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", softmax)
