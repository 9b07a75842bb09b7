"""ROME's settings. The published ways, `RomeConfig.paper` and `.reference`, are in docs/reference/differences.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from errata.base.errors import FactError
from errata.base.facts import Fact
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
    """Settings of `rome`, all checked, none to be changed afterwards."""

    layer: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(
        default=None,
        description='the layer to edit, from 0; "auto": where a trace of the fact finds the MLP\'s early site. '
        "None: what the model's own hint says, or what was published for it; without either it must be said.",
    )
    fact_token: Role = Field(default="subject_last", description="at which token of the prompt the key is read.")
    key: Literal["consistent", "reference"] = Field(
        default="consistent",
        description='"consistent": one k*, the mean over the contexts, everywhere, so that Ŵk* = v* holds to '
        'rounding. "reference": that mean for the direction, but the bare prompt\'s key and value for the '
        "scale, as in the published code. Where the two keys lie far apart it gives enormous, disabling edits.",
    )
    key_context: Literal["prompt", "subject"] = Field(
        default="prompt",
        description='what stands behind each prefix where the mean key is read: the "prompt" up to the fact\'s token '
        '(published code), or the "subject" alone (equation 3 of the paper). They differ where the prompt has words '
        "before the subject. For a fact_token after the subject it is the prompt in any case.",
    )
    prefixes: Preset | tuple[str, ...] = Field(
        default="paper",
        description='what is put before the prompt, one context each. "paper": 50 samples of 2 to 10 tokens; '
        '"reference": 10 of 4 tokens, 10 of 9 and the bare prompt (lengths 5 and 10 counting the start token); '
        '"none": the bare prompt alone; or the strings themselves, put before the prompt as they are ("" is the '
        'bare prompt). Samples come from the model itself, top-k 5, and end in ". ".',
    )
    value_form: Literal["delta", "z"] = Field(
        default="delta",
        description='what is optimised. "delta": one δ that is added to each context\'s own value (published '
        'code); "z": one value that takes the place of them all (paper).',
    )
    steps: int = Field(20, ge=1, description="how often the loss is evaluated, at most; δ is changed one time less.")
    learning_rate: float = Field(0.5, gt=0, description="of Adam.")
    weight_decay: float = Field(0.5, ge=0, description="how strongly large values are held back.")
    decay: Literal["loss", "adam"] = Field(
        default="loss",
        description='"loss": by weight_decay · ‖δ‖ / ‖v₀‖² in the loss (published code); "adam": by the '
        "optimiser's own decay of the variable, δ or z (how the paper's 1.5e-3 is read here).",
    )
    kl_factor: float = Field(
        0.0625, ge=0, description="factor of the Kullback-Leibler divergence in the loss; 0 leaves it out."
    )
    kl_reduction: Literal["sum", "mean"] = Field(
        default="sum",
        description='"sum": the divergence in nats (published code, with 0.0625); "mean": that over the size of '
        "the vocabulary (how the paper's factor of 100 is read here).",
    )
    kl_prompt: str = Field(default="{} is a", description="the prompt whose next-token distribution is to stay.")
    kl_at: Literal["fact_token", "end"] = Field(
        default="fact_token",
        description='where that distribution is read. "fact_token": at the token whose value is changed (published '
        'code), so that words behind it do not count. "end": at the prompt\'s end (paper, equation 4).',
    )
    clamp: float | None = Field(4.0, gt=0, description="‖δ‖ is kept below this many times ‖v₀‖; None: it is not.")
    stop_below: float = Field(5e-2, ge=0, description="stop as soon as the loss is below this, in nats.")
    loss_layer: int | None = Field(
        None,
        ge=0,
        description="the layer whose state the final norm and head read the predictions from. None: the last.",
    )
    attention_sink: Literal["split", "ignore"] = Field(
        default="split",
        description="what to do where the fact's token is the first of the text and the model keeps an attention "
        'sink there (see `passes.sinks`): "split" the edit into one of `layer` for all texts in which something '
        "stands before the subject and one of layer 0 for those that begin with it (`rome.first_token`), or "
        '"ignore" it and warn, as with key="reference".',
    )
    same_subject: Literal["joint", "apart"] = Field(
        default="joint",
        description="how requests of one subject in one call are written, and those beside edits of that subject "
        'that are on the model: "joint", one value for all of them, or "apart", each as if it were alone.',
    )
    joint_steps: int | None = Field(
        None,
        ge=1,
        description="`steps` where one value serves several requests; None: twice as many. The clamp is √n times "
        "as wide for n of them.",
    )

    @classmethod
    def paper(cls, **changes: Any) -> RomeConfig:
        """The paper's own method (`PAPER`), with changes."""
        return cls(**{**PAPER, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> RomeConfig:
        """The published code's method (`REFERENCE`), with changes."""
        return cls(**{**REFERENCE, **changes})

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
