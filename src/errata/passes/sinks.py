"""Attention sinks: models whose state at the first token of a text is the same for every token.

In many decoders the state of a text's first token becomes one very large vector within the lowest blocks, the same for
every token, on which later tokens rest attention that they have no other use for. An edit that reads a key there acts
on every text alike. Whether a model has a sink is measured: the keys of different first tokens are compared.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from errata.models.model import Model
from errata.passes.reading import read

TOKENS = 32  # first tokens that are compared
SINK = 0.8  # mean cosine of their keys from which on they count as one vector


@dataclass(frozen=True)
class FirstTokenCosines:
    """Similarity of the keys of 32 different tokens, as mean cosine between two of them.

    Attributes:
        first: where each is the first token of a text.
        second: where another token stands before each.
    """

    first: float
    second: float

    @property
    def sink(self) -> bool:
        """True if first tokens share one key, and the same tokens behind another one do not."""
        return self.first >= SINK and 1 - self.first < (1 - self.second) / 3


def first_token_cosines(model: Model, layer: int) -> FirstTokenCosines:
    """Compare the keys that different tokens have at a layer as first and as second token of a text.

    Raises:
        ConfigError: if the model has no such layer.
    """
    words = _words(model)
    batch = model.batch([[before, word] for before, word in zip((*words[1:], words[0]), words, strict=True)])
    keys = read(model, batch, [("key", layer)])["key", layer]
    return FirstTokenCosines(_mean_cosine(keys[:, 0]), _mean_cosine(keys[:, 1]))


class AttentionSink(UserWarning):
    """Warning: a subject is the first token of a text, where the model keeps an attention sink."""


def warn_of_sink(model: Model, subject: str, consequence: str) -> None:
    """Warn that a subject is in the attention sink, with the consequence and the remedy.

    Args:
        subject: its description in the message.
        consequence: a clause, such as "its trace shows little".
    """
    start = advised_start_token(model)
    token = f", or load the model with start_token={start!r} (--start-token)" if start else ""
    warnings.warn(
        f"{subject} is the first token of its text, where {model.name} keeps an attention sink: from the low layers on "
        f"the state there is nearly the same whatever the token is, so {consequence}. Put words before it{token}",
        AttentionSink,
        stacklevel=3,
    )


def advised_start_token(model: Model) -> str | None:
    """The special token after which the keys of first words differ most; None if none works as a start token.

    A declared bos token may be the wrong one: what counts is what the model was trained to see before a text.
    """
    tokenizer = model.tokenizer
    layers = range(1, max(2, model.n_layers // 2))
    found: dict[str, float] = {}
    for token in dict.fromkeys(tokenizer.all_special_tokens):
        number = tokenizer.convert_tokens_to_ids(token)
        if isinstance(number, int) and 0 <= number < len(model.module(("embedding", 0)).get_parameter("weight")):
            batch = model.batch([[number, word] for word in _words(model)])
            keys = read(model, batch, [("key", layer) for layer in layers])
            found[token] = sum(_mean_cosine(keys["key", layer][:, -1]) for layer in layers) / len(layers)
    best = min(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] < SINK else None


def _words(model: Model) -> list[int]:
    """Tokens from all over the vocabulary that are letters."""
    tokenizer = model.tokenizer
    size = min(len(tokenizer), len(model.module(("embedding", 0)).get_parameter("weight")))
    chosen: dict[int, None] = {}
    for place in range(TOKENS):
        start, stop = place * size // TOKENS, (place + 1) * size // TOKENS
        letters = (token for token in range(start, stop) if tokenizer.decode([token]).strip().isalpha())
        chosen[next(letters, start)] = None
    return list(chosen)


def _mean_cosine(keys: Tensor) -> float:
    """Between different rows of `[n, d]`."""
    unit = functional.normalize(keys.float(), dim=1)
    count = len(unit)
    return float((unit @ unit.T).sum() - count) / (count * (count - 1)) if count > 1 else 1.0
