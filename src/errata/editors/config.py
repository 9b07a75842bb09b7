"""Settings common to all editors."""

from __future__ import annotations

from pydantic import Field, field_validator

from errata.base.config import Config
from errata.editors.side_effects import Bound
from errata.metrics.side_effects import ESSENCE, MAX_DRIFT


class EditorConfig(Config):
    """Base of the settings of an editor."""

    max_drift: float | None = Field(
        MAX_DRIFT,
        gt=0,
        description="Refuse an edit as disabling if it moves predictions on unrelated texts further than this, in "
        "nats per token (see `errata.metrics.side_effects`). None: measure no side effects and refuse "
        "nothing.",
    )
    probes: tuple[str, ...] | None = Field(
        default=None,
        description="The unrelated texts on which drift is measured. None: texts sampled from the model itself.",
    )

    @field_validator("probes")
    @classmethod
    def _some_text(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all(text.strip() for text in value or ("",)):
            raise ValueError("give at least one reference text, and no empty one, or max_drift=None")
        return value

    @property
    def bound(self) -> Bound | None:
        """The bound on side effects; None if they are not measured."""
        if self.max_drift is None:
            return None
        return Bound(self.max_drift, self.probes, getattr(self, "kl_prompt", ESSENCE))
