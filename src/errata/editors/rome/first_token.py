"""Read vector of an edit whose subject is the first token of a text, where the model keeps an attention sink.

Above the lowest blocks all first tokens have the same key, so no edit there can be specific to a subject. In block 0
the key of a first token depends on that token alone: nothing stands before it. So all keys that can occur there are
known, one for each token of the vocabulary, and the read vector is chosen against all of them: u with

    u · k = 1 for the subject's key k,   max over other first tokens t of |u · k_t| as small as possible,

while u · k stays small for keys of ordinary tokens too. The minimum of a mean, C⁻¹k, leaves half of the effect on the
nearest tokens ("French", "Germany" for "France"). Reweighting C by the tokens that still leak reduces the largest leak
(iteratively reweighted least squares; Lawson, 1961).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from errata.base import budgets
from errata.models.model import Model
from errata.passes.reading import read
from errata.statistics.second_moment import SecondMoment

LAYER = 0
_ROUNDS = 10
_LEAKING = 512  # first tokens whose weight is raised in a round
_APART = 3.0  # weight of the keys that must not be heard beside those of first tokens, by the traces of their C
_ORDINARY = 0.2  # weight of ordinary tokens' keys beside those of first tokens, by the traces of their C
_WINDOW = 32  # tokens of a text of random tokens, which stands for ordinary text where there is none


@dataclass(frozen=True)
class ReadVector:
    """A read vector and what it leaks.

    Attributes:
        vector: u `[d_mlp]`, float64 on the CPU, with u · k = 1 at the subject's key.
        leak: the largest |u · k_t| over other first tokens.
        token: the first token that it is largest for.
    """

    vector: Tensor
    leak: float
    token: int


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """The keys of every first token of a model, at block 0, and C of ordinary tokens there.

    Attributes:
        model: the model in its current state, without edits of block 0.
        ordinary: C of ordinary text at block 0; None: C of texts of random tokens is used instead.
    """

    model: Model
    ordinary: SecondMoment | None = None

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        """The first token of a batch, and keys `[n, d_mlp]`, float32 at least, on the model's device."""
        if self._kept is not None:
            yield 0, self._kept
        else:
            yield from self._computed()

    @property
    def _size(self) -> int:
        return len(self.model.module(("embedding", 0)).get_parameter("weight"))

    def _computed(self) -> Iterator[tuple[int, Tensor]]:
        for group in budgets.groups([1] * self._size, budgets.tokens(self.model.device, "record")):
            rows = [[token] for token in group]
            keys = read(self.model, self.model.batch(rows), [("key", LAYER)])["key", LAYER][:, 0]
            yield group.start, keys.to(torch.promote_types(keys.dtype, torch.float32))

    @cached_property
    def _kept(self) -> Tensor | None:
        """All keys `[vocab, d_mlp]`, if a quarter of the free memory holds them."""
        if not budgets.fitting([self.model.device], self._size * self.model.d_mlp * 4):
            return None
        return torch.cat([keys for _, keys in self._computed()])

    @cached_property
    def _base(self) -> Tensor:
        """C of first tokens and of ordinary ones, each by its trace, `[d_mlp, d_mlp]` in float64 on the CPU."""
        first = sum((keys.T @ keys).cpu().double() for _, keys in self._batches())
        assert isinstance(first, Tensor)
        ordinary = self._of_random_texts() if self.ordinary is None else self.ordinary.matrix
        base = first / first.trace() + _ORDINARY * ordinary / ordinary.trace()
        return base + 1e-9 * base.trace() / len(base) * torch.eye(len(base), dtype=torch.float64)

    def _of_random_texts(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        count = min(self._size, 32 * self.model.d_mlp)
        tokens = torch.randperm(self._size, generator=generator)[: count // _WINDOW * _WINDOW].view(-1, _WINDOW)
        total = torch.zeros(self.model.d_mlp, self.model.d_mlp, dtype=torch.float64)
        for rows in tokens.split(budgets.tokens(self.model.device, "record") // _WINDOW):
            keys = read(self.model, self.model.batch(rows.tolist()), [("key", LAYER)])["key", LAYER][:, 1:].flatten(
                0, 1
            )
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            total += (keys.T @ keys).cpu().double()
        return total

    def read_vector(self, token: int, apart: Tensor | None = None) -> ReadVector:
        """The read vector for a subject that is this one token.

        Args:
            token: its id.
            apart: further keys `[n, d_mlp]` on which the edit must not act, such as the subject's own later in a text.
        """
        key = self._key(token)
        second = self._base
        if apart is not None and len(apart):
            rows = apart.cpu().double()
            second = second + _APART * rows.T @ rows / (rows**2).sum()
        best: ReadVector | None = None
        for _ in range(_ROUNDS):
            vector = torch.cholesky_solve(key[:, None], torch.linalg.cholesky(second))[:, 0]
            vector = vector / (vector @ key)
            leaks, tokens, rows = self._leaking(vector, token)
            if best is None or float(leaks[0]) < best.leak:
                best = ReadVector(vector, float(leaks[0]), int(tokens[0]))
            weights = (leaks / leaks.max()) ** 4 * 10 / len(leaks) / (rows**2).sum(1).mean()
            second = second + (rows * weights[:, None]).T @ rows
        assert best is not None  # there was a round
        return best

    def _key(self, token: int) -> Tensor:
        keys = read(self.model, self.model.batch([[token]]), [("key", LAYER)])["key", LAYER]
        return keys[0, 0].cpu().double()

    def _leaking(self, vector: Tensor, token: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first tokens for which |u · k| is largest: that `[n]`, largest first, their ids and keys `[n, d_mlp]`."""
        leaks, tokens, rows = [], [], []
        for start, keys in self._batches():
            heard = (keys @ vector.to(keys)).abs()
            if start <= token < start + len(keys):
                heard[token - start] = 0
            top = heard.topk(min(_LEAKING, len(heard)))
            leaks.append(top.values)
            tokens.append(top.indices + start)
            rows.append(keys[top.indices])
        order = torch.cat(leaks).argsort(descending=True)[:_LEAKING]
        return (
            torch.cat(leaks)[order].cpu().double(),
            torch.cat(tokens)[order].cpu(),
            torch.cat(rows)[order].cpu().double(),
        )
