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

    "The code" is the library that the paper's baseline runs, with its settings.

    Attributes:
        steps: points of the integral from nothing to a layer's whole activation (paper and code: 20).
        points: "right": 1/m, 2/m, …, 1, as Dai et al. write the sum. "ends": from 0 to 1, both among the m points, as
            in the code.
        at: "key": a neuron is what the down-projection reads, after the nonlinearity; of a gated MLP the product, for
            that alone stands before one column of it. "before": before the nonlinearity, as in the code; gated MLPs
            have no such place.
        threshold: a neuron counts for a prompt if its attribution is above this many times the largest one (paper's
            baseline: 0.2; library's default 0.3).
        share: it is kept if it counts for at least this share of the prompts (0.4; library's default 0.5).
        max_neurons: so many at most, those of the largest mean attribution; None: all, as in the code.
        prefixes: texts put before the prompt, a prompt each, "" for itself alone; or how many to sample from the
            model beside the prompt itself (code: 0).
        erase: times the embedding of the old object that is subtracted from each neuron's column (2).
        write: times the embedding of the new object that is added to it (2; code: 1).
        written: which tokens of the new object are added: "differing": the first that is not the old object's. "all":
            the sum of all of them, as in the code.
        attributed: what stands before a token of the old object when it is attributed: "in_turn": the prompt and the
            tokens before it. "prompt": the prompt alone, as in the code.
        erased: whose embedding that is: "object": of the fact's old object, if it has one. "prediction": of what the
            model says after the prompt, as in the code.
        leading_space: whether objects stand behind a space, as they do after a prompt; the code has none.
    """

    steps: int = Field(20, ge=2)
    points: Literal["right", "ends"] = "right"
    at: Literal["key", "before"] = "key"
    threshold: float = Field(0.2, ge=0, lt=1)
    share: float = Field(0.4, ge=0, le=1)
    max_neurons: Annotated[int, Field(ge=1)] | None = 10
    prefixes: Annotated[int, Field(ge=0)] | tuple[str, ...] = 0
    erase: float = 2.0
    write: float = 2.0
    erased: Literal["object", "prediction"] = "object"
    written: Literal["differing", "all"] = "differing"
    attributed: Literal["in_turn", "prompt"] = "in_turn"
    leading_space: bool = True

    @classmethod
    def reference(cls, **changes: Any) -> KnowledgeNeuronsConfig:
        """The published code's way: neurons before the nonlinearity, all of them; the new object's tokens once."""
        return cls(**{**REFERENCE, **changes})
