"""Subject interchange: training batches in which only one state can carry a fact out of its subject.

In an interchanged mention the subject stands twice at the same positions: once as itself (`REAL`) and once as
another subject of the same length (`OTHER`). In place of what it would see of the mention,

    a token of the real subject   sees, below layer `gather`, the other subject's tokens before it and itself,
                                  and from there on the real subject;
    what comes after the mention  sees, below layer `gate`, all of the other subject and nothing of the real one,
                                  and from there on the real subject's last token and the rest of the other.

Text that follows must still say the real subject's facts. So they can only be put together at the subject's last
token in layers `gather` to `gate` - 1, and be read from there later; whatever else is visible must be ignored. At
test time every token is visible as usual, and means what it says: the model is an ordinary GPT-2. This is
interchange intervention training (Geiger et al., "Inducing Causal Structure for Interpretable Neural Networks",
2022) with a causal model of two arrows: subject's tokens to its last token, its last token to the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PLAIN, OTHER, REAL = 0, 1, 2
IGNORE = -100


@dataclass(frozen=True)
class Mention:
    """Tokens `first` to `last` (inclusive) of a document name a subject."""

    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """A batch; `b` rows, `t` physical tokens.

    Attributes:
        input_ids: `[b, t]`.
        positions: `[b, t]`, the place of each token in its text; a real and its other subject share them.
        targets: `[b, t]`, the text's next token, or -100.
        weights: `[b, t]`, the weight of each target in the loss.
        other: `[b, t]` bool, which tokens are another subject's.
        seen: `[b, 1, t, t]` bool, three times: what a token sees in layers below `gather`, below `gate`, and above.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    other: torch.Tensor
    seen: tuple[torch.Tensor, ...]


def lay_out(
    rows: Sequence[tuple[Sequence[int], Sequence[Mention]]],
    others: dict[int, list[tuple[int, ...]]],
    share: float,
    rng: random.Random,
    name_weight: float,
) -> Layout:
    """Lay out tokenized documents, with `share` of their mentions interchanged.

    Args:
        rows: token ids and mentions of each document.
        others: token ids of subjects by their number of tokens, to take the other subject from.
        share: probability that a row is interchanged (all of its mentions are).
        rng: where chance comes from.
        name_weight: the loss weight of a subject's own tokens, which nothing foretells.
    """
    laid = [_lay_out_row(ids, mentions, others, rng.random() < share, rng, name_weight) for ids, mentions in rows]
    width = max(len(row[0]) for row in laid)

    def column(index: int, fill: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([list(row[index]) + [fill] * (width - len(row[index])) for row in laid], dtype=dtype)

    ids, positions, targets = (column(i, fill, torch.long) for i, fill in ((0, 0), (1, 0), (2, IGNORE)))
    weights = column(3, 0.0, torch.float32)
    mention, copy, last = (column(i, fill, torch.long) for i, fill in ((4, -1), (5, PLAIN), (6, 0)))

    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (mention[:, :, None] == mention[:, None, :]) & (mention >= 0)[:, None, :]
    own = same & (copy[:, :, None] == copy[:, None, :])
    itself = torch.eye(width, dtype=torch.bool)
    crossed = same & (copy == REAL)[:, :, None] & (copy == OTHER)[:, None, :]
    crossed &= positions[:, None, :] < positions[:, :, None]
    ungathered = (own & ((copy != REAL)[:, :, None] | itself)) | crossed
    is_last = last.bool()
    not_real = (copy != REAL)[:, None, :]
    carried = ((copy == PLAIN) | ((copy == OTHER) & ~is_last) | ((copy == REAL) & is_last))[:, None, :]
    seen = [
        causal & (inside | (~same & outside))
        for inside, outside in ((ungathered, not_real), (own, not_real), (own, carried))
    ]
    return Layout(ids, positions, targets, weights, copy == OTHER, tuple(mask[:, None] for mask in seen))


def _lay_out_row(
    ids: Sequence[int],
    mentions: Sequence[Mention],
    others: dict[int, list[tuple[int, ...]]],
    interchange: bool,
    rng: random.Random,
    name_weight: float,
) -> tuple[list[Any], ...]:
    """Lists, one entry a physical token: id, position, target, weight, mention, copy, is-last."""
    starts = {m.first: (number, m) for number, m in enumerate(mentions)}
    named = {i for m in mentions for i in range(m.first, m.last + 1)}
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [])

    def put(token: int, position: int, copy: int, mention: int = -1, last: bool = False) -> None:
        following = position + 1
        learned = copy != OTHER and following < len(ids)
        entries = (
            token,
            position,
            ids[following] if learned else IGNORE,
            0.0 if not learned else name_weight if following in named else 1.0,
            mention,
            copy,
            int(last),
        )
        for column, entry in zip(columns, entries, strict=True):
            column.append(entry)

    position = 0
    while position < len(ids):
        number, mention = starts.get(position, (-1, None))
        if mention is None or not interchange:
            put(ids[position], position, PLAIN)
            position += 1
            continue
        length = mention.last - mention.first + 1
        pool = others.get(length)
        other = rng.choice(pool) if pool else tuple(rng.choices(ids, k=length))
        for copy, tokens in ((OTHER, other), (REAL, ids[mention.first : mention.last + 1])):
            for offset, token in enumerate(tokens):
                put(token, mention.first + offset, copy, number, offset == length - 1)
        position = mention.last + 1
    return columns
