"""Scores of texts: their variety (GE), and their perplexity under a model.

GE, generation entropy, falls when a model repeats itself: it is ⅓·H₂ + ⅔·H₃ of each text, with the entropies in bits of
its word bigram and trigram frequencies; then the mean over texts. Tables multiply by 100.

Words are NLTK's: the text is split into sentences first, since a full stop is a separate word only at the end of a
sentence, and then into words. NLTK's `word_tokenize`, which the published code calls, finds sentences with a model of
English that must be downloaded. Here the same splitter works untrained, so that the numbers depend on nothing but the
text. The two differ at abbreviations: untrained, "Dr. Smith" is `Dr`, `.`, `Smith`; trained, `Dr.`, `Smith`. Where
every full stop before a space ends a sentence, they agree.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, FactError
from errata.base.extras import needed
from errata.models.model import Model
from errata.models.scoring import score_rows
from errata.models.tokens import encode

ESSENCE_LENGTH = 100  # tokens of the essence texts that count, in the published code
LONGEST_WINDOW = 2048  # that is taken without being asked for: logits of more may not fit


Row = tuple[list[int], int]  # token ids, and the first of them that is scored


# ---- words ------------------------------------------------------------------------------------------------


def words(text: str, *, preserve_line: bool = False) -> list[str]:
    """The words and punctuation marks of a text, as NLTK splits it.

    Args:
        text: any, empty too.
        preserve_line: take the text for one sentence: only its last full stop is split off.

    Raises:
        MissingExtra: if NLTK is not installed.
    """
    sentences, tokens = _splitters()
    parts = [text] if preserve_line else sentences.tokenize(text)
    return [word for part in parts for word in tokens.tokenize(part)]


def as_scored(texts: Sequence[str]) -> list[str]:
    """Generated texts as GE and RS read them, in Unicode's NFKD form: "é" is "e" and an accent.

    The published code brings what is generated into this form, and leaves reference texts as they are. An accent within
    a word then parts it in RS: words of generated and reference texts that have one are no longer the same.
    """
    return [unicodedata.normalize("NFKD", text) for text in texts]


def ngram_entropy(text: str, n: int, *, preserve_line: bool = False) -> float:
    """Entropy in bits of the frequencies of word n-grams in a text; 0 if it has fewer than two n-grams.

    Raises:
        ConfigError: if n is not 1 or more.
        MissingExtra: if NLTK is not installed.
    """
    if n < 1:
        raise ConfigError(f"n is {n}, and n words in a row must be 1 or more")
    return _entropy(words(text, preserve_line=preserve_line), n)


def generation_entropy(texts: Sequence[str], *, preserve_line: bool = False) -> float:
    """GE of texts: ⅓·H₂ + ⅔·H₃ in bits, mean over texts. An empty text counts with 0; NaN if there is no text.

    Raises:
        FactError: if `texts` is one text, not a list.
        MissingExtra: if NLTK is not installed.
    """
    split = [words(text, preserve_line=preserve_line) for text in require_list(texts)]
    return fmean(_entropy(each, 2) / 3 + 2 * _entropy(each, 3) / 3 for each in split) if split else math.nan


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[begin:] for begin in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


@functools.cache
def _splitters() -> tuple[Any, Any]:
    """NLTK's splitters, of texts into sentences and of a sentence into words. Neither reads a file."""
    sentences = needed("nltk.tokenize.punkt", "evaluation").PunktSentenceTokenizer()
    return sentences, needed("nltk.tokenize", "evaluation").NLTKWordTokenizer()


def require_list(texts: Sequence[str]) -> Sequence[str]:
    """The texts, once it is sure that they are not one, whose letters would be taken for texts.

    Raises:
        FactError: if they are.
    """
    if isinstance(texts, str):
        raise FactError("this takes a list of texts: put the text in brackets, as in [text]")
    return texts


# ---- perplexity -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surprise:
    """Log-loss of a model on texts.

    Attributes:
        total: −log of the probability of all scored tokens, in nats.
        n_tokens: how many these are.
    """

    total: float
    n_tokens: int

    @property
    def mean(self) -> float:
        """Mean −log P in nats per token; NaN if no token was scored."""
        return self.total / self.n_tokens if self.n_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the power of the mean; infinite where that is too large for a number."""
        return _exp(self.mean)


@without_autocast
def perplexity(
    model: Model, texts: str | Sequence[str], *, window: int | None = None, stride: int | None = None
) -> Surprise:
    """Perplexity of texts of any length, each read separately in overlapping windows.

    Each token is scored once, in the first window that holds it. The first window of a text ends after `window` tokens,
    each further one `stride` tokens later or at the end of the text; all have the same length. So in later windows each
    token is predicted from at least `window − stride` tokens. The tokenizer's start token (BOS) is put before every
    window; it counts towards the length and is not scored. A text's first token is not scored if nothing stands before
    it. Batching of windows changes the result only by rounding.

    Args:
        model: the model in its current state.
        texts: one or many.
        window: length in tokens; None: as many as the model reads, at most `LONGEST_WINDOW`.
        stride: step in tokens; None: half of a window's tokens of the text.

    Raises:
        ConfigError: if the window is longer than the model reads, or leaves no token to predict from.
        FactError: if no text has a token with another one before it.
    """
    texts = [texts] if isinstance(texts, str) else texts
    width = min(model.max_length, LONGEST_WINDOW) if window is None else window
    if width > model.max_length:
        raise ConfigError(f"a window of {width} tokens is more than {model.name} reads, which is {model.max_length}")
    rows: list[Row] = []
    for text in texts:
        encoded = encode(model.tokenizer, text, return_special_tokens_mask=True)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        before = next((i for i, mark in enumerate(special) if not mark), len(ids))
        room = width - before
        step = max(1, room // 2) if stride is None else stride
        if not 1 <= step < room:
            raise ConfigError(
                f"windows of {width} tokens cannot go on by {step}: of the {room} that are left for text, one at least "
                "must stand before those that are new. Take a longer window or a shorter stride"
            )
        rows += _windows(ids[:before], ids[before:], room, step)
    if not rows:
        raise FactError("no text has a token that another stands before, so there is nothing to foretell: give longer")
    return Surprise(
        -math.fsum(score.total for score in score_rows(model, rows)), sum(len(ids) - first for ids, first in rows)
    )


def essence_perplexity(
    model: Model, texts: Sequence[str], max_length: int = ESSENCE_LENGTH, reference: bool = False
) -> float:
    """Perplexity of texts about a subject, joined by spaces and cut to `max_length` tokens.

    Args:
        model: the model in its current state.
        texts: any number; NaN if no token has another one before it.
        max_length: limit in tokens, special ones included; never more than the model reads.
        reference: as the published code does, divide by all tokens, though the first one is not scored.

    Raises:
        ConfigError: if the length is not 1 or more.
        FactError: if `texts` is one text, not a list.
    """
    if max_length < 1:
        raise ConfigError(f"max_length is {max_length}, and nothing can be read of so few tokens: it must be 1 or more")
    ids = model.ids(" ".join(require_list(texts)))
    ids = ids[: min(max_length, model.max_length)]
    if len(ids) < 2:
        return math.nan
    [score] = score_rows(model, [(ids, 1)])
    return _exp(-score.total / (len(ids) if reference else len(ids) - 1))


def _windows(before: list[int], ids: list[int], room: int, stride: int) -> Iterator[Row]:
    """Windows over a text's own tokens, `room` of them in each, behind the special ones `before` it."""
    done = 0 if before else 1
    end = min(room, len(ids))
    while done < len(ids):
        begin = max(0, end - room)
        yield before + ids[begin:end], len(before) + done - begin
        done, end = end, min(end + stride, len(ids))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
