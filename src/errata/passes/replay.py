"""A forward pass that was recorded, and can be resumed at any block and token.

Tracing and editing ask thousands of times what a model would have said had one activation been another. Nearly all of
each answer is work already done: blocks below the change and tokens before it are as they were. A `Recording` keeps,
of one run, what enters and leaves every block, attention's keys and values, and what Hugging Face handed to each block
beside its state. `step` then runs one block on the tokens from any one on, for rows as many as are wanted, each a
variation of a recorded row: earlier tokens are present through their recorded keys and values alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from errata.base.errors import UnsupportedModel
from errata.models.model import Batch, Model, Stream
from errata.passes.hooks import Patch, hooked, hooked_block

# What a patch of a resumed block is given: the stream `[r, n, d]` of some of the rows, and which rows these are.
RowPatch = Callable[[Tensor, slice], Tensor]

# How far a block resumed in the middle may be from its recorded output, relative to the largest feature of a token.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Recording:
    """What was kept of one forward pass without padding. Made by `record`.

    Attributes:
        model: the model that ran; its weights must not change as long as the recording is used.
        length: tokens in every row.
        states: states[l] enters block l and states[l + 1] leaves it, each `[rows, length, d_model]`.
        kept: the other streams asked for, `[rows, length, d]`.
        tokens_at_once: `step` passes at most about so many tokens to a block in one call; rows that see many earlier
            tokens count for more.
    """

    def __init__(
        self,
        model: Model,
        states: list[Tensor],
        kept: Mapping[Stream, Tensor],
        cache: DynamicCache,
        calls: list[_Call],
        tokens_at_once: int,
    ):
        self.model = model
        self.states = states
        self.kept = kept
        self.length = states[0].shape[1]
        self.tokens_at_once = tokens_at_once
        self._past = [(layer.keys, layer.values) for layer in cache.layers]
        self._calls = calls

    def step(
        self,
        layer: int,
        states: Tensor,
        token: int,
        rows: Tensor,
        patches: Mapping[str, RowPatch] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """What leaves block `layer`, `[r, n, d_model]`, if `states` of that shape enter it at tokens `token` on.

        Args:
            layer: the block.
            states: of n tokens, the first of them `token`.
            token: index of the first token; those before it are as recorded.
            rows: for each of the r rows, the recorded row that it varies, `[r]`.
            patches: functions on the block's streams "attention", "mlp", "key" or "value", as in `passes.hooks`.
            keep: how many tokens at the end are wanted (None: all). Of the others only keys and values are computed,
                and patches do not see them.

        Gradients flow to `states` and through patches if the caller lets them.
        """
        count = states.shape[1]
        # Keys and values of a token take about a sixteenth of what a block makes of one on its way.
        share = max(1, self.tokens_at_once // (count + (token + count) // 16))
        wanted = count if keep is None else min(keep, count)
        parts = []
        for begin in range(0, len(states), share):
            chosen = slice(begin, min(begin + share, len(states)))
            bound = {
                (part, layer): (lambda tensor, patch=patch, chosen=chosen: patch(tensor, chosen))
                for part, patch in (patches or {}).items()
            }
            with hooked_block(self.model, bound, chosen.stop - begin):
                parts.append(self._block(layer, states[chosen], token, rows[chosen], wanted))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def resume(
        self,
        layer: int,
        states: Tensor,
        token: int,
        rows: Tensor,
        patches: Mapping[Stream, RowPatch] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """The last block's states `[r, keep or n, d_model]` if `states` enter block `layer`. As `step`, block by block;
        `patches` name their layers."""
        for index in range(layer, self.model.n_layers):
            here = {part: patch for (part, its_layer), patch in (patches or {}).items() if its_layer == index}
            states = self.step(index, states, token, rows, here, keep if index == self.model.n_layers - 1 else None)
        return states

    def _block(self, layer: int, states: Tensor, token: int, rows: Tensor, keep: int) -> Tensor:
        block, call, (keys, values) = self.model.blocks[layer], self._calls[layer], self._past[layer]
        past = _Past(keys[rows, :, :token], values[rows, :, :token])
        others = states.shape[1] - keep
        if others:
            past = past.after(lambda cache: call(block, states[:, :others], token, cache))
        return call(block, states[:, others:], token + others, past)

    def check(self) -> None:
        """Resume every block in the middle of the first row, and compare with what was recorded.

        Raises:
            UnsupportedModel: if it comes out otherwise, so that this model cannot be replayed.
        """
        middle, row = self.length // 2, torch.zeros(1, dtype=torch.long, device=self.model.device)
        for layer in range(self.model.n_layers):
            want = self.states[layer + 1][:1, middle:]
            try:
                found = self.step(layer, self.states[layer][:1, middle:], middle, row)
                error = (found - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-30)
                # Where the run itself was no number there is nothing to compare, and its readers will say so.
                wrong = not bool((error <= _TOLERANCE[want.dtype])[want.isfinite().all(-1)].all())
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # whatever a foreign block raises, it cannot be resumed
                reason = " ".join(f"{type(problem).__name__}: {problem}".split())
                raise self._refusal(layer, f"it fails with {reason}") from problem
            if wrong:
                raise self._refusal(layer, "it comes out otherwise than in one piece")

    def _refusal(self, layer: int, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.model.anatomy.blocks}.{layer}: resumed in the middle of a text, {what}, so {self.model.name} "
            "cannot be replayed from a recorded run; load it with attn_implementation='eager' if it has another"
        )


@torch.no_grad()
def record(
    model: Model,
    batch: Batch,
    patches: Mapping[Stream, Patch] | None = None,
    keep: Iterable[Stream] = (),
    tokens_at_once: int | None = None,
) -> Recording:
    """Run the model and keep what a replay needs.

    Args:
        model: any decoder.
        batch: texts of the same length in tokens.
        patches: as in `passes.patching.run`; none of a stream that is kept.
        keep: streams to keep beside the states.
        tokens_at_once: see `Recording`; None: what suits the device.

    Raises:
        ValueError: if the texts differ in length.
        UnsupportedModel: if blocks cannot be resumed (see `Recording.check`).
    """
    if not bool(batch.attention_mask.all()):
        raise ValueError("a recording needs texts of one length: group them by their number of tokens")
    cache, calls, states, kept = DynamicCache(), [], [], {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        state = arguments.pop(names[0])
        states.append(state.clone())  # some blocks go on to add into it in place
        calls.append(_Call(arguments, cache, *state.shape[:2]))

    def keeper(stream: Stream) -> Patch:
        def note(tensor: Tensor) -> None:
            kept[stream] = tensor.clone()

        return note

    last = ("state", model.n_layers - 1)
    watched = {stream: keeper(stream) for stream in (*keep, last)}
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in model.blocks]
    try:
        with hooked(model, {**(patches or {}), **watched}):
            model.forward(batch, keep=1, cache=cache)
    except (TypeError, ValueError, LookupError, AttributeError):
        _require_plain_cache(model, batch)  # or else a patch has failed
        raise
    finally:
        for handle in handles:
            handle.remove()
    states.append(kept.pop(last))
    recording = Recording(model, states, kept, cache, calls, tokens_at_once or _tokens_at_once(model))
    recording.check()
    return recording


def _require_plain_cache(model: Model, batch: Batch) -> None:
    try:
        model.forward(batch, keep=1, cache=DynamicCache())
    except Exception as problem:  # whatever a foreign forward pass raises, it cannot be recorded
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise UnsupportedModel(
            f"{model.name} does not run with a plain cache of keys and values ({reason}), so it cannot be replayed "
            "from a recorded run"
        ) from problem


def _tokens_at_once(model: Model) -> int:
    # On a CPU a block's activations should stay in its cache; a GPU wants large products.
    return 512 if model.device.type == "cpu" else 16384


class _Enough(Exception):
    """The keys and values asked for are there."""


class _Past(DynamicCache):
    """Keys and values `[r, heads, tokens, d]` of the tokens before, as a cache that does not remember new ones."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self._keys, self._values = keys, values

    def after(self, run: Callable[[DynamicCache], object]) -> _Past:
        """This and the keys and values of the tokens that `run` adds; it goes no further than them."""
        collecting = _Collecting(self._keys, self._values)
        try:
            run(collecting)
        except _Enough:
            return _Past(collecting._keys, collecting._values)
        raise TypeError("its attention does not use the cache that it is given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens so far."""
        return torch.cat([self._keys, key_states], -2), torch.cat([self._values, value_states], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens went before."""
        return self._keys.shape[-2]


class _Collecting(_Past):
    """A cache that ends the pass once it has the new tokens' keys and values, before attention uses them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._keys, self._values = super().update(key_states, value_states)
        raise _Enough


@dataclass(frozen=True)
class _Call:
    """What Hugging Face handed to a block beside its state: what depends on positions alone.

    Attributes:
        arguments: all but the state, by name; of tensors the first row stands for all.
        cache: the cache among the arguments.
        rows: how many were recorded.
        length: of the recorded texts, in tokens.
    """

    arguments: Mapping[str, Any]
    cache: DynamicCache
    rows: int
    length: int

    def __call__(self, block: nn.Module, states: Tensor, token: int, past: DynamicCache) -> Tensor:
        """The block's output for states of tokens `token` on, after `past`."""
        arguments = {
            name: self._at(name, value, token, states.shape[1], states) for name, value in self.arguments.items()
        }
        # A copy, for a block may go on to add into what it is given.
        output = block(states.clone(), **{n: past if v is self.cache else v for n, v in arguments.items()})
        return output[0] if isinstance(output, tuple) else output

    def _at(self, name: str, value: Any, token: int, count: int, states: Tensor) -> Any:
        """An argument as it is for `count` tokens from `token` on."""
        if name in ("attention_mask", "causal_mask"):
            return self._mask(value, token, count, states)
        if isinstance(value, tuple):
            return tuple(self._at(name, each, token, count, states) for each in value)
        if name == "alibi" and value is not None:  # of keys, `[rows * heads, 1, tokens]` or `[rows, heads, 1, tokens]`
            one = value[: len(value) // self.rows, ..., : token + count]
            return torch.cat([one] * len(states))
        if not isinstance(value, Tensor) or "position" not in name or "bias" in name or not value.dim():
            return value  # a bias of distances (MPT) is cut by the block itself
        axis = -2 if value.dim() > 2 else -1  # cosines `[rows, tokens, d]`, indexes `[rows, tokens]` or `[tokens]`
        value = value[:1] if value.dim() > 1 else value
        return value.narrow(axis, token, count) if value.shape[axis] == self.length else value

    def _mask(self, mask: Tensor | None, token: int, count: int, states: Tensor) -> Tensor:
        """The mask `[1, 1, count, token + count]`; none at all stands for plain causality."""
        if mask is None:
            whole = torch.ones(count, token + count, dtype=torch.bool, device=states.device)
            return whole.tril(token)[None, None]
        return mask[:1, ..., token : token + count, : token + count]
