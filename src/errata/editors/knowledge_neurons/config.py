"""Settings of Knowledge Neurons. Differences from the published code are in docs/reference/differences.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from errata.editors.config import EditorConfig

# The published code: neurons before the nonlinearity, all of them; all tokens of the new object, once.
REFERENCE: dict[str, Any] = {
    "points": "ends",
    "at": "before",
    "max_neurons": None,
    "erased": "prediction",
    "write": 1.0,
    "written": "all",
    "attributed": "prompt",
    "leading_space": False,
}


class KnowledgeNeuronsConfig(EditorConfig):
    """Settings of `knowledge_neurons`, validated and immutable.

    "The code" is the library that the paper's baseline runs, with its settings."""

    steps: int = Field(
        20,
        ge=2,
        description="Number of points of the integral from zero to a layer's full activation (paper and code: 20).",
    )
    points: Literal["right", "ends"] = Field(
        default="right",
        description='Points of the integral. "right": 1/m, 2/m, …, 1, as in the sum of Dai et al. "ends": m points '
        "from 0 to 1, both included, as in the code.",
    )
    at: Literal["key", "before"] = Field(
        default="key",
        description='What a neuron is. "key": an input of the down-projection, after the nonlinearity; in a gated '
        'MLP the product of gate and up-projection, since only the product meets one column. "before": '
        "the value before the nonlinearity, as in the code; gated MLPs have no such value.",
    )
    threshold: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="A neuron is a candidate for a prompt if its attribution exceeds this many times the largest "
        "one (paper's baseline: 0.2; the library's default: 0.3).",
    )
    share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="A candidate is kept if at least this share of the prompts have it (paper's baseline: 0.4; the "
        "library's default: 0.5).",
    )
    max_neurons: Annotated[int, Field(ge=1)] | None = Field(
        default=10,
        description="Maximum number of neurons, the ones of the largest mean attribution; None: no limit, as in the "
        "code.",
    )
    prefixes: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        default=0,
        description='Texts put before the prompt, each giving one more prompt ("" is the bare prompt); or the '
        "number of prefixes to sample from the model, used beside the bare prompt (code: 0).",
    )
    erase: float = Field(
        default=2.0,
        description="The old object's embedding, times this, is subtracted from each neuron's column (code: 2).",
    )
    write: float = Field(
        default=2.0, description="The new object's embedding, times this, is added to each neuron's column (code: 1)."
    )
    erased: Literal["object", "prediction"] = Field(
        default="object",
        description='Whose embedding is subtracted. "object": the fact\'s old object, if it has one. "prediction": '
        "what the model says after the prompt, as in the code.",
    )
    written: Literal["differing", "all"] = Field(
        default="differing",
        description='Which tokens of the new object are added. "differing": the first token that differs from the '
        'old object\'s. "all": the sum of all tokens, as in the code.',
    )
    attributed: Literal["in_turn", "prompt"] = Field(
        default="in_turn",
        description='The text before a token of the old object when it is attributed. "in_turn": the prompt and the '
        'object\'s tokens before it. "prompt": the prompt alone, as in the code.',
    )
    leading_space: bool = Field(
        default=True, description="Put a space before objects, as they have after a prompt; the code puts none."
    )

    @classmethod
    def reference(cls, **changes: Any) -> KnowledgeNeuronsConfig:
        """The published code's way: neurons before the nonlinearity, all of them; the new object's tokens once."""
        return cls(**{**REFERENCE, **changes})
