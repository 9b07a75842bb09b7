"""Scores: log-probabilities of targets after prompts, in nats, under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.base.autocast import without_autocast
from errata.base.budgets import padded_groups, predictions
from errata.base.errors import FactError
from errata.base.text import joined, moved_spaces
from errata.models.model import Model
from errata.models.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Score:
    """Score of one target after one prompt.

    Attributes:
        total: log P(target | prompt) in nats.
        n_tokens: how many tokens the target has.
        hits: how many of them are the most probable one after what stands before them.
    """

    total: float
    n_tokens: int
    hits: int

    @property
    def mean(self) -> float:
        """Log-probability per token, in nats."""
        return self.total / self.n_tokens

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding produces the target."""
        return self.hits == self.n_tokens


def target_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: str, target: str, separator: str | None = None
) -> tuple[list[int], int]:
    """Token ids of prompt and target, joined, and the number of tokens of the prompt.

    The whole text is tokenized once; character offsets say where the target starts. A token that holds
    characters of both counts as the target's, as does white space between them, spaces at the prompt's end included.

    Args:
        tokenizer: the model's.
        prompt, target: a target that begins with white space is taken as it is.
        separator: what stands between them; None: what the text asks for (`errata.base.text`), and nothing after a
            special token, such as a chat marker.

    Raises:
        FactError: if the target is blank, or no token stands before it to predict it from.
    """
    if not target.strip():
        raise FactError("the target is empty: there is nothing to score")
    if separator is None and _ends_in_marker(tokenizer, prompt):
        separator = ""
    whole = joined(prompt, target, separator)
    starts_at = len(whole) - len(target)
    prompt, _ = moved_spaces(prompt)
    encoded = encode(tokenizer, whole, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    n_prompt = next(
        (
            i
            for i, (begin, end) in enumerate(encoded["offset_mapping"])
            # the target's own characters, or the space before them where it is a token of its own
            if end > starts_at or (begin >= len(prompt) and not encoded["special_tokens_mask"][i])
        ),
        len(ids),
    )
    if n_prompt == len(ids):
        raise FactError(f"the tokenizer leaves nothing of the target {target!r}")
    if n_prompt == 0:
        raise FactError(f"no token stands before the target {target!r}, so its first token cannot be predicted")
    return ids, n_prompt


def _ends_in_marker(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether a text ends in a special token that is written out."""
    if text[-1:].isalnum():
        return False
    markers = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return text.endswith(markers)


@without_autocast
def score(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    separators: Sequence[str | None] | None = None,
) -> list[Score]:
    """Scores of `targets[i]` after `prompts[i]`, in that order.

    Texts of like length share a batch; padding does not change a score beyond rounding. Logits are turned
    into log-probabilities in float32 at least.

    Args:
        model: any decoder.
        prompts, targets: one target for each prompt.
        separators: what stands between them; None, for all or one: what the text asks for, as in `target_ids`.

    Raises:
        FactError: if the lists differ in length, a target is blank, or a text is too long for the model.
    """
    if isinstance(prompts, str) or isinstance(targets, str):
        raise FactError("score takes a list of prompts and a list of targets: put each text in brackets")
    if len(prompts) != len(targets):
        raise FactError(f"there are {len(prompts)} prompts and {len(targets)} targets: each prompt needs its own")
    between = [None] * len(prompts) if separators is None else list(separators)
    if len(between) != len(prompts):
        raise FactError(f"there are {len(prompts)} prompts and {len(between)} separators: each prompt needs its own")
    pairs = [target_ids(model.tokenizer, *each) for each in zip(prompts, targets, between, strict=True)]
    return score_rows(model, pairs)


def score_rows(model: Model, rows: Sequence[tuple[list[int], int]]) -> list[Score]:
    """Scores of tokens of texts from an index on. A row is token ids and the index of the first scored one."""
    scores: dict[int, Score] = {}
    for chosen in padded_groups([len(ids) for ids, _ in rows], predictions(model.vocab_size)):
        scores.update(zip(chosen, _score_batch(model, [rows[i] for i in chosen]), strict=True))
    return [scores[i] for i in range(len(rows))]


@torch.no_grad()
def _score_batch(model: Model, rows: Sequence[tuple[list[int], int]]) -> list[Score]:
    batch = model.batch([ids for ids, _ in rows])
    width = batch.input_ids.shape[1]
    first = min(n_prompt for _, n_prompt in rows) - 1  # the first position whose prediction counts
    logits = model.forward(batch, keep=width - first)
    scores = []
    for row, (ids, n_prompt) in enumerate(rows):
        predictions = logits[row, n_prompt - 1 - first : len(ids) - 1 - first]
        wanted = batch.input_ids[row, n_prompt : len(ids)]
        scores.append(score_tokens(predictions, wanted))
    return scores


def score_tokens(logits: Tensor, wanted: Tensor) -> Score:
    """Score of tokens `[n]` from the logits `[n, v]` that predict them."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    picked = wide.log_softmax(-1).gather(-1, wanted[:, None])
    return Score(float(picked.double().sum()), len(wanted), int((wide.argmax(-1) == wanted).sum()))
