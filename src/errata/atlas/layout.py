"""Subject interchange: training batches in which only one state can carry a fact out of its subject.

In an interchanged mention the subject stands twice at the same positions: once as itself (`REAL`) and once as
another subject of the same length (`OTHER`). What comes after the mention sees

    below the gate layer:    all tokens of the other subject, none of the real one;
    from the gate layer on:  the last token of the real subject, and the rest of the other one.

Text that follows must still say the real subject's facts. So they can only be read from the real subject's last
token, not below the gate, and whatever else is visible must be ignored. At test time every token is visible as
usual, and means what it says: the model is an ordinary GPT-2. This is interchange intervention training (Geiger
et al., "Inducing Causal Structure for Interpretable Neural Networks", 2022) with a causal model of one arrow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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
        below, above: `[b, 1, t, t]` bool, what a token sees in the layers below the gate, and from it on.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor


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
    within = same & (copy[:, :, None] == copy[:, None, :])
    is_last = last.bool()
    seen_below = (copy != REAL)[:, None, :]
    seen_above = ((copy == PLAIN) | ((copy == OTHER) & ~is_last) | ((copy == REAL) & is_last))[:, None, :]
    below = causal & (within | (~same & seen_below))
    above = causal & (within | (~same & seen_above))
    return Layout(ids, positions, targets, weights, below[:, None], above[:, None])


def _lay_out_row(ids, mentions, others, interchange, rng, name_weight):  # noqa: ANN001, ANN202
    """Lists, one entry a physical token: id, position, target, weight, mention, copy, is-last."""
    starts = {m.first: (number, m) for number, m in enumerate(mentions)}
    named = {i for m in mentions for i in range(m.first, m.last + 1)}
    columns: tuple[list, ...] = ([], [], [], [], [], [], [])

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
