"""One block called on its own: with the arguments that it was given in a recorded run, cut to the tokens at hand.

It knows no family. What a block is given beside its state depends on positions alone: masks, cosines and sines, indexes
of positions, ALiBi. Earlier tokens are present through a cache that holds their keys and values (`Past`); or, where a
block cannot be resumed so, as what enters it there, and it runs on them again (`Earlier`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class _Enough(Exception):
    """The keys and values asked for are there."""


class Past(DynamicCache):
    """Keys and values `[r, heads, tokens, d]` of the tokens before, as a cache that does not remember new ones."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys_before, self.values_before = keys, values

    @classmethod
    def none(cls) -> Past:
        """That of no tokens."""
        return cls(torch.empty(0), torch.empty(0))

    def of(self, rows: Tensor | slice, tokens: int | None = None) -> Past:
        """That of some rows, of their first tokens alone if so many are named."""
        rows = rows.to(self.keys_before.device) if isinstance(rows, Tensor) else rows
        return Past(self.keys_before[rows, :, :tokens], self.values_before[rows, :, :tokens])

    def after(self, states: Tensor, run: Callable[[DynamicCache], object]) -> Past:
        """This and the keys and values of the tokens with these states, which `run` adds; it goes no further."""
        collecting = _Collecting(self.keys_before, self.values_before)
        try:
            run(collecting)
        except _Enough:
            return Past(collecting.keys_before, collecting.values_before)
        raise TypeError("its attention does not use the cache that it is given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens so far."""
        if not self.get_seq_length():
            return key_states, value_states
        return torch.cat([self.keys_before, key_states], -2), torch.cat([self.values_before, value_states], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of earlier tokens."""
        return self.keys_before.shape[-2] if self.keys_before.dim() > 1 else 0


class _Collecting(Past):
    """A cache that ends the pass once it has the new tokens' keys and values, before attention uses them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys_before, self.values_before = super().update(key_states, value_states)
        raise _Enough


@dataclass(frozen=True)
class Earlier:
    """Tokens before, for a block that cannot be resumed after them.

    Attributes:
        states: what enters the block there, `[r, tokens, d_model]`.
    """

    states: Tensor

    def of(self, rows: Tensor | slice, tokens: int | None = None) -> Earlier:
        """Selected rows, cut to their first tokens if a number is given."""
        return Earlier(self.states[rows, :tokens])

    def after(self, states: Tensor, run: Callable[[DynamicCache], object]) -> Earlier:
        """These and the tokens with these states; nothing is run."""
        return Earlier(torch.cat([self.states, states], 1))

    def get_seq_length(self) -> int:
        """Number of earlier tokens."""
        return self.states.shape[1]


@dataclass(frozen=True)
class Call:
    """What Hugging Face handed to a block beside its state: what depends on positions alone.

    Attributes:
        arguments: all but the state, by name; of tensors the first row stands for all; the cache is `PAST`.
        rows: how many were recorded.
        length: of the recorded texts, in tokens.
        whole: whether there was no cache: the block is to be called on whole texts, after `Earlier`.
    """

    arguments: Mapping[str, Any]
    rows: int
    length: int
    whole: bool = False

    def __call__(self, block: nn.Module, states: Tensor, token: int, past: Past | Earlier) -> Tensor:
        """The block's output for states `[r, n, d_model]` of tokens `token` on, after `past`."""
        return run(block, states, self.at(token, len(states), states.shape[1], states.device), past)

    def at(self, token: int, rows: int, count: int, device: torch.device) -> dict[str, Any]:
        """The arguments as they are for `count` tokens from `token` on, in so many rows; of whole texts, for those
        before them too."""
        if self.whole:
            token, count = 0, token + count
        return {name: self._at(name, value, token, rows, count, device) for name, value in self.arguments.items()}

    def _at(self, name: str, value: Any, token: int, rows: int, count: int, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            value = value.to(device)
        if is_mask(name) and not (self.whole and value is None):
            if value is None:  # plain causality
                whole = torch.ones(count, token + count, dtype=torch.bool, device=device).tril(token)[None, None]
            elif value.dim() == 2:  # which tokens are there at all
                return value[:1, token : token + count].expand(rows, -1)
            else:
                whole = value[:1, ..., token : token + count, : token + count]
            return whole.expand(rows, -1, -1, -1)  # some blocks (XGLM) take no mask of one row for all
        if isinstance(value, tuple):
            return tuple(self._at(name, each, token, rows, count, device) for each in value)
        if name == "alibi" and value is not None:  # of keys, `[rows * heads, 1, tokens]` or `[rows, heads, 1, tokens]`
            one = value[: len(value) // self.rows, ..., : token + count]
            return torch.cat([one] * rows)
        axis = token_axis(name, value)
        if axis is None:
            return value
        value = value.narrow(axis - 1, 0, 1) if value.dim() > 1 else value
        return value.narrow(axis, token, count) if value.shape[axis] == self.length else value

    def scattered(self, positions: Tensor, sees: Tensor, begin: int, end: int) -> dict[str, Any]:
        """The arguments as they are for tokens in any order, those in the slots from `begin` to `end`.

        Args:
            positions: of the token in each slot in its text, `[r, w]`, on the device of the states.
            sees: which slots see which, `[r, 1, w, w]`.
        """
        seen = sees[:, :, begin:end, :end]
        return {name: self._scattered(name, value, positions[:, :end], seen) for name, value in self.arguments.items()}

    def _scattered(self, name: str, value: Any, positions: Tensor, seen: Tensor) -> Any:
        own = positions[:, -seen.shape[2] :]
        if isinstance(value, Tensor):
            value = value.to(positions.device)
        if is_mask(name):
            if value is None:
                return seen
            mask = value[0][:, own[:, :, None], positions[:, None]].transpose(0, 1)  # [r, heads or 1, n, tokens]
            return torch.where(seen, mask, MaskValues.of(value).hidden.to(mask.device))
        if isinstance(value, tuple):
            return tuple(self._scattered(name, each, positions, seen) for each in value)
        if name == "alibi" and value is not None:
            heads = value.reshape(self.rows, -1, 1, value.shape[-1])[0]
            each = heads[:, 0, positions].transpose(0, 1)[:, :, None]  # [r, heads, 1, tokens]
            return each if value.dim() == 4 else each.flatten(0, 1)
        axis = token_axis(name, value)
        if axis is None or value.shape[axis] != self.length:
            return value
        if value.dim() == 1:  # cannot differ between rows, nor be of use to who is given positions beside it
            return torch.arange(positions.shape[1] - own.shape[1], positions.shape[1], device=value.device)
        return value[0][own]


# Stands among arguments where the cache belongs.
PAST = object()


def run(block: nn.Module, states: Tensor, arguments: Mapping[str, Any], past: Past | Earlier) -> Tensor:
    """A block's output `[r, n, d_model]` for these states, these arguments and this past, where the states are.

    What a block on another device needs is brought there by the hooks that accelerate has put on it, but for the past,
    which is there.
    """
    count = states.shape[1]
    given = {name: past if value is PAST else value for name, value in arguments.items()}
    # A copy, for a block may go on to add into what it is given.
    entering = torch.cat([past.states, states], 1) if isinstance(past, Earlier) else states.clone()
    output = block(entering, **given)
    return (output[0] if isinstance(output, tuple) else output)[:, -count:].to(states.device)


def unseen(past: Past | Earlier) -> int:
    """Number of leading tokens of a block's output that were not asked for."""
    return past.get_seq_length() if isinstance(past, Earlier) else 0


def is_mask(name: str) -> bool:
    """Whether an argument says which tokens see which: `[1, 1, n, tokens]`."""
    return name in ("attention_mask", "causal_mask")


@dataclass(frozen=True)
class MaskValues:
    """Meaning of the entries of a mask `[r, heads or 1, n, tokens]` whose last token is the last of its queries.

    Models do not agree on it: True is "seen" to most of those that are handed yes and no, and "hidden" to MPT; others
    add a number. It is read off the mask itself, since a decoder's token sees itself and no later one.

    Attributes:
        seen: the entry of a token that is seen, a scalar.
        hidden: that of one that is not.
    """

    seen: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> MaskValues:
        """The values in a mask."""
        seen = mask[0, 0, -1, -1]
        if mask.dtype == torch.bool:
            return cls(seen, ~seen)
        later = mask[0, 0, 0, -1] if mask.shape[-2] > 1 else mask.new_tensor(torch.finfo(mask.dtype).min)
        return cls(seen, later)

    def is_seen(self, mask: Tensor) -> Tensor:
        """True where a token is seen: where the mask is nearer to `seen` than to `hidden`."""
        if mask.dtype == torch.bool:
            return mask == self.seen
        return (mask - self.seen).abs() < (mask - self.hidden).abs()


def token_axis(name: str, value: Any) -> int | None:
    """Along which axis an argument has one entry a token; None for all else.

    Cosines are `[rows, tokens, d]`, or `[3, rows, tokens, d]` where images have places in three directions; indexes
    `[rows, tokens]` or `[tokens]`; a bias of distances (MPT) is cut by the block itself. Rows stand before tokens.
    """
    if not isinstance(value, Tensor) or "position" not in name or "bias" in name or not value.dim():
        return None
    return -2 if value.dim() > 2 else -1
