"""The ends of recorded texts of any lengths, run together.

A `Recording` resumes rows of one length at one token. What an editor runs again and again is a handful of tokens at the
end of many texts: contexts of one fact, facts of one table. Here each is cut out of its recording (`cut`) from the
token on that matters, and those of about as many tokens are run in one batch (`join`), however long what stands before
them: rows are aligned at their last token, and what is missing in front of the shorter ones is masked.

That each gives what it gave in its recording is measured on some rows of every join. Where it does not, because a block
makes masks of its own, only rows that are alike are run together.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from errata.base.errors import UnsupportedModel
from errata.models.model import Model
from errata.passes.block_call import PAST, Call, Earlier, MaskValues, Past, is_mask, run, token_axis, unseen
from errata.passes.hooks import hooked_block
from errata.passes.replay import Recording, same_states

# Tokens that fill a batch: with fewer, weights take longer to read than to multiply with.
_FULL = 96
# On how many rows a join is measured.
_WITNESSES = 4


@dataclass(frozen=True)
class Cut:
    """Rows of a recording from one token on, with all that it takes to run them. Made by `cut`.

    Attributes:
        first: the lowest block that they can be run in, and those above it as far as there is a past.
        token: the first of their tokens; earlier ones are there as keys and values.
        states: what enters block `first`, `[r, n, d_model]`.
        labels: what to call the rows.
        past: of each block, keys and values of earlier tokens.
        arguments: of each block, what it was given beside its state.
        calls: of each block that can only be run on whole texts, its call.
        witness: of the first row, what enters the first block and leaves each block, each `[1, n, d_model]`.
    """

    labels: tuple[int, ...]
    first: int
    token: int
    states: Tensor
    past: tuple[Past, ...] | tuple[Earlier, ...]
    arguments: tuple[dict[str, Any], ...]
    witness: tuple[Tensor, ...]
    calls: tuple[Call, ...] = ()


def cut(recording: Recording, rows: Mapping[int, int], tokens: tuple[int, int], layers: tuple[int, int]) -> Cut:
    """Some rows of a recording, by their labels. Nothing of the recording itself is kept.

    Args:
        rows: the row of each label.
        tokens: the first token that is wanted, and the first after it that is not.
        layers: the first block that they are to be run in, and the first after it in which they are not.

    Raises:
        UnsupportedModel: if a block has remembered no keys and values.
    """
    token, end = tokens
    device = recording.model.device
    index = torch.tensor(list(rows.values()), device=device)
    try:
        past: Any = tuple(recording.past(layer, index, token) for layer in range(*layers))
    except (AttributeError, TypeError) as problem:  # there are none to be cut
        raise _refusal(recording.model, layers[0]) from problem
    known: dict[tuple[int, ...], dict[str, Any]] = {}  # most blocks are given the very same tensors

    def arguments(layer: int) -> dict[str, Any]:
        call = recording.calls[layer]
        key = tuple(map(id, call.arguments.values()))
        if key not in known:
            known[key] = call.at(token, len(rows), end - token, device)
        return known[key]

    return Cut(
        labels=tuple(rows),
        first=layers[0],
        token=token,
        states=recording.states[layers[0]][index, token:end],
        past=past,
        arguments=tuple(map(arguments, range(*layers))),
        witness=tuple(recording.states[layer][index[:1], token:end] for layer in range(layers[0], layers[1] + 1)),
        calls=tuple(recording.calls[slice(*layers)]) if recording.engine == "plain" else (),
    )


@dataclass(frozen=True)
class Chunk:
    """Some of the rows of a lane, which are run at once; a row's tokens stand at its end.

    Attributes:
        rows: their labels.
    """

    rows: tuple[int, ...]
    lane: _Lane
    index: Tensor | slice

    @property
    def counts(self) -> Tensor:
        """Tokens of each row, `[c]`."""
        return self.lane.counts[self.index]

    @property
    def states(self) -> Tensor:
        """What enters the first block, as recorded: `[c, n, d_model]`; in front of a row's first token, any numbers."""
        return self.lane.states[self.index]

    def step(
        self,
        layer: int,
        states: Tensor,
        patches: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """What leaves block `layer`, `[c, keep or n, d_model]`, if `states` enter it.

        With `keep`, only keys and values are computed of the tokens before the last so many, and patches do not see
        them. Gradients flow to `states` and through patches if the caller lets them.
        """
        lane = self.lane
        count = states.shape[1]
        others = 0 if keep is None else max(0, count - keep)
        past, block = lane.past[layer - lane.first].of(self.index), lane.model.blocks[layer]
        bound = {(part, layer): patch for part, patch in (patches or {}).items()}
        if others:
            earlier, states = states.split([others, count - others], 1)
            before = lane.arguments_of(layer, self.index, 0, others)
            past = past.after(earlier, lambda cache: run(block, earlier, before, cache))
        with hooked_block(lane.model, bound, len(self.rows), unseen(past)):
            return run(block, states, lane.arguments_of(layer, self.index, others, count), past)

    def reached(self, layer: int, end: int) -> Tensor:
        """Which tokens of each row, `[c, n]`, can hear of its first one through blocks `layer` to `end` (exclusive).

        By the masks alone: with attention that sees few tokens and few blocks to go, the last may be out of reach.
        """
        lane, width = self.lane, self.states.shape[1]
        heard = torch.arange(width, device=self.counts.device) == (width - self.counts)[:, None]
        for index in range(layer, end):
            given = lane.arguments_of(index, self.index, 0, width)
            masks = [value for name, value in given.items() if is_mask(name) and value is not None and value.dim() == 4]
            for mask in masks[:1] or [torch.ones(1, 1, width, width, dtype=torch.bool, device=heard.device).tril()]:
                seen = MaskValues.of(mask).is_seen(mask).any(1)[..., -width:, -width:]
                heard = heard | (seen & heard[:, None]).any(-1)
        return heard

    def resume(self, layer: int, states: Tensor, end: int, keep: int | None = None) -> Tensor:
        """What enters block `end`, `[c, keep or n, d_model]`, if `states` enter block `layer`."""
        for index in range(layer, end):
            states = self.step(index, states, keep=keep if index == end - 1 else None)
        return states if keep is None else states[:, -keep:]


class Tails:
    """Joined cuts. Made by `join`.

    Attributes:
        lanes: batches that their rows run in: one for each number of tokens that fills one; one a cut where rows with
            different pasts do not go together.
    """

    def __init__(self, lanes: Sequence[_Lane]):
        self.lanes = tuple(lanes)

    def chunks(self, wanted: Container[int], tokens_at_once: int) -> Iterator[Chunk]:
        """The rows with these labels, about so many tokens at a time."""
        for lane in self.lanes:
            chosen = [i for i, label in enumerate(lane.rows) if label in wanted]
            share = max(1, tokens_at_once // lane.states.shape[1])
            for begin in range(0, len(chosen), share):
                yield lane.chunk(chosen[begin : begin + share])


def join(model: Model, cuts: Sequence[Cut]) -> Tails:
    """Cuts of recordings of one model, of the same blocks, in few batches; where that gives other numbers, one a cut.

    Raises:
        UnsupportedModel: if even a cut alone does not give what was recorded.
    """
    lanes = []
    alike = [[each] for each in cuts] if any(each.calls for each in cuts) else _of_like_width(cuts)
    for some in alike:
        lane = _Lane.of(model, some)
        if lane.holds(some):
            lanes.append(lane)
            continue
        for each in some:
            lane = _Lane.of(model, [each])
            if not lane.holds([each]):
                raise _refusal(model, lane.first)
            lanes.append(lane)
    return Tails(lanes)


def _of_like_width(cuts: Sequence[Cut]) -> list[list[Cut]]:
    """Cuts of as many tokens together, for what is missing is run too; too few go with the next wider ones, or with the
    last before them."""
    widths = [each.states.shape[1] for each in cuts]
    groups: list[list[int]] = []
    waiting: list[int] = []
    for width in sorted(set(widths)):
        waiting += [i for i, its in enumerate(widths) if its == width]
        if sum(len(cuts[i].states) for i in waiting) * width >= _FULL:
            groups.append(waiting)
            waiting = []
    if groups:
        groups[-1] += waiting
    elif waiting:
        groups.append(waiting)
    return [[cuts[i] for i in sorted(group)] for group in groups]


def _refusal(model: Model, first: int) -> UnsupportedModel:
    return UnsupportedModel(
        f"{model.anatomy.blocks}.{first} and those above it: resumed in the middle of a text, they come out otherwise "
        f"than in one piece, so {model.name} cannot be replayed from a recorded run; load it with "
        "attn_implementation='eager' if it has another"
    )


@dataclass(frozen=True)
class _Lane:
    """Rows that run in one batch, aligned at their last token.

    Attributes:
        rows: their labels.
        counts: tokens of each, `[r]`.
        states: `[r, n, d_model]`.
        past: of each block, of so many rows and p tokens, aligned at the last of these.
        arguments: of each block; its masks are `[r, 1, n, p + n]`, or one a head.
        calls: as of the one cut that it is of, if its blocks run on whole texts.
    """

    model: Model
    first: int
    rows: tuple[int, ...]
    counts: Tensor
    states: Tensor
    past: tuple[Past, ...] | tuple[Earlier, ...]
    arguments: tuple[dict[str, Any], ...]
    calls: tuple[Call, ...] = ()

    @classmethod
    def of(cls, model: Model, cuts: Sequence[Cut]) -> _Lane:
        if cuts[0].calls:  # which go with no others
            (own,) = cuts
            counts = torch.full((len(own.labels),), own.states.shape[1], device=own.states.device)
            return cls(model, own.first, own.labels, counts, own.states, own.past, own.arguments, own.calls)
        width = max(each.states.shape[1] for each in cuts)
        longest = max(each.token for each in cuts)
        known: dict[tuple[int, ...], dict[str, Any]] = {}
        layers = range(len(cuts[0].past))
        past: list[tuple[Past, ...]] = [cast("tuple[Past, ...]", each.past) for each in cuts]

        def arguments(layer: int) -> dict[str, Any]:
            given = [each.arguments[layer] for each in cuts]
            key = tuple(map(id, given))
            if key not in known:
                known[key] = {name: _joined(name, [g[name] for g in given], cuts, width, longest) for name in given[0]}
            return known[key]

        return cls(
            model=model,
            first=cuts[0].first,
            rows=tuple(label for each in cuts for label in each.labels),
            counts=torch.cat([each.states.new_full((len(each.states),), each.states.shape[1]) for each in cuts]).long(),
            states=torch.cat([_front_repeated(each.states, -2, width) for each in cuts]),
            past=tuple(
                Past(
                    torch.cat([_front_zeros(each[layer].keys_before, longest) for each in past]),
                    torch.cat([_front_zeros(each[layer].values_before, longest) for each in past]),
                )
                for layer in layers
            ),
            arguments=tuple(map(arguments, layers)),
        )

    def chunk(self, places: Sequence[int]) -> Chunk:
        """The rows at these places."""
        run_of = places[-1] - places[0] + 1 == len(places)  # a slice copies nothing
        index = slice(places[0], places[-1] + 1) if run_of else torch.tensor(places, device=self.states.device)
        return Chunk(tuple(self.rows[i] for i in places), self, index)

    def arguments_of(self, layer: int, index: Tensor | slice, begin: int, end: int) -> dict[str, Any]:
        """What the block is given for some rows and the columns from `begin` to `end`."""
        if self.calls:
            token = self.past[layer - self.first].get_seq_length() + begin
            rows = len(self.states[index])
            return self.calls[layer - self.first].at(token, rows, end - begin, self.states.device)
        seen = self.past[layer - self.first].get_seq_length() + end
        return {
            name: _cut_joined(name, value, index, begin, end, seen)
            for name, value in self.arguments[layer - self.first].items()
        }

    def holds(self, cuts: Sequence[Cut]) -> bool:
        """Whether every block gives the recorded states back, in some rows of the extreme lengths."""
        order = sorted(range(len(cuts)), key=lambda i: (cuts[i].token, cuts[i].states.shape[1]))
        chosen = sorted({order[round(i * (len(order) - 1) / (_WITNESSES - 1))] for i in range(_WITNESSES)})
        chunk = self.chunk([sum(len(each.states) for each in cuts[:i]) for i in chosen])
        width = self.states.shape[1]
        witnesses = [cuts[i].witness for i in chosen]
        with torch.no_grad():
            for step in range(len(self.past)):
                entering = torch.cat([_front_repeated(each[step], -2, width) for each in witnesses])
                try:
                    found = chunk.step(self.first + step, entering)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # whatever a foreign block raises, its rows do not go together
                    return False
                for row, each in enumerate(witnesses):
                    want = each[step + 1]
                    if not same_states(found[row : row + 1, -want.shape[1] :], want):
                        return False
        return True


def _joined(name: str, values: list[Any], cuts: Sequence[Cut], width: int, longest: int) -> Any:
    """One argument of all rows; see `_Lane`."""
    sizes = [len(each.states) for each in cuts]
    first = values[0]
    if first is PAST or first is None:
        return first
    if is_mask(name):
        dtype = next((value.dtype for value in values if value.dtype != torch.bool), torch.bool)
        masks = [
            _mask(_of_kind(v[:1], dtype), each.token, width, longest) for v, each in zip(values, cuts, strict=True)
        ]
        return torch.cat([mask.expand(size, -1, -1, -1) for mask, size in zip(masks, sizes, strict=True)])
    if isinstance(first, tuple):
        return tuple(_joined(name, [value[i] for value in values], cuts, width, longest) for i in range(len(first)))
    if name == "alibi":
        # `[rows * heads, 1, tokens]` or `[rows, heads, 1, tokens]`: here always the second
        split = [value.reshape(size, -1, 1, value.shape[-1]) for value, size in zip(values, sizes, strict=True)]
        spread = [_spread(value, each, width, longest) for value, each in zip(split, cuts, strict=True)]
        return _Alibi(torch.cat(spread), first.dim())
    axis = token_axis(name, first)
    if axis is None:
        return first
    spread = [_front_repeated(value, axis, width) for value in values]
    if first.dim() == 1:  # cannot differ between rows
        return spread[0]
    own = first.dim() + axis - 1  # the axis of rows
    return torch.cat([_rows(value, own, size) for value, size in zip(spread, sizes, strict=True)], own)


def _rows(value: Tensor, axis: int, count: int) -> Tensor:
    """One row, along an axis, as so many, or as many as there are."""
    return value.expand(*value.shape[:axis], count, *value.shape[axis + 1 :])


def _cut_joined(name: str, value: Any, index: Tensor | slice, begin: int, end: int, seen: int) -> Any:
    if is_mask(name) and value is not None:
        return value[index][:, :, begin:end, :seen]
    if isinstance(value, tuple):
        return tuple(_cut_joined(name, each, index, begin, end, seen) for each in value)
    if isinstance(value, _Alibi):
        return value.of(index, seen)
    axis = token_axis(name, value)
    if axis is None:
        return value
    if value.dim() > 1:
        value = value.movedim(value.dim() + axis - 1, 0)[index].movedim(0, value.dim() + axis - 1)
    return value.narrow(axis, begin, end - begin)


@dataclass(frozen=True)
class _Alibi:
    """What a block adds by the distance of keys, `[r, heads, 1, p + n]`, and how many axes the block wants of it."""

    tensor: Tensor
    axes: int

    def of(self, index: Tensor | slice, seen: int) -> Tensor:
        some = self.tensor[index][..., :seen]
        return some if self.axes == 4 else some.flatten(0, 1)


def _of_kind(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that says yes and no as one that is added, if that is what is wanted."""
    if mask.dtype == dtype:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~MaskValues.of(mask).is_seen(mask), torch.finfo(dtype).min)


def _mask(mask: Tensor, token: int, width: int, longest: int) -> Tensor:
    """A mask `[1, h, n, token + n]` as `[1, h, width, longest + width]`; tokens that are not there see themselves."""
    count = mask.shape[-2]
    values = MaskValues.of(mask)
    whole = values.hidden.expand(1, mask.shape[1], width, longest + width).clone()
    absent = width - count
    whole[..., absent:, longest - token : longest] = mask[..., :token]
    whole[..., absent:, longest + absent :] = mask[..., token:]
    columns = torch.arange(absent, device=mask.device)
    whole[..., columns, longest + columns] = values.seen
    return whole


def _spread(value: Tensor, one: Cut, width: int, longest: int) -> Tensor:
    """Along the last axis, of tokens past and present: the past ones aligned at their last, and so the present ones."""
    before, here = value.split([one.token, value.shape[-1] - one.token], -1)
    return torch.cat([functional.pad(t, (n - t.shape[-1], 0)) for t, n in ((before, longest), (here, width))], -1)


def _front_repeated(value: Tensor, axis: int, width: int) -> Tensor:
    """A tensor as long as `width` along an axis, its first entry repeated in front."""
    missing = width - value.shape[axis]
    if not missing:
        return value
    shape = list(value.shape)
    shape[axis] = missing
    return torch.cat([value.narrow(axis, 0, 1).expand(shape), value], axis)


def _front_zeros(value: Tensor, length: int) -> Tensor:
    return functional.pad(value, (0, 0, length - value.shape[-2], 0))
