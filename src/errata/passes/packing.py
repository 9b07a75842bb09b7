"""Packing of texts side by side into the rows of a batch, with shared prefixes.

A `PackedSequence` is a shared prefix and its continuations, each of which replaces the rest of the prefix after some
number of tokens. Two targets after one prompt are a prefix and a continuation, and the prompt is run once. Sequences
have many lengths. With several in one row, where each token sees only earlier ones of its own text, few positions are
empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Positions of a row: wide enough for few to stay empty, narrow enough for attention, which looks at all of them.
WIDTH = 64


@dataclass(frozen=True)
class PackedSequence:
    """A shared prefix and its continuations.

    Attributes:
        prefix: its token ids, at least one.
        continuations: for each, how many tokens of the prefix go before it, at least one, and its own token ids.
        wanted: the first token of the prefix whose last hidden state is wanted; there is one, or a continuation.
    """

    prefix: tuple[int, ...]
    continuations: tuple[tuple[int, tuple[int, ...]], ...] = ()
    wanted: int = 0

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The prefix, and each continuation with the tokens before it."""
        return [self.prefix, *(self.prefix[:at] + own for at, own in self.continuations)]

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts))

    @property
    def size(self) -> int:
        """Number of tokens, each counted once."""
        return len(self.prefix) + sum(len(own) for _, own in self.continuations)


class _Token(NamedTuple):
    """One position of a row.

    Attributes:
        owner: index of its sequence in the batch; -1 where there is no token.
        piece: 0 for the prefix of its sequence, then its continuations.
        text: index of its text among all texts of the batch.
        offset: index in its text.
        at: number of tokens of the prefix before its piece.
        wanted: whether its last hidden state is wanted.
    """

    owner: int = -1
    piece: int = 0
    text: int = 0
    offset: int = 0
    at: int = 0
    wanted: bool = False


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences that run together. Made by `side_by_side` or `one_a_row`.

    Attributes:
        members: indexes of its sequences among all.
        rows: the tokens of each row.
        in_order: whether every row is one text, from its first token on.
    """

    members: tuple[int, ...]
    rows: tuple[tuple[_Token, ...], ...]
    in_order: bool

    @cached_property
    def owners(self) -> Tensor:
        """Index in `members` of the sequence at every position, `[b, w]`; -1 where there is none."""
        return self._columns[0]

    @cached_property
    def texts(self) -> Tensor:
        """Text of every token, `[b, w]`: prefixes and continuations of all sequences, in order."""
        return self._columns[2]

    @cached_property
    def offsets(self) -> Tensor:
        """Index of every token in its text, `[b, w]`."""
        return self._columns[3]

    @cached_property
    def begin(self) -> int:
        """The first position of a row that may hold a wanted token."""
        return min(next(i for i, token in enumerate(row) if token.wanted) for row in self.rows)

    @cached_property
    def sees(self) -> Tensor:
        """True where a position (third axis) sees another (last axis), `[b, 1, w, w]`; empty ones see each other."""
        owner, piece, _, offset, at, _ = self._columns
        same_owner = owner[:, :, None] == owner[:, None]
        own = (piece[:, :, None] == piece[:, None]) & (offset[:, None] <= offset[:, :, None])
        prefix = (piece[:, None] == 0) & (offset[:, None] < at[:, :, None])
        return (same_owner & (own | prefix))[:, None]

    def pick(self, states: Tensor, wanted: Sequence[tuple[int, int | None, int]]) -> Tensor:
        """Hidden states `[n, d_model]` of wanted tokens.

        Args:
            states: of all positions of the rows, or of their last ones, `[b, w, d_model]`.
            wanted: index in `members` of each token's sequence, its continuation or None, its index in that.

        Raises:
            KeyError: if there is no such token, or it is not wanted.
        """
        found = [self._places[owner, 0 if piece is None else piece + 1, index] for owner, piece, index in wanted]
        rows, columns = torch.tensor(found).reshape(-1, 2).unbind(1)
        return states[rows, columns - len(self.rows[0])]

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        return {
            (token.owner, token.piece, token.offset - token.at): (i, j)
            for i, row in enumerate(self.rows)
            for j, token in enumerate(row)
            if token.wanted
        }

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        """The attributes of the tokens, each `[b, w]`."""
        return torch.tensor(self.rows).unbind(-1)


def side_by_side(
    members: Sequence[int], sequences: Sequence[PackedSequence], bins: Sequence[Sequence[int]]
) -> PackedBatch:
    """Sequences packed into rows, those of one bin in each; in a row, tokens that are not wanted come first."""
    pieces = _pieces(sequences)
    width = max(sum(sequences[i].size for i in some) for some in bins)
    rows = []
    for some in bins:
        row = sorted((token for i in some for piece in pieces[i] for token in piece), key=lambda token: token.wanted)
        rows.append((*[_Token()] * (width - len(row)), *row))
    return PackedBatch(tuple(members), tuple(rows), in_order=False)


def one_a_row(members: Sequence[int], sequences: Sequence[PackedSequence]) -> PackedBatch:
    """Sequences with one row for each text: prefixes, and continuations with the tokens before them."""
    width = max(sequence.length for sequence in sequences)
    rows = []
    for pieces in _pieces(sequences):
        for piece in pieces:
            other = piece[0]._replace(wanted=False)  # padding behind the text belongs to it too: nobody sees it
            before = (other._replace(offset=i) for i in range(other.at))
            behind = (other._replace(offset=i) for i in range(other.offset + len(piece), width))
            rows.append((*before, *piece, *behind))
    return PackedBatch(tuple(members), tuple(rows), in_order=True)


def _pieces(sequences: Sequence[PackedSequence]) -> list[list[list[_Token]]]:
    """Tokens of each sequence's prefix and continuations."""
    found: list[list[list[_Token]]] = []
    text = 0
    for owner, sequence in enumerate(sequences):
        pieces = []
        for piece, (at, ids) in enumerate([(0, sequence.prefix), *sequence.continuations]):
            wanted = sequence.wanted if piece == 0 else 0
            pieces.append([_Token(owner, piece, text, at + i, at, wanted=i >= wanted) for i in range(len(ids))])
            text += 1
        found.append(pieces)
    return found


def shares(sizes: Sequence[int], limit: int) -> list[range]:
    """Sizes divided, in order, into shares of about equal sum, at most about `limit`."""
    ends = torch.tensor(sizes).cumsum(0)
    count = math.ceil(int(ends[-1]) / limit)
    middles = ends - torch.tensor(sizes) / 2
    share = (middles * count / int(ends[-1])).long().tolist()
    begins = [i for i in range(len(sizes)) if i == 0 or share[i] != share[i - 1]]
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def bins(sizes: Sequence[int], width: int, widest: int) -> list[list[int]]:
    """Sizes packed into few bins of about `width`, by first-fit decreasing.

    Args:
        sizes: none exceeds `widest`.
        width: about the size of a bin.
        widest: no bin exceeds it.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fewest = math.ceil(sum(sizes) / min(max(width, sizes[order[0]]), widest))
    for count in range(fewest, len(sizes) + 1):
        for room in range(max(math.ceil(sum(sizes) / count), sizes[order[0]]), widest + 1):
            found = _first_fit(sizes, order, room)
            if len(found) <= count:
                return found
    raise ValueError(f"a size of {max(sizes)} is wider than {widest}")


def _first_fit(sizes: Sequence[int], order: Sequence[int], width: int) -> list[list[int]]:
    found: list[list[int]] = []
    room: list[int] = []
    for i in order:
        chosen = next((b for b, left in enumerate(room) if left >= sizes[i]), len(found))
        if chosen == len(found):
            found.append([])
            room.append(width)
        found[chosen].append(i)
        room[chosen] -= sizes[i]
    return [sorted(some) for some in found]
