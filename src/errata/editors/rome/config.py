"""ROME's settings. docs/reference/differences.md explains the presets `RomeConfig.paper` and `.reference`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from errata.base.errors import FactError
from errata.base.facts import Fact
from errata.base.roles import current_setting
from errata.editors.config import EditorConfig
from errata.editors.published import Published, Shape
from errata.models.tokens import Role

Preset = Literal["paper", "reference", "none"]

_HPARAMS = "hyperparameters of the published code (kmeng01/rome, hparams/ROME)"
_MEMIT = "hyperparameters of MEMIT (kmeng01/memit, hparams/MEMIT/EleutherAI_gpt-neox-20b.json)"
PUBLISHED: dict[Shape, Published] = {
    ("gpt2", 24, 1024): Published("GPT-2 Medium", {"layer": 8, "clamp": 3.0}, _HPARAMS),
    ("gpt2", 36, 1280): Published("GPT-2 Large", {"layer": 12}, _HPARAMS),
    ("gpt2", 48, 1600): Published("GPT-2 XL", {"layer": 17}, _HPARAMS),
    ("gptj", 28, 4096): Published("GPT-J 6B", {"layer": 5}, _HPARAMS),
    ("gpt_neox", 44, 6144): Published("GPT-NeoX 20B", {"layer": 15}, _MEMIT),
}

# One value in place of all contexts' own, the paper's factors, one key everywhere, no clamp.
PAPER: dict[str, Any] = {
    "prefixes": "paper",
    "key": "consistent",
    "key_context": "subject",
    "value_form": "z",
    "kl_factor": 1e2,
    "kl_reduction": "mean",
    "kl_at": "end",
    "weight_decay": 1.5e-3,
    "decay": "adam",
    "clamp": None,
    "attention_sink": "ignore",
    "same_subject": "apart",
}
# The published code's prefixes, one δ for all contexts, the bare prompt's key for the scale.
REFERENCE: dict[str, Any] = {
    "prefixes": "reference",
    "key": "reference",
    "attention_sink": "ignore",
    "same_subject": "apart",
}


class RomeConfig(EditorConfig):
    """Settings of `rome`, validated and immutable."""

    layer: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(
        default=None,
        description='The layer to edit, from 0. "auto": the early site of the MLP, found by a trace of the fact. '
        "None: the layer that the model's own config hints at, or else the one published for this "
        "model; without either, a layer is required.",
    )
    fact_token: Role = Field(
        default="subject_last", description="The token of the prompt at which the key is read and the value is written."
    )
    key: Literal["consistent", "reference"] = Field(
        default="consistent",
        description='"consistent": one k*, the mean over the contexts, is used everywhere, so that Ŵk* = v* holds '
        'up to rounding. "reference": the mean key sets the direction, but the bare prompt\'s key and '
        'value set the scale, as in the published code. Where the two keys are far apart, "reference" '
        "gives enormous, disabling edits.",
    )
    key_context: Literal["prompt", "subject"] = Field(
        default="prompt",
        description='The text after each prefix where the mean key is read. "prompt": the prompt up to the fact\'s '
        'token (published code). "subject": the subject alone (equation 3 of the paper). They differ if '
        "the prompt has words before the subject. If fact_token is after the subject, the prompt is "
        "always used.",
    )
    prefixes: Preset | tuple[str, ...] = Field(
        default="paper",
        description='The texts put before the prompt, one context for each. "paper": 50 samples of 2 to 10 tokens. '
        '"reference": 10 samples of 4 tokens, 10 of 9, and the bare prompt (published lengths 5 and 10 '
        'count the start token). "none": the bare prompt only. Strings of your own are put before the '
        'prompt as they are ("" is the bare prompt). Samples come from the model itself, top-k 5, and '
        'end in ". ".',
    )
    value_form: Literal["delta", "z"] = Field(
        default="delta",
        description='What is optimised. "delta": one δ, added to each context\'s own value (published code). "z": '
        "one value that replaces the value of every context (paper).",
    )
    steps: int = Field(20, ge=1, description="Maximum number of evaluations of the loss; δ is updated one time fewer.")
    learning_rate: float = Field(0.5, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(0.5, ge=0, description="Strength of the weight decay on the value.")
    decay: Literal["loss", "adam"] = Field(
        default="loss",
        description='How the value is decayed. "loss": weight_decay · ‖δ‖ / ‖v₀‖² is added to the loss (published '
        "code). \"adam\": Adam's own weight decay of the variable, δ or z (errata's reading of the "
        "paper's 1.5e-3).",
    )
    kl_factor: float = Field(
        0.0625, ge=0, description="Factor of the Kullback-Leibler divergence in the loss; 0 leaves the divergence out."
    )
    kl_reduction: Literal["sum", "mean"] = Field(
        default="sum",
        description='"sum": the divergence in nats (published code, with factor 0.0625). "mean": the divergence '
        "divided by the size of the vocabulary (errata's reading of the paper's factor of 100).",
    )
    kl_prompt: str = Field(
        default="{} is a",
        description="The prompt, with {} for the subject, whose next-token distribution should stay the same.",
    )
    kl_at: Literal["fact_token", "end"] = Field(
        default="fact_token",
        description='The token at which that distribution is read. "fact_token": the token whose value is changed '
        '(published code), so that the words after it do not count. "end": the end of the prompt '
        "(equation 4 of the paper).",
    )
    clamp: float | None = Field(4.0, gt=0, description="‖δ‖ is kept below this many times ‖v₀‖; None: no bound.")
    stop_below: float = Field(5e-2, ge=0, description="Stop as soon as the loss is below this, in nats.")
    loss_layer: int | None = Field(
        None,
        ge=0,
        description="The layer whose output goes to the final norm and head to give the predictions. None: the last "
        "layer.",
    )
    attention_sink: Literal["split", "ignore"] = Field(
        default="split",
        description="What to do if the fact's token is the first of the text and the model keeps an attention sink "
        'there (see `passes.sinks`). "split": make two changes, one at `layer` for texts in which '
        "something stands before the subject, one at layer 0 for texts that begin with it "
        '(`rome.first_token`). "ignore": edit `layer` only, and warn. key="reference" always ignores '
        "the sink.",
    )
    same_subject: Literal["joint", "apart"] = Field(
        default="joint",
        description="How several requests of one subject in one call are written, together with edits of that "
        'subject that are already applied to the model. "joint": one value for all of them. "apart": '
        "each as if it were alone.",
    )
    joint_steps: int | None = Field(
        None,
        ge=1,
        description="`steps` where one value serves several requests; None: twice `steps`. The clamp is √n times as "
        "wide for n requests.",
    )

    @classmethod
    def paper(cls, **changes: Any) -> RomeConfig:
        """The paper's own method (`PAPER`), with changes."""
        return cls(**{**PAPER, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> RomeConfig:
        """The published code's method (`REFERENCE`), with changes."""
        return cls(**{**REFERENCE, **changes})

    _roles = field_validator("fact_token", mode="before")(current_setting)

    @field_validator("prefixes")
    @classmethod
    def _at_least_one(cls, value: Preset | tuple[str, ...]) -> Preset | tuple[str, ...]:
        if value == ():
            raise ValueError('give at least one prefix; "none" or ("",) is the bare prompt')
        return value

    @field_validator("kl_prompt")
    @classmethod
    def _one_slot(cls, value: str) -> str:
        try:
            Fact("subject", value)
        except FactError as error:
            raise ValueError(str(error)) from error
        return value
