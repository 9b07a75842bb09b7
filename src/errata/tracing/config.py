"""Settings of a trace."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from errata.base.config import Config
from errata.base.errors import ConfigError
from errata.base.roles import current_setting
from errata.tracing.corruption import Corruption

Part = Literal["state", "mlp", "attention", "severed_mlp", "severed_attention"]
TokenRole = Literal["subject_first", "subject_middle", "subject_last", "after_subject", "further", "last"]


def several(value: Any) -> Any:
    """A single name as a tuple of one."""
    return (value,) if isinstance(value, str) else value


def each_once(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Names without repetitions."""
    return tuple(dict.fromkeys(value))


class TraceConfig(Config):
    """Settings of `trace`, validated and immutable. The defaults are the paper's."""

    parts: tuple[Part, ...] = Field(
        default=("state", "mlp", "attention"),
        min_length=1,
        description='The maps to make. "state": one block output is restored. "mlp", "attention": these outputs of '
        'a window of layers are restored. "severed_mlp", "severed_attention": one state is restored, '
        "while the MLP (or attention) outputs of its token are held at their corrupted values from "
        "there on (Figure 3).",
    )
    samples: int = Field(default=10, ge=1, le=100_000, description="Number of noise samples.")
    noise: str = Field(
        default="s3",
        description='The noise on the subject: a `Corruption`; its short form ("s3": normal, 3σ; "u3", "m", "t5", '
        "...); or a number, the standard deviation of normal noise.",
    )
    window: int | None = Field(
        default=None,
        ge=1,
        description='Number of layers restored together in "mlp" and "attention". None: 10, as in the paper; in '
        "models with fewer than 30 layers a fifth of the layers, at least 3.",
    )
    window_edges: Literal["paper", "reference"] = Field(
        default="paper",
        description='Position of the window of 10 layers around layer l. "paper": [l−4, l+5]. "reference": [l−5, '
        "l+4], as in the published code.",
    )
    severed_noise: Literal["paper", "reference"] = Field(
        default="paper",
        description='The noise under which "severed_mlp" and "severed_attention" restore a state. "paper": that of '
        'the corrupted run. "reference": new noise, as in the published code; the outputs that are '
        "held, at all layers, are still those of the corrupted run.",
    )
    seed: int = Field(default=1, ge=0, lt=2**32, description="Seed of the noise; 1 gives the published code's noise.")
    answer: Literal["model", "object"] = Field(
        default="model",
        description='The answer whose probability is traced: what the "model" itself says next, or the fact\'s '
        '"object".',
    )
    scored: Literal["first", "whole"] = Field(
        default="first",
        description='Score the "first" token of the answer, or the joint probability of the "whole" object.',
    )
    tokens: tuple[TokenRole, ...] | None = Field(
        default=None,
        min_length=1,
        description="Roles of the tokens at which sites are restored; None: all tokens from the subject's first on.",
    )

    _several = field_validator("parts", "tokens", mode="before")(several)
    _roles = field_validator("tokens", mode="before")(current_setting)
    _each_once = field_validator("parts")(each_once)

    @field_validator("noise", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> str:
        if isinstance(value, Corruption):
            return value.name
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Corruption(level=value).name
        return Corruption.parse(str(value)).name

    @model_validator(mode="after")
    def _whole_answers_are_given(self) -> TraceConfig:
        if self.scored == "whole" and self.answer != "object":
            raise ValueError("scored='whole' needs answer='object': the model's own answer has no end")
        return self

    @property
    def corruption(self) -> Corruption:
        """The noise as a `Corruption`."""
        return Corruption.parse(self.noise)

    @property
    def draws(self) -> int:
        """Number of noise draws for a sample: 2 where severed runs have noise of their own, else 1."""
        return 1 + (self.severed_noise == "reference" and any(part.startswith("severed_") for part in self.parts))

    def width(self, layers: int) -> int:
        """The window in a model with this many layers."""
        return self.window or (10 if layers >= 30 else max(3, round(layers / 5)))


def chosen(config: TraceConfig | None, settings: dict[str, Any]) -> TraceConfig:
    """The settings, given as a value or by name.

    Raises:
        ConfigError: if given both ways, or out of range.
    """
    if config is not None and settings:
        raise ConfigError(f"settings are given twice, as config and by name ({', '.join(settings)}): give them one way")
    return config or TraceConfig(**settings)
