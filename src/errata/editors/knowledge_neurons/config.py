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
    """Settings of `knowledge_neurons`, all checked, none to be changed afterwards.

    "The code" is the library that the paper's baseline runs, with its settings."""

    steps: int = Field(
        20, ge=2, description="points of the integral from nothing to a layer's whole activation (paper and code: 20)."
    )
    points: Literal["right", "ends"] = Field(
        default="right",
        description='"right": 1/m, 2/m, …, 1, as Dai et al. write the sum. "ends": from 0 to 1, both among the m '
        "points, as in the code.",
    )
    at: Literal["key", "before"] = Field(
        default="key",
        description='"key": a neuron is what the down-projection reads, after the nonlinearity; of a gated MLP the '
        'product, for that alone stands before one column of it. "before": before the nonlinearity, as in the '
        "code; gated MLPs have no such place.",
    )
    threshold: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="a neuron counts for a prompt if its attribution is above this many times the largest one "
        "(paper's baseline: 0.2; library's default 0.3).",
    )
    share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="it is kept if it counts for at least this share of the prompts (0.4; library's default 0.5).",
    )
    max_neurons: Annotated[int, Field(ge=1)] | None = Field(
        default=10, description="so many at most, those of the largest mean attribution; None: all, as in the code."
    )
    prefixes: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        default=0,
        description='texts put before the prompt, a prompt each, "" for itself alone; or how many to sample from '
        "the model beside the prompt itself (code: 0).",
    )
    erase: float = Field(
        default=2.0,
        description="times the embedding of the old object that is subtracted from each neuron's column (2).",
    )
    write: float = Field(
        default=2.0, description="times the embedding of the new object that is added to it (2; code: 1)."
    )
    erased: Literal["object", "prediction"] = Field(
        default="object",
        description='whose embedding that is: "object": of the fact\'s old object, if it has one. "prediction": '
        "of what the model says after the prompt, as in the code.",
    )
    written: Literal["differing", "all"] = Field(
        default="differing",
        description='which tokens of the new object are added: "differing": the first that is not the old '
        'object\'s. "all": the sum of all of them, as in the code.',
    )
    attributed: Literal["in_turn", "prompt"] = Field(
        default="in_turn",
        description='what stands before a token of the old object when it is attributed: "in_turn": the prompt and '
        'the tokens before it. "prompt": the prompt alone, as in the code.',
    )
    leading_space: bool = Field(
        default=True, description="whether objects stand behind a space, as they do after a prompt; the code has none."
    )

    @classmethod
    def reference(cls, **changes: Any) -> KnowledgeNeuronsConfig:
        """The published code's way: neurons before the nonlinearity, all of them; the new object's tokens once."""
        return cls(**{**REFERENCE, **changes})
