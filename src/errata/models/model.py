"""A model as the rest of errata sees it: a decoder that can write text, and to which edits are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from errata.models.anatomy import Anatomy
from errata.models.decoder import Batch, Decoder, Stream
from errata.models.generation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Batch", "Model", "Stream"]


class Model(Decoder):
    """A decoder that can write text, and to which edits are applied. Made by `load_pretrained`.

    Its attributes are those of `Decoder`, and two more.

    Attributes:
        own_corpus: opens the corpus that belongs to the model, for its second moments; None if there is none.
        applied: the stack of edits that are on the weights now; `errata.edits` alone touches it.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        name: str = "",
        anatomy: Anatomy | None = None,
    ):
        super().__init__(hf, tokenizer, name, anatomy)
        self.own_corpus: Callable[[], Any] | None = None
        self.applied: list[Any] = []

    def complete(
        self,
        prompt: str,
        max_new_tokens: int = 20,
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        greedy: bool | None = None,
        seed: int = 0,
    ) -> str:
        """The prompt and its continuation, greedy unless `top_k` or `temperature` requests sampling.

        Raises:
            FactError: if the prompt has no tokens or leaves no room for one more.
            ConfigError: if a setting is out of range, or asks for greedy and sampling at once.
        """
        if greedy is None:
            greedy = top_k is None and temperature is None
        texts = generate(
            self,
            [prompt],
            max_new_tokens,
            top_k=top_k,
            temperature=1.0 if temperature is None else temperature,
            greedy=greedy,
            seed=seed,
        )
        return texts[0]
