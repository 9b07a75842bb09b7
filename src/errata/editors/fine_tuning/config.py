"""Settings of fine-tuning, and the published ones by model. FT, FT+L and the attention edit are one method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from errata.editors.config import EditorConfig
from errata.editors.published import Published, Shape

Method = Literal["ft", "ft-l", "attention"]

_PAPER = "the paper, appendices E.1 and I, and hyperparameters of the published code (kmeng01/rome, hparams/FT)"
PUBLISHED: dict[Method, dict[Shape, Published]] = {
    "ft": {
        ("gpt2", 48, 1600): Published("GPT-2 XL", {"layer": 1}, _PAPER),
        ("gptj", 28, 4096): Published("GPT-J 6B", {"layer": 21}, _PAPER),
    },
    "ft-l": {
        ("gpt2", 24, 1024): Published("GPT-2 Medium", {"layer": 0, "epsilon": 2e-3}, _PAPER),
        ("gpt2", 36, 1280): Published("GPT-2 Large", {"layer": 0, "epsilon": 1e-3}, _PAPER),
        ("gpt2", 48, 1600): Published("GPT-2 XL", {"layer": 0, "epsilon": 5e-4}, _PAPER),
        ("gptj", 28, 4096): Published("GPT-J 6B", {"layer": 0, "epsilon": 5e-5}, _PAPER),
    },
    "attention": {
        ("gpt2", 48, 1600): Published("GPT-2 XL", {"layer": 33, "learning_rate": 1e-3, "epsilon": 1e-3}, _PAPER),
    },
}


ATTENTION = {"part": "attention", "learning_rate": 1e-3}
# The published code's training: every target token predicted from the prompt's end, biases too.
REFERENCE = {"loss": "reference", "bias": True, "stop_below": 1e-2}


class FineTuningConfig(EditorConfig):
    """Settings of `fine_tune`, validated and immutable.

    "The paper" is Meng et al., 2022, appendices E.1 and I; "the code" is what its authors published."""

    layer: int | None = Field(
        None,
        ge=0,
        description="The layer to train, from 0. Required, here or by a published setting (GPT-2 XL: FT 1, FT+L 0, "
        "attention 33).",
    )
    part: Literal["mlp", "attention"] = Field(
        default="mlp",
        description='"mlp": the down-projection (FT, FT+L). "attention": all linear maps that compute queries, keys '
        "and values, whether the model has one or several (appendix I).",
    )
    learning_rate: float = Field(
        5e-4, gt=0, description="Learning rate of Adam (paper and code: 5e-4; attention edit: 1e-3)."
    )
    steps: int = Field(
        25,
        ge=1,
        description="Maximum number of evaluations of the loss; the weights are updated after each, unless the "
        "training stops there (paper and code: 25).",
    )
    stop_below: float = Field(
        0.03, ge=0, description="Stop as soon as the loss is below this, in nats (paper: 0.03; code: 1e-2)."
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        description="Bound on the change of each entry of a weight, ‖ΔW‖∞ ≤ ε, enforced after every step; None: no "
        "bound (FT).",
    )
    loss: Literal["teacher_forcing", "reference"] = Field(
        default="teacher_forcing",
        description='"teacher_forcing": mean of −log P over the target\'s tokens, each predicted after the ones '
        'before it. "reference": every token is predicted from the prompt alone, as in the code. For a '
        "target of one token they are the same.",
    )
    bias: bool = Field(
        default=False,
        description="Train the biases of these maps too, as the code does (it selects parameters by the beginning "
        "of their names). The paper edits no biases.",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of Adam, on the squared norm of the trained weights (code: 0)."
    )

    @property
    def method(self) -> Method:
        """The method that these settings describe."""
        if self.part == "attention":
            return "attention"
        return "ft" if self.epsilon is None else "ft-l"
