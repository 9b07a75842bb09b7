"""The corrupted run: noise on the embeddings of the subject's tokens.

The paper adds Gaussian noise ε ~ N(0, ν) with ν = 3σ, σ the standard deviation of the embeddings of subjects'
tokens. The same noise is used at every site, so that differences between sites are the sites' own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from errata.base.errors import ConfigError
from errata.models.model import Model
from errata.passes.reading import read


def subject_sigma(model: Model, subjects: Iterable[str]) -> float:
    """σ: the standard deviation of all numbers in the embeddings of the subjects' tokens.

    Each subject is tokenized on its own, as the published code does.

    Raises:
        ConfigError: if there are no subjects.
    """
    found = []
    for subject in subjects:
        embedded = read(model, model.encode([subject]), [("embedding", 0)])["embedding", 0]
        found.append(embedded.flatten().double())
    if not found:
        raise ConfigError("σ is measured on subjects, and none were given: name at least one")
    return float(torch.cat(found).std())


def gaussian(samples: int, tokens: int, width: int, seed: int) -> Tensor:
    """Standard normal noise `[samples, tokens, width]` in float64.

    From numpy's `RandomState`, so that `seed=1` gives the published code's own noise.
    """
    return torch.from_numpy(np.random.RandomState(seed).randn(samples, tokens, width))
