"""How texts that share their beginnings lie side by side in the rows of a batch.

A *strand* is a text's tokens, the trunk, and branches that leave it: other ways to go on after so many of its tokens.
Two targets after one prompt are a trunk and a branch, and the prompt is run once. Strands are of many lengths; several
in one row, where each token sees those before it in its own text alone, leave little room that is run for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Slots of a row: wide enough for little to be left over, narrow enough for attention, which looks at all of them.
WIDTH = 64


@dataclass(frozen=True)
class Strand:
    """Tokens of one text.

    Attributes:
        trunk: its token ids, at least one.
        branches: for each, how many tokens of the trunk go before it, at least one, and its own token ids.
        wanted: the first token of the trunk whose state behind the last block is asked for; there is one, or a branch.
    """

    trunk: tuple[int, ...]
    branches: tuple[tuple[int, tuple[int, ...]], ...] = ()
    wanted: int = 0

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The trunk and each branch with what goes before it."""
        return [self.trunk, *(self.trunk[:at] + own for at, own in self.branches)]

    @property
    def length(self) -> int:
        """Of the longest text, in tokens."""
        return max(map(len, self.texts))

    @property
    def size(self) -> int:
        """How many tokens there are, each once."""
        return len(self.trunk) + sum(len(own) for _, own in self.branches)


class _Slot(NamedTuple):
    """Where a token stands in its text, and what it sees.

    Attributes:
        owner: the place of its strand in the pack; -1 where there is no token.
        piece: which trunk or branch of its strand it belongs to, from 0; text: which of all texts of the pack.
        position: in its text; at: how many tokens of the trunk go before its piece.
        wanted: whether its state behind the last block is asked for.
    """

    owner: int = -1
    piece: int = 0
    text: int = 0
    position: int = 0
    at: int = 0
    wanted: bool = False


@dataclass(frozen=True, eq=False)
class Pack:
    """Strands that are run together. Made by `side_by_side` or `one_a_row`.

    Attributes:
        members: which of all strands they are.
        slots: of each row of the batch.
        in_order: whether every row is one text, from its first token on.
    """

    members: tuple[int, ...]
    slots: tuple[tuple[_Slot, ...], ...]
    in_order: bool

    @cached_property
    def owners(self) -> Tensor:
        """The place in `members` of the strand of every slot, `[b, w]`; -1 where there is none."""
        return self._columns[0]

    @cached_property
    def texts(self) -> Tensor:
        """Which text a slot's token is of, `[b, w]`: trunks and branches of all strands, in order."""
        return self._columns[2]

    @cached_property
    def positions(self) -> Tensor:
        """Where it stands there, `[b, w]`."""
        return self._columns[3]

    @cached_property
    def begin(self) -> int:
        """The first slot of a row that may hold a token whose state is asked for."""
        return min(next(i for i, slot in enumerate(row) if slot.wanted) for row in self.slots)

    @cached_property
    def sees(self) -> Tensor:
        """Which slots see which, `[b, 1, w, w]`; those that hold no token see each other."""
        owner, piece, _, position, at, _ = self._columns
        alike = owner[:, :, None] == owner[:, None]
        own = (piece[:, :, None] == piece[:, None]) & (position[:, None] <= position[:, :, None])
        trunk = (piece[:, None] == 0) & (position[:, None] < at[:, :, None])
        return (alike & (own | trunk))[:, None]

    def places(self, wanted: Sequence[tuple[int, int | None, int]]) -> tuple[Tensor, Tensor]:
        """Row and slot `[n]` of tokens: (place of the strand in `members`, its branch or None, index in that).

        Raises:
            KeyError: if there is no such token, or none that is asked for.
        """
        found = [self._places[owner, 0 if branch is None else branch + 1, at] for owner, branch, at in wanted]
        rows, slots = torch.tensor(found).reshape(-1, 2).unbind(1)
        return rows, slots

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        return {
            (slot.owner, slot.piece, slot.position - slot.at): (i, j)
            for i, row in enumerate(self.slots)
            for j, slot in enumerate(row)
            if slot.wanted
        }

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        """Each attribute of the slots, `[b, w]`."""
        return torch.tensor(self.slots).unbind(-1)


def side_by_side(members: Sequence[int], strands: Sequence[Strand], bins: Sequence[Sequence[int]]) -> Pack:
    """Strands packed into rows, the places of some in each; in a row the tokens come first that nobody asks for."""
    pieces = _pieces(strands)
    width = max(sum(strands[i].size for i in some) for some in bins)
    lines = []
    for some in bins:
        line = sorted((slot for i in some for piece in pieces[i] for slot in piece), key=lambda slot: slot.wanted)
        lines.append((*[_Slot()] * (width - len(line)), *line))
    return Pack(tuple(members), tuple(lines), in_order=False)


def one_a_row(members: Sequence[int], strands: Sequence[Strand]) -> Pack:
    """Each trunk in a row of its own, and each branch with what goes before it."""
    width = max(strand.length for strand in strands)
    lines = []
    for some in _pieces(strands):
        for piece in some:
            own = piece[0]._replace(wanted=False)  # what is behind the text is its own too: nobody sees it
            behind = range(own.position + len(piece), width)
            lines.append(
                (
                    *(own._replace(position=i) for i in range(own.at)),
                    *piece,
                    *(own._replace(position=i) for i in behind),
                )
            )
    return Pack(tuple(members), tuple(lines), in_order=True)


def _pieces(strands: Sequence[Strand]) -> list[list[list[_Slot]]]:
    """The slots of each strand's trunk and branches."""
    pieces: list[list[list[_Slot]]] = []
    text = 0
    for owner, strand in enumerate(strands):
        own = []
        for piece, (at, count) in enumerate([(0, len(strand.trunk)), *((at, len(ids)) for at, ids in strand.branches)]):
            own.append(
                [_Slot(owner, piece, text, at + i, at, wanted=piece > 0 or i >= strand.wanted) for i in range(count)]
            )
            text += 1
        pieces.append(own)
    return pieces


def shares(sizes: Sequence[int], limit: int) -> list[range]:
    """Sizes parted in their order into shares of about as much each, and about `limit` at most."""
    ends = torch.tensor(sizes).cumsum(0)
    count = math.ceil(int(ends[-1]) / limit)
    middles = ends - torch.tensor(sizes) / 2
    share = (middles * count / int(ends[-1])).long().tolist()
    begins = [i for i in range(len(sizes)) if i == 0 or share[i] != share[i - 1]]
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def shares_of_rows(strands: Sequence[Strand], limit: int) -> list[list[int]]:
    """Places of strands whose texts have a row each, those of like length together, `limit` slots at most, or one."""
    found: list[list[int]] = []
    texts = 0
    for i in sorted(range(len(strands)), key=lambda i: strands[i].length):
        texts += len(strands[i].texts)
        if not found or texts * strands[i].length > limit:
            found.append([])
            texts = len(strands[i].texts)
        found[-1].append(i)
    return found


def bins(sizes: Sequence[int], width: int, widest: int) -> list[list[int]]:
    """Sizes put into few bins of about `width`, as narrow as holds them: the first with room takes the next largest.

    Args:
        widest: what no bin exceeds; no size does.
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
        place = next((b for b, left in enumerate(room) if left >= sizes[i]), len(found))
        if place == len(found):
            found.append([])
            room.append(width)
        found[place].append(i)
        room[place] -= sizes[i]
    return [sorted(some) for some in found]
