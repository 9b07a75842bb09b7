"""The corrupted run: noise on the embeddings of the subject's tokens.

The paper adds Gaussian noise ε ~ N(0, ν²) with ν = 3σ, σ the standard deviation of the embeddings of subjects'
tokens, and compares it with others (its Figure 13). What is drawn, from numpy's `RandomState` in float64, the same
for every site, so that differences between sites are the sites' own:

| kind | ε of each sample and token | drawn from |
|---|---|---|
| gaussian | ν z | z: `RandomState(seed).randn(samples, tokens, d)` |
| uniform | a u, between −a and a | u: `RandomState(seed).uniform(-1, 1, (samples, tokens, d))` |
| multivariate | μ + Σ^½ z | z as for gaussian |
| student | μ + √((df − 2) / χ²) Σ^½ z | z too; χ²: `RandomState(seed + 1).chisquare(df, samples * tokens)` |

ν and a are a level, or a multiple of σ. μ and Σ are the mean and covariance of the embeddings of all tokens of the
vocabulary. Seed 1 gives the published code's own draws. It differs from these in three ways: its "u3" is a level, not
a multiple of σ; it measures μ and Σ on the tokens of Wikipedia texts; and its Student factor scales μ as well, so that
the mean is not μ. Σ^½ is the symmetric root: it is the one factor that does not hang on the signs of eigenvectors,
which libraries choose as they like, and it exists where Σ has not full rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from errata.base.errors import ConfigError
from errata.models.model import Model

Kind = Literal["gaussian", "uniform", "multivariate", "student"]

FORMS = (
    "s3 (gaussian, 3σ), 0.1 (gaussian of that level), u3 (uniform, ±3σ), u=0.1 (uniform, ±0.1), m (multivariate), "
    "t or t5 (Student with 3 or 5 degrees of freedom); with ! or :replace behind it the noise takes the "
    "embeddings' place, with +1 one token after the subject is corrupted too"
)
# Settings of a `Disturbance` that may differ from fact to fact, where σ is measured on the fact's own subject.
MEASURED = ("noise", "sigma", "measured_tokens")

_FORM = re.compile(
    r"(?P<letter>[sumt]?)(?P<equals>=?)(?P<number>(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)?"
    r"(?P<replace>!|:replace)?(?:\+(?P<after>\d+))?",
    re.ASCII,
)
_DEFAULT_MULTIPLE, _DEFAULT_DEGREES = 3.0, 3.0
_ROWS = 4096  # embeddings at a time, while a covariance is summed


@dataclass(frozen=True)
class Corruption:
    """Which noise to draw, and where to put it.

    Attributes:
        kind: the distribution: "gaussian", "uniform", "multivariate" or "student".
        multiple: ν or a as a multiple of σ, for gaussian and uniform; None where it does not count.
        level: ν or a itself; it goes before `multiple`.
        degrees: of freedom, for student; more than 2, so that there is a covariance.
        replace: whether the noise takes the embedding's place; else it is added.
        after: how many tokens after the subject's last are corrupted too (1 in Figures 12 and 15).

    Raises:
        ConfigError: if a value is out of range, or does not belong to the kind.
    """

    kind: Kind = "gaussian"
    multiple: float | None = _DEFAULT_MULTIPLE
    level: float | None = None
    degrees: float = _DEFAULT_DEGREES
    replace: bool = False
    after: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"the kind of noise is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.kind in ("gaussian", "uniform"):
            _require_level(self.multiple if self.level is None else self.level)
        elif self.level is not None or self.multiple not in (None, _DEFAULT_MULTIPLE):
            raise ConfigError(f"{self.kind} noise takes its size from the embeddings: it has no level and no multiple")
        if self.level is not None or self.kind not in ("gaussian", "uniform"):
            object.__setattr__(self, "multiple", None)
        if not _is_number(self.degrees) or not 2 < self.degrees < 1e6:
            raise ConfigError(f"degrees is {self.degrees!r}: Student's t has a covariance only above 2, so give more")
        if self.kind != "student" and self.degrees != _DEFAULT_DEGREES:
            raise ConfigError(f"degrees belong to student noise, and this is {self.kind}: leave them out")
        if not isinstance(self.replace, bool):
            raise ConfigError(f"replace is {self.replace!r}: say True or False")
        if isinstance(self.after, bool) or not isinstance(self.after, int) or self.after < 0:
            raise ConfigError(f"after is {self.after!r}: it counts tokens after the subject, from 0")

    @classmethod
    def parse(cls, text: str) -> Corruption:
        """A corruption by its short form, as the published code writes it.

        Raises:
            ConfigError: if the text is none, with the forms there are.
        """
        found = _FORM.fullmatch(text.strip())
        if not found:
            raise _unknown(text)
        number = float(found["number"]) if found["number"] else None
        rest: dict[str, Any] = {"replace": bool(found["replace"]), "after": int(found["after"] or 0)}
        match found["letter"], bool(found["equals"]), number:
            case "", False, float(level):
                return cls("gaussian", level=level, **rest)
            case "s", False, _:
                return cls("gaussian", 1.0 if number is None else number, **rest)
            case "u", False, float(multiple):
                return cls("uniform", multiple, **rest)
            case "u", True, float(level):
                return cls("uniform", level=level, **rest)
            case "m", False, None:
                return cls("multivariate", **rest)
            case "t", False, _:
                return cls("student", degrees=_DEFAULT_DEGREES if number is None else number, **rest)
        raise _unknown(text)

    @property
    def name(self) -> str:
        """The short form, which `parse` reads back."""
        match self.kind:
            case "gaussian":
                form = f"s{_short(self.multiple)}" if self.multiple is not None else _short(self.level)
            case "uniform":
                form = f"u{_short(self.multiple)}" if self.multiple is not None else f"u={_short(self.level)}"
            case "multivariate":
                form = "m"
            case "student":
                form = f"t{_short(self.degrees)}"
        return f"{form}{'!' * self.replace}{f'+{self.after}' if self.after else ''}"

    def __str__(self) -> str:
        return self.name

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; `Corruption(**fields)` is this one again."""
        return asdict(self)

    def measure(self, model: Model, subjects: Iterable[str] = (), *, own: str | None = None) -> Disturbance:
        """Measure on the model what the noise depends on. The result serves for any number of facts.

        σ is measured on the subjects; if there are none, it is what the model's config says
        (`errata["subject_sigma"]`), and failing that it is measured on `own`. μ and Σ are measured on the subjects'
        tokens if there are more different ones than features, so that Σ can have full rank; else on the vocabulary.

        Args:
            model: any decoder.
            subjects: of all facts that are to be compared; none is right too.
            own: the subject of the fact at hand.

        Raises:
            ConfigError: if σ is wanted and there is nothing to measure it on, or it is not above zero; or if
                embeddings are no finite numbers.
            FactError: if a subject has no tokens.
        """
        ids = _tokens(model, subjects)
        if self.kind in ("multivariate", "student"):
            enough = len(ids.unique()) > _width(model)
            ids = ids if enough else torch.arange(min(len(model.tokenizer), model.vocab_size))
            mean, root = _moments(model, ids)
            where = "subjects" if enough else "vocabulary"
            return Disturbance(self, len(mean), mean=mean, root=root, measured_on=where, measured_tokens=len(ids))
        if self.level is not None:
            return Disturbance(self, _width(model), self.level)
        hint = model.hints.get("subject_sigma")
        if not len(ids) and hint:
            return Disturbance(self, _width(model), _level(self.multiple, hint), float(hint), measured_on="hint")
        where = "subjects" if len(ids) else "own subject"
        ids = ids if len(ids) else _tokens(model, [own] if own else [])
        sigma = _sigma(model, ids)
        level = _level(self.multiple, sigma)
        return Disturbance(self, _width(model), level, sigma, measured_on=where, measured_tokens=len(ids))


@dataclass(frozen=True, eq=False)
class Disturbance:
    """A corruption and what was measured for it: all that noise is drawn from.

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
        """What decides the noise, ready for JSON: `corruption`, `noise` (ν or a), `sigma` and where it was measured."""
        return {
            "corruption": self.corruption.as_dict(),
            "noise": self.level,
            "sigma": self.sigma,
            "measured_on": self.measured_on,
            "measured_tokens": self.measured_tokens,
        }

    def draw(self, samples: int, tokens: int, seed: int) -> Tensor:
        """Noise ε `[samples, tokens, d]` in float64 on the CPU, as the table of this file says.

        Raises:
            ConfigError: if nothing was measured, as in a disturbance made by hand.
        """
        if self.level is not None:
            if self.corruption.kind == "uniform":
                uniform = np.random.RandomState(seed).uniform(-1, 1, (samples, tokens, self.width))
                return self.level * torch.from_numpy(uniform)
            return self.level * gaussian(samples, tokens, self.width, seed)
        if self.mean is None or self.root is None:
            raise ConfigError("this disturbance has neither a level nor a mean and Σ^½: make it by Corruption.measure")
        spread = gaussian(samples, tokens, self.width, seed) @ self.root
        if self.corruption.kind == "student":
            degrees, other = self.corruption.degrees, np.random.RandomState((seed + 1) % 2**32)
            factor = np.sqrt((degrees - 2) / other.chisquare(degrees, samples * tokens))
            spread *= torch.from_numpy(factor).reshape(samples, tokens, 1)
        return self.mean + spread


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
    ids = [model.encode([subject]).input_ids[0].cpu() for subject in subjects]
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.long)


@torch.no_grad()
def _embeddings(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """Embeddings of tokens, float64 `[n, d]` on the CPU, a part of them at a time.

    The module runs, for some (Gemma's) scale what their weight holds. On the CPU, since float64 is slow or missing
    on many other devices.
    """
    module = model.module(("embedding", 0))
    for part in ids.split(_ROWS):
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
    _require_level(level)
    return level


def _require_level(level: Any) -> None:
    if not _is_number(level) or not 0 < level < 1e6:  # NaN is neither
        raise ConfigError(f"the noise is {level}: it must be a number greater than zero, or nothing is corrupted")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(number: float | None) -> str:
    return repr(float(number or 0.0)).removesuffix(".0")


def _unknown(text: str) -> ConfigError:
    return ConfigError(f"{text!r} is no noise that is known: write {FORMS}")
