"""The noise of corrupted runs: measured once on a model, drawn for any number of facts.

Noise is drawn from numpy's `RandomState` in float64. It is the same for every site, so that it causes no differences
between sites:

| kind | ε of each sample and token | drawn from |
|---|---|---|
| gaussian | ν z | z: `RandomState(seed).randn(samples, tokens, d)` |
| uniform | a u, between −a and a | u: `RandomState(seed).uniform(-1, 1, (samples, tokens, d))` |
| multivariate | μ + Σ^½ z | z as for gaussian |
| student | μ + √((df − 2) / χ²) Σ^½ z | z too; χ²: `RandomState(seed + 1).chisquare(df, samples * tokens)` |

ν and a are a level, or a multiple of σ. μ and Σ are the mean and covariance of the embeddings of all tokens of the
vocabulary. Seed 1 gives the published code's own draws. It differs from these in three ways: its "u3" is a level, not a
multiple of σ; it measures μ and Σ on the tokens of Wikipedia texts; and its Student factor scales μ as well, so that
the mean is not μ. Σ^½ is the symmetric root: it is the only factor that does not depend on the signs of eigenvectors,
which differ between libraries, and it exists even if Σ does not have full rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.base import budgets
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, FactError
from errata.base.fingerprint import tensor_digest
from errata.models.model import Model
from errata.tracing.corruption import Corruption, require_level


@dataclass(frozen=True, eq=False)
class Disturbance:
    """A corruption and its measured parameters: everything that is needed to draw noise.

    Attributes:
        corruption: the corruption.
        width: d, the features of an embedding.
        level: ν or a, for gaussian and uniform.
        sigma: σ, where the level is a multiple of it.
        mean: μ, float64 `[d]`, for multivariate and student.
        root: Σ^½, float64 `[d, d]`, symmetric.
        measured_on: "subjects", "hint" (of the model's config), "own subject", "vocabulary", or None where nothing
            had to be measured.
        measured_tokens: how many tokens were measured.
    """

    corruption: Corruption
    width: int
    level: float | None = None
    sigma: float | None = None
    mean: Tensor | None = None
    root: Tensor | None = None
    measured_on: str | None = None
    measured_tokens: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the noise, ready for JSON: `corruption`, `noise` (ν or a), `sigma`, and where it was measured.

        For multivariate and student also a digest of the `moments`, μ and Σ^½.
        """
        moments = None
        if self.mean is not None and self.root is not None:
            moments = tensor_digest(torch.cat([self.mean[None], self.root]))
        return {
            "corruption": self.corruption.as_dict(),
            "noise": self.level,
            "sigma": self.sigma,
            "measured_on": self.measured_on,
            "measured_tokens": self.measured_tokens,
            "moments": moments,
        }

    def draw(self, samples: int, tokens: int, seed: int) -> Tensor:
        """Noise ε `[samples, tokens, d]` in float64 on the CPU, by the table at the top of this file.

        Raises:
            ConfigError: if nothing was measured, as in a disturbance made by hand.
        """
        if self.level is not None:
            if self.corruption.kind == "uniform":
                uniform = np.random.RandomState(seed).uniform(-1, 1, (samples, tokens, self.width))
                return self.level * torch.from_numpy(uniform)
            return self.level * gaussian(samples, tokens, self.width, seed)
        if self.mean is None or self.root is None:
            raise ConfigError("this disturbance has neither a level nor a mean and Σ^½: make it by measure")
        spread = gaussian(samples, tokens, self.width, seed) @ self.root
        if self.corruption.kind == "student":
            degrees, other = self.corruption.degrees, np.random.RandomState((seed + 1) % 2**32)
            factor = np.sqrt((degrees - 2) / other.chisquare(degrees, samples * tokens))
            spread *= torch.from_numpy(factor).reshape(samples, tokens, 1)
        return self.mean + spread


@without_autocast
def measure(
    corruption: Corruption, model: Model, subjects: Iterable[str] = (), *, own: str | None = None
) -> Disturbance:
    """Measure the parameters of the noise on the model. The result can be used for any number of facts.

    σ is measured on the subjects; if there are none, it is what the model's config says
    (`errata["subject_sigma"]`), and failing that it is measured on `own`. μ and Σ are measured on the subjects'
    tokens if there are more different ones than features, so that Σ can have full rank; else on the vocabulary.

    Args:
        corruption: which noise.
        model: any decoder.
        subjects: of all facts that are to be compared; none is right too.
        own: the subject of the fact at hand.

    Raises:
        ConfigError: if σ is wanted and there is nothing to measure it on, or it is not above zero; or if
            embeddings are not finite numbers.
        FactError: if a subject has no tokens.
    """
    ids = _tokens(model, subjects)
    if corruption.kind in ("multivariate", "student"):
        enough = len(ids.unique()) > _width(model)
        ids = ids if enough else torch.arange(min(len(model.tokenizer), model.vocab_size))
        mean, root = _moments(model, ids)
        where = "subjects" if enough else "vocabulary"
        return Disturbance(corruption, len(mean), mean=mean, root=root, measured_on=where, measured_tokens=len(ids))
    if corruption.level is not None:
        return Disturbance(corruption, _width(model), corruption.level)
    hint = model.hints.get("subject_sigma")
    if not len(ids) and hint:
        return Disturbance(
            corruption, _width(model), _level(corruption.multiple, hint), float(hint), measured_on="hint"
        )
    where = "subjects" if len(ids) else "own subject"
    ids = ids if len(ids) else _tokens(model, [own] if own else [])
    sigma = _sigma(model, ids)
    level = _level(corruption.multiple, sigma)
    return Disturbance(corruption, _width(model), level, sigma, measured_on=where, measured_tokens=len(ids))


@without_autocast
def subject_sigma(model: Model, subjects: Iterable[str]) -> float:
    """σ: the standard deviation of all numbers in the embeddings of the subjects' tokens.

    Each subject is tokenized on its own, as the published code does.

    Raises:
        ConfigError: if there are no subjects.
        FactError: if a subject has no tokens.
    """
    return _sigma(model, _tokens(model, subjects))


def gaussian(samples: int, tokens: int, width: int, seed: int) -> Tensor:
    """Standard normal noise `[samples, tokens, width]` in float64.

    From numpy's `RandomState`, so that `seed=1` gives the published code's own noise.
    """
    return torch.from_numpy(np.random.RandomState(seed).randn(samples, tokens, width))


def _tokens(model: Model, subjects: Iterable[str]) -> Tensor:
    """Ids `[n]` of the tokens of all subjects, one after the other."""
    if isinstance(subjects, str):
        raise ConfigError("subjects is one string, whose letters would be the subjects: put it in a list")
    found: list[int] = []
    for subject in subjects:
        # Without special tokens: a start token is not a part of the subject, and is never corrupted.
        ids = model.tokenizer(subject, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise FactError(f"the subject {subject!r} has no tokens, so there is nothing to measure: name another")
        found += ids
    return torch.tensor(found, dtype=torch.long)


@torch.no_grad()
def _embeddings(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """Embeddings of tokens, float64 `[n, d]` on the CPU, a part of them at a time.

    The module runs, for some (Gemma's) scale what their weight holds. On the CPU, since float64 is slow or missing
    on many other devices.
    """
    module = model.module(("embedding", 0))
    for part in ids.split(budgets.tokens(model.device, "record")):
        yield module(part[None].to(model.device))[0].cpu().double()


def _width(model: Model) -> int:
    """d of the embedding, which is not always that of the state (OPT)."""
    return next(_embeddings(model, torch.zeros(1, dtype=torch.long))).shape[1]


def _sigma(model: Model, ids: Tensor) -> float:
    if not len(ids):
        raise ConfigError("σ is measured on subjects, and none were given: name at least one")
    return float(torch.cat(list(_embeddings(model, ids))).std())


def _moments(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and symmetric root of the covariance `[d, d]` of the tokens' embeddings, in float64."""
    mean = torch.stack([part.sum(0) for part in _embeddings(model, ids)]).sum(0) / len(ids)
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in _embeddings(model, ids):  # once more, for x xᵀ − μ μᵀ would cancel
        part -= mean
        total.addmm_(part.T, part)
    if not torch.isfinite(total).all():
        raise ConfigError(f"the embeddings of {model.name} hold NaN or infinity, so they have no covariance")
    values, vectors = torch.linalg.eigh(total / max(len(ids) - 1, 1))
    return mean, (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T  # rounding can take a zero below zero


def _level(multiple: float | None, sigma: float) -> float:
    level = (multiple or 0.0) * sigma
    require_level(level)
    return level
