"""Prefixes: texts sampled from the model and put before a prompt, so that an edit also works inside a longer text."""

from __future__ import annotations

from collections.abc import Sequence

from errata.base.seeds import derive
from errata.base.text import ended
from errata.models.generation import generate, start_text
from errata.models.model import Model

TOP_K = 5


def sampled(model: Model, lengths: Sequence[int], seed: int, editor: str) -> tuple[str, ...]:
    """A text of each of these lengths in tokens, each ended as its script ends a sentence, such as by ". "; one that
    ends at once is "".

    Args:
        model: whose; they depend on it, the seed and the editor, not on a fact.
        lengths: without what starts the text.
        seed: seed of top-5 sampling.
        editor: for whom, so that editors have texts of their own.

    Raises:
        ConfigError: if the model's tokenizer has no token to start sampling from.
    """
    if not lengths:
        return ()
    start = start_text(model)
    texts = generate(model, [start] * len(lengths), max(lengths), top_k=TOP_K, seed=derive(seed, editor, "prefixes"))
    cut = [_first_tokens(model, text[len(start) :], length) for text, length in zip(texts, lengths, strict=True)]
    return tuple(ended(text) if text.strip() else "" for text in cut)


def _first_tokens(model: Model, text: str, count: int) -> str:
    """The beginning of `text` that its first `count` tokens spell, in whole characters."""
    offsets = model.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    ends = [end for begin, end in offsets if end > begin]
    return text[: ends[min(count, len(ends)) - 1]] if ends else ""
