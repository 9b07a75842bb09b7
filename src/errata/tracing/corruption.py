"""The corruption as a setting: the kind of noise on the embeddings of the subject's tokens.

The paper adds Gaussian noise ε ~ N(0, ν²) with ν = 3σ, σ the standard deviation of the embeddings of subjects' tokens,
and compares it with others (its Figure 13). `noise.py` says exactly what is drawn.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from errata.base.errors import ConfigError

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


@dataclass(frozen=True)
class Corruption:
    """A corruption: which noise to draw, and where to add it.

    Attributes:
        kind: the distribution: "gaussian", "uniform", "multivariate" or "student".
        multiple: ν or a as a multiple of σ, for gaussian and uniform; None where it does not count.
        level: ν or a itself; it overrides `multiple`.
        degrees: degrees of freedom, for student; more than 2, so that the covariance exists.
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
            require_level(self.multiple if self.level is None else self.level)
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
        """All fields, JSON-able; `Corruption(**fields)` is equal to this one."""
        return asdict(self)


def require_level(level: Any) -> None:
    """Check that noise of this size has an effect.

    Raises:
        ConfigError: if it does not, or is not a number.
    """
    if not _is_number(level) or not 0 < level < 1e6:  # NaN is neither
        raise ConfigError(f"the noise is {level}: it must be a number greater than zero, and below a million")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(number: float | None) -> str:
    return repr(float(number or 0.0)).removesuffix(".0")


def _unknown(text: str) -> ConfigError:
    return ConfigError(f"{text!r} is not a known noise: write {FORMS}")
