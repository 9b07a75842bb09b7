"""ROME's settings. Where the paper and its published code differ, both are to be had by name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from errata.base.config import Config
from errata.base.errors import FactError
from errata.base.facts import Fact
from errata.models.tokens import Role

Preset = Literal["paper", "reference", "none"]


class RomeConfig(Config):
    """Settings of `rome`, all checked, none to be changed afterwards.

    Attributes:
        layer: the layer to edit, from 0. None: the model's own hint; without one it must be said. Published
            choices: GPT-2 XL 17, GPT-2 L 12, GPT-2 M 8, GPT-J 5, GPT-NeoX 15.
        fact_token: at which token of the prompt the key is read.
        key: "consistent": one k*, the mean over the contexts, everywhere, so that Ŵk* = v* holds to rounding.
            "reference": that mean for the direction, but the bare prompt's key and value for the scale, as
            in the published code. Where the two keys lie far apart it gives enormous, disabling edits.
        prefixes: what is put before the prompt, one context each. "paper": 50 samples of 2 to 10 tokens;
            "reference": 10 of 4 tokens, 10 of 9 and the bare prompt (lengths 5 and 10 counting the start
            token); "none": the bare prompt alone; or the strings themselves, put before the prompt as they
            are ("" is the bare prompt). Samples come from the model itself, top-k 5, and end in ". ".
        value_form: what is optimised. "delta": one δ that is added to each context's own value (published
            code); "z": one value that takes the place of them all (paper).
        steps: how often the loss is evaluated, at most; δ is changed one time less.
        learning_rate: of Adam.
        weight_decay: factor of ‖δ‖ / ‖v₀‖² in the loss.
        kl_factor: factor of the Kullback-Leibler divergence in the loss; 0 leaves it out.
        kl_prompt: the prompt whose next-token distribution, at the fact token, is to stay.
        clamp: ‖δ‖ is kept below this many times ‖v₀‖; None: it is not.
        stop_below: stop as soon as the loss is below this, in nats.
        loss_layer: the layer whose state the final norm and head read the predictions from. None: the last.
    """

    layer: int | None = Field(None, ge=0)
    fact_token: Role = "subject_last"
    key: Literal["consistent", "reference"] = "consistent"
    prefixes: Preset | tuple[str, ...] = "paper"
    value_form: Literal["delta", "z"] = "delta"
    steps: int = Field(20, ge=1)
    learning_rate: float = Field(0.5, gt=0)
    weight_decay: float = Field(0.5, ge=0)
    kl_factor: float = Field(0.0625, ge=0)
    kl_prompt: str = "{} is a"
    clamp: float | None = Field(4.0, gt=0)
    stop_below: float = Field(5e-2, ge=0)
    loss_layer: int | None = Field(None, ge=0)

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
