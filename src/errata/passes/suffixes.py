"""Suffixes of recorded texts of any lengths, run together.

A `Recording` resumes rows of one length at one token. Editors run the last few tokens of many texts again and again:
contexts of one fact, facts of one table. Each suffix is sliced out of its recording (`slice_recording`) from the first
token that matters, and suffixes of about as many tokens run in one batch (`collate`), however long the texts before
them: rows are aligned at their last token, and what is missing in front of the shorter ones is masked.

Every batch is checked on some of its rows against what was recorded. If the results differ, because a block makes its
own masks, only rows of one slice run together.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from errata.base import budgets
from errata.base.errors import UnsupportedModel
from errata.models.model import Model
from errata.passes.block_call import Call, Earlier, MaskValues, Past, is_mask
from errata.passes.replay import Recording
from errata.passes.token_batch import Mismatch, TokenBatch, mismatch

# Tokens that fill a batch: with fewer, weights take longer to read than to multiply with.
_FULL = 96
# Rows of a batch that are checked.
_CHECKED = 4


@dataclass(frozen=True)
class Slice:
    """Rows of a recording from one token on, with everything needed to run them. Made by `slice_recording`.

    Attributes:
        labels: names of the rows.
        first: the lowest block that they can be run in.
        token: the first of their tokens.
        states: hidden states that enter block `first`, `[r, n, d_model]`.
        past: earlier tokens in each block.
        calls: recorded arguments of all blocks of the model.
        recorded: of the first row, what enters the first block and leaves each block, each `[1, n, d_model]`.
    """

    labels: tuple[int, ...]
    first: int
    token: int
    states: Tensor
    past: tuple[Past | Earlier, ...]
    calls: tuple[Call, ...]
    recorded: tuple[Tensor, ...]


def slice_recording(
    recording: Recording, rows: Mapping[int, int], tokens: tuple[int, int], layers: tuple[int, int]
) -> Slice:
    """Some rows of a recording, by their labels.

    Args:
        recording: keeps nothing alive but the arguments of its blocks.
        rows: the recorded row of each label.
        tokens: the first token, and the first after it that is not wanted.
        layers: the first block that they are to be run in, and the first after it in which they are not.

    Raises:
        UnsupportedModel: if a block has stored no keys and values.
    """
    token, end = tokens
    first, last = layers
    index = torch.tensor(list(rows.values()), device=recording.model.device)
    try:
        past = tuple(recording.past(layer, index, token) for layer in range(first, last))
    except (AttributeError, TypeError) as problem:
        raise _refusal(recording.model, Mismatch(first, "it stores no keys and values")) from problem
    return Slice(
        labels=tuple(rows),
        first=first,
        token=token,
        states=recording.states[first][index, token:end],
        past=past,
        calls=tuple(recording.calls),
        recorded=tuple(recording.states[layer][index[:1], token:end] for layer in range(first, last + 1)),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class SuffixBatch(TokenBatch):
    """Suffixes that run together, each at the end of its row.

    Attributes:
        labels: names of the rows.
        counts: tokens of each, `[r]`.
        states: hidden states that enter the first block, as recorded: `[r, n, d_model]`; in front of a row's first
            token, any numbers.
    """

    labels: tuple[int, ...]
    counts: Tensor
    states: Tensor

    def of(self, rows: Sequence[int]) -> SuffixBatch:
        """Some of the rows."""
        consecutive = rows[-1] - rows[0] + 1 == len(rows)  # a slice copies nothing
        index = slice(rows[0], rows[-1] + 1) if consecutive else torch.tensor(rows, device=self.states.device)
        return SuffixBatch(
            model=self.model,
            calls=self.calls,
            past=lambda layer: self.past(layer).of(index),
            token=self.token,
            layout=self.layout and (self.layout[0][index], self.layout[1][index]),
            labels=tuple(self.labels[row] for row in rows),
            counts=self.counts[index],
            states=self.states[index],
        )

    def reached(self, layer: int, end: int) -> Tensor:
        """Tokens of each row, `[r, n]`, that its first token can reach through blocks `layer` to `end` (exclusive).

        By the masks alone: where attention sees few tokens and few blocks are left, the last may be out of reach.
        """
        rows, width = self.states.shape[:2]
        found = torch.arange(width, device=self.counts.device) == (width - self.counts)[:, None]
        for index in range(layer, end):
            given = self.arguments(index, 0, width, rows)
            masks = [value for name, value in given.items() if is_mask(name) and value is not None and value.dim() == 4]
            for mask in masks[:1] or [torch.ones(1, 1, width, width, dtype=torch.bool, device=found.device).tril()]:
                seen = MaskValues.of(mask).is_seen(mask).any(1)[..., -width:, -width:]
                found = found | (seen & found[:, None]).any(-1)
        return found


class Suffixes:
    """Collated slices. Made by `collate`.

    Attributes:
        batches: one for each number of tokens that fills one; one a slice where rows with different pasts cannot run
            together.
    """

    def __init__(self, batches: Sequence[SuffixBatch]):
        self.batches = tuple(batches)

    def micro_batches(self, labels: Container[int], tokens: int | None = None) -> Iterator[SuffixBatch]:
        """The rows with these labels, about so many tokens at a time; None: as many as suit gradients."""
        for batch in self.batches:
            most = tokens or budgets.tokens(batch.model.device, "backward")
            chosen = [row for row, label in enumerate(batch.labels) if label in labels]
            for group in budgets.groups([batch.states.shape[1]] * len(chosen), most):
                yield batch.of([chosen[i] for i in group])


def collate(model: Model, slices: Sequence[Slice]) -> Suffixes:
    """Slices of one model and the same blocks, collated into few batches; if that changes results, one for each slice.

    Raises:
        UnsupportedModel: if even a slice alone does not give what was recorded.
    """
    whole = any(call.whole for each in slices for call in each.calls)
    groups = [[each] for each in slices] if whole else _of_like_width(slices)
    return Suffixes([batch for group in groups for batch in _checked(model, group)])


def _checked(model: Model, slices: Sequence[Slice]) -> list[SuffixBatch]:
    """Slices in one batch if that gives what was recorded, or else in one each."""
    batch = _batch(model, slices)
    wrong = _mismatch(batch, slices)
    if not wrong:
        return [batch]
    if len(slices) == 1:
        raise _refusal(model, wrong)
    return [alone for each in slices for alone in _checked(model, [each])]


def _refusal(model: Model, wrong: Mismatch) -> UnsupportedModel:
    return wrong.refusal(model, "resumed in the middle of a text", "cannot be replayed from a recorded run")


def _of_like_width(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices of as many tokens together, since padding is run too; too few go with the next wider ones, or with the
    last before them."""
    widths = [each.states.shape[1] for each in slices]
    groups: list[list[int]] = []
    waiting: list[int] = []
    for width in sorted(set(widths)):
        waiting += [i for i, own in enumerate(widths) if own == width]
        if sum(len(slices[i].states) for i in waiting) * width >= _FULL:
            groups.append(waiting)
            waiting = []
    if groups:
        groups[-1] += waiting
    elif waiting:
        groups.append(waiting)
    return [[slices[i] for i in sorted(group)] for group in groups]


def _batch(model: Model, slices: Sequence[Slice]) -> SuffixBatch:
    """All rows of some slices, aligned at their last token; a slice alone as it was recorded."""
    device, first = slices[0].states.device, slices[0].first
    counts = torch.tensor([each.states.shape[1] for each in slices], device=device)
    tokens = torch.tensor([each.token for each in slices], device=device)
    rows = torch.tensor([len(each.states) for each in slices], device=device)
    width, longest = int(counts.max()), int(tokens.max())
    past: Sequence[Past | Earlier] = slices[0].past
    layout = None
    if len(slices) > 1:
        past = [_joined([each.past[block] for each in slices], longest) for block in range(len(past))]
        positions, sees = _layout(tokens, counts, longest, width)
        layout = positions.repeat_interleave(rows, 0), sees.repeat_interleave(rows, 0)
    return SuffixBatch(
        model=model,
        # The arguments of a longer text begin with those of a shorter one.
        calls=max((each.calls for each in slices), key=lambda calls: calls[0].length),
        past=lambda layer: past[layer - first],
        token=longest,
        layout=layout,
        labels=tuple(label for each in slices for label in each.labels),
        counts=counts.repeat_interleave(rows),
        states=torch.cat([_padded(each.states, width) for each in slices]),
    )


def _layout(tokens: Tensor, counts: Tensor, longest: int, width: int) -> tuple[Tensor, Tensor]:
    """`TokenBatch.layout` of slices that begin at `tokens` `[s]` and have `counts` `[s]` tokens.

    The earlier tokens are aligned at their last in the first `longest` columns, the slice's in the `width` columns
    behind them. Columns in front of the slice's tokens see themselves alone.
    """
    column = torch.arange(-longest, width, device=tokens.device)
    tokens, absent = tokens[:, None], (width - counts)[:, None]
    positions = torch.where(column < 0, tokens + column, tokens + (column - absent).clamp(min=0))
    there = torch.where(column < 0, positions >= 0, column >= absent)
    own = torch.eye(longest + width, dtype=torch.bool, device=tokens.device)[longest:]
    earlier = there[:, None] & (positions[:, None] <= positions[:, longest:, None])
    sees = torch.where(there[:, longest:, None], earlier, own)
    return positions.clamp(min=0), sees[:, None]


def _joined(past: Sequence[Past | Earlier], longest: int) -> Past:
    """Keys and values of all rows, aligned at the last of their tokens."""

    def padded(value: Tensor) -> Tensor:
        return functional.pad(value, (0, 0, longest - value.shape[-2], 0))

    each = [one for one in past if isinstance(one, Past)]  # whole texts are not collated
    keys = torch.cat([padded(one.keys_before) for one in each])
    return Past(keys, torch.cat([padded(one.values_before) for one in each]))


def _padded(states: Tensor, width: int) -> Tensor:
    """Hidden states with the first repeated in front, up to so many tokens."""
    missing = width - states.shape[1]
    return torch.cat([states[:, :1].expand(-1, missing, -1), states], 1) if missing else states


def _mismatch(batch: SuffixBatch, slices: Sequence[Slice]) -> Mismatch | None:
    """The first block that does not give back the recorded hidden states, in some rows of the extreme lengths."""
    order = sorted(range(len(slices)), key=lambda i: (slices[i].token, slices[i].states.shape[1]))
    chosen = sorted({order[round(i * (len(order) - 1) / (_CHECKED - 1))] for i in range(_CHECKED)})
    if len(chosen) == 1 < len(batch.labels):
        chosen *= 2  # some blocks take one row, and not several
    some = batch.of([sum(len(each.states) for each in slices[:i]) for i in chosen])
    width, first = batch.states.shape[1], slices[0].first
    return mismatch(
        partial(some.step),
        range(first, first + len(slices[0].past)),
        lambda layer: torch.cat([_padded(slices[i].recorded[layer - first], width) for i in chosen]),
        torch.arange(width, device=some.counts.device) >= (width - some.counts)[:, None],
    )
