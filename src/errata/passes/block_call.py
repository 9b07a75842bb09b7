"""Arguments for calling one block on its own, sliced or gathered from a recorded run.

Nothing here is specific to a model family. A block's arguments besides hidden states depend only on positions: masks,
cosines and sines, position indexes, ALiBi. Earlier tokens are present through a cache that holds their keys and values
(`Past`). A block that cannot be resumed after such a cache gets the hidden states of the earlier tokens instead, and
runs on them again (`Earlier`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class _Enough(Exception):
    """The keys and values that were asked for are there."""


class Past(DynamicCache):
    """Keys and values `[r, heads, tokens, d]` of the earlier tokens, as a cache that does not store new ones."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys_before, self.values_before = keys, values

    @classmethod
    def none(cls) -> Past:
        """A cache of no tokens."""
        return cls(torch.empty(0), torch.empty(0))

    def of(self, rows: Tensor | slice, tokens: int | None = None) -> Past:
        """Selected rows, cut to their first tokens if a number is given."""
        rows = rows.to(self.keys_before.device) if isinstance(rows, Tensor) else rows
        return Past(self.keys_before[rows, :, :tokens], self.values_before[rows, :, :tokens])

    def after(self, run: Callable[[DynamicCache], object]) -> Past:
        """This cache with the keys and values that `run` adds to the one it is given; the pass stops there."""
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
    """Earlier tokens for a block that cannot be resumed after keys and values.

    Attributes:
        states: hidden states that enter the block there, `[r, tokens, d_model]`.
    """

    states: Tensor

    def of(self, rows: Tensor | slice, tokens: int | None = None) -> Earlier:
        """Selected rows, cut to their first tokens if a number is given."""
        return Earlier(self.states[rows, :tokens])


@dataclass(frozen=True)
class Call:
    """Arguments that Hugging Face passed to a block besides its hidden states. They depend only on positions.

    Attributes:
        arguments: all but the hidden states, by name; the first row of a tensor stands for all rows; the cache is
            `PAST`.
        rows: number of recorded rows.
        length: length of the recorded texts, in tokens.
        whole: True if there was no cache: the block is called on whole texts, after `Earlier`.
    """

    arguments: Mapping[str, Any]
    rows: int
    length: int
    whole: bool = False

    def at(self, token: int, rows: int, count: int, device: torch.device) -> dict[str, Any]:
        """Arguments of `count` tokens from `token` on, in `rows` rows; on whole texts, for earlier ones too."""
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

    def gathered(self, positions: Tensor, sees: Tensor) -> dict[str, Any]:
        """Arguments for the last n of k tokens in any order.

        Args:
            positions: index of each token in its text, `[r, k]`, on the device of the hidden states.
            sees: which of all tokens each of the last n sees, `[r, 1, n, k]`.
        """
        return {name: self._gathered(name, value, positions, sees) for name, value in self.arguments.items()}

    def _gathered(self, name: str, value: Any, positions: Tensor, sees: Tensor) -> Any:
        own = positions[:, -sees.shape[2] :]
        if isinstance(value, Tensor):
            value = value.to(positions.device)
        if is_mask(name):
            if value is None:
                return sees
            mask = value[0][:, own[:, :, None], positions[:, None]].transpose(0, 1)  # [r, heads or 1, n, k]
            return torch.where(sees, mask, MaskValues.of(value).hidden.to(mask.device))
        if isinstance(value, tuple):
            return tuple(self._gathered(name, each, positions, sees) for each in value)
        if name == "alibi" and value is not None:
            heads = value.reshape(self.rows, -1, 1, value.shape[-1])[0]
            each = heads[:, 0, positions].transpose(0, 1)[:, :, None]  # [r, heads, 1, k]
            return each if value.dim() == 4 else each.flatten(0, 1)
        axis = token_axis(name, value)
        if axis is None or value.shape[axis] != self.length:
            return value
        if value.dim() == 1:  # cannot differ between rows, nor be of use to a block that is given positions beside it
            return torch.arange(positions.shape[1] - own.shape[1], positions.shape[1], device=value.device)
        rows = value.dim() + axis - 1  # this axis; of tokens, once it is gone
        return value.select(rows, 0).index_select(rows, own.flatten()).unflatten(rows, own.shape)


# Stands among arguments where the cache belongs.
PAST = object()


def run(block: nn.Module, states: Tensor, arguments: Mapping[str, Any], past: Past | Earlier) -> Tensor:
    """Output `[r, n, d_model]` of a block for hidden states, arguments and a past, on the device of the hidden states.

    For a block on another device, accelerate's hooks move its inputs there, except the past, which already is there.
    """
    count = states.shape[1]
    given = {name: past if value is PAST else value for name, value in arguments.items()}
    # A copy, for a block may go on to add into what it is given.
    entering = torch.cat([past.states, states], 1) if isinstance(past, Earlier) else states.clone()
    output = block(entering, **given)
    left = output[0] if isinstance(output, tuple) else output
    return left[:, left.shape[1] - count :].to(states.device)  # a slice from 0 on costs nothing, backwards neither


def is_mask(name: str) -> bool:
    """True for an argument that says which tokens see which, `[1, 1, n, tokens]`."""
    return name in ("attention_mask", "causal_mask")


@dataclass(frozen=True)
class MaskValues:
    """Meaning of the entries of a mask `[r, heads or 1, n, tokens]` whose last token is the last of its queries.

    Models do not agree on it: True is "seen" in most Boolean masks, and "hidden" in MPT's; other masks are numbers that
    are added. The meaning is read off the mask itself, since a decoder's token sees itself and no later one.

    Attributes:
        seen: the entry of a token that is seen, a scalar.
        hidden: the entry of one that is not.
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
    """Axis along which an argument has one entry for each token; None if there is none.

    Cosines are `[rows, tokens, d]`, or `[3, rows, tokens, d]` where images have places in three directions; indexes
    `[rows, tokens]` or `[tokens]`; a bias of distances (MPT) is cut by the block itself. Rows stand before tokens.
    """
    if not isinstance(value, Tensor) or "position" not in name or "bias" in name or not value.dim():
        return None
    return -2 if value.dim() > 2 else -1
