"""Forward passes that are recorded and can be resumed at any block and token.

Tracing and editing compute thousands of times what a model predicts if one activation is changed. Nearly all of that
work is already done: blocks below the change and tokens before it are the same. A `Recording` keeps the input and
output of every block of one run, attention's keys and values, and the arguments that Hugging Face passed to each block.
`step` then runs one block on the tokens from any one on, for any number of rows, each a variation of a recorded row;
earlier tokens are present through their recorded keys and values.

Blocks that cannot be resumed after keys and values (recurrent layers, convolutions, attention that takes no cache) run
on whole texts instead: on the recorded hidden states of earlier tokens and those at hand. This is slower and gives the
same numbers. `engine_of` measures once which of the two a model needs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from errata.base import budgets
from errata.base.errors import UnsupportedModel
from errata.base.interrupt import attached
from errata.models.model import Batch, Model, Stream
from errata.passes.block_call import PAST, Call, Earlier, Past
from errata.passes.hooks import Patch, hooked
from errata.passes.token_batch import TokenBatch, mismatch

# A patch of a resumed block. It is given the stream `[r, n, d]` of some of the rows, and which rows these are.
RowPatch = Callable[[Tensor, slice], Tensor]

Engine = Literal["replay", "plain"]

_engines: WeakKeyDictionary[Model, dict[tuple[object, ...], Engine]] = WeakKeyDictionary()
# Tokens of the text on which a model's engine is measured.
_PROBED = 9


class _Enough(Exception):
    """The last block has run."""


class Recording:
    """One recorded forward pass without padding. Made by `record`.

    Attributes:
        model: the model that ran; its weights must not change as long as the recording is used.
        length: tokens in every row.
        first: the lowest block that can be resumed.
        states: states[l] enters block l and states[l + 1] leaves it, each `[rows, length, d_model]` on the model's
            device; from `first` on.
        kept: the other streams asked for, `[rows, length, d]`.
        tokens_at_once: about the number of tokens that `step` passes to a block in one call; rows that see many
            earlier tokens count for more.
        engine: "replay", or "plain" where every block is run on whole texts.
    """

    def __init__(
        self,
        model: Model,
        first: int,
        states: Mapping[int, Tensor],
        kept: Mapping[Stream, Tensor],
        cache: DynamicCache | None,
        calls: list[Call],
        tokens_at_once: int,
    ):
        self.model = model
        self.first = first
        self.states = states
        self.kept = kept
        self.length = states[first].shape[1]
        self.tokens_at_once = tokens_at_once
        self.calls = calls
        self.engine: Engine = "plain" if cache is None else "replay"
        layers = cache.layers if cache else ()
        self._past = {i: Past(layer.keys, layer.values) for i, layer in enumerate(layers) if i >= first}

    def step(
        self,
        layer: int,
        states: Tensor,
        token: int,
        rows: Tensor,
        patches: Mapping[str, RowPatch] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Output of block `layer`, `[r, keep or n, d_model]`, for the input `states` `[r, n, d_model]`.

        Args:
            layer: the block.
            states: of n tokens, the first of them `token`.
            token: index of the first token; those before it are as recorded.
            rows: for each of the r rows, the recorded row that it varies, `[r]`.
            patches: functions on the block's streams, as of `TokenBatch.step`, which are also given the rows at hand.
            keep: number of tokens at the end that are wanted; None: all.

        Gradients flow to `states` and through patches if the caller lets them.
        """
        count = states.shape[1]
        # Keys and values of a token take about a sixteenth of what a block makes of one on its way.
        cost = count + (token + count) // 16 if self.engine == "replay" else token + count
        parts = []
        for group in budgets.groups([cost] * len(states), self.tokens_at_once):
            chosen = slice(group.start, group.stop)
            past = functools.partial(self.past, rows=rows[chosen], token=token)
            bound = {part: functools.partial(_call, patch, chosen) for part, patch in (patches or {}).items()}
            batch = TokenBatch(self.model, self.calls, past, token)
            parts.append(batch.step(layer, states[chosen], keep, bound))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def past(self, layer: int, rows: Tensor, token: int) -> Past | Earlier:
        """The tokens before `token` in some rows: attention's keys and values in block `layer`, or its input."""
        if self.engine == "plain":
            return Earlier(self.states[layer]).of(rows, token)
        return self._past[layer].of(rows, token)

    def check(self) -> None:
        """Resume every block in the middle of all rows and of one more, and compare with what was recorded.

        Raises:
            UnsupportedModel: if it comes out otherwise, so that this model cannot be replayed.
        """
        middle, recorded = self.length // 2, len(self.states[self.first])
        # What is resumed has seldom as many rows as the recording, and never one alone.
        rows = torch.tensor([*range(recorded), 0], device=self.model.device)
        wrong = mismatch(
            lambda layer, states: self.step(layer, states, middle, rows),
            range(self.first, self.model.n_layers),
            lambda layer: self.states[layer][rows, middle:],
        )
        if wrong:
            how = "resumed in the middle of a text" if self.engine == "replay" else "called on its own"
            raise wrong.refusal(self.model, how, "cannot be replayed from a recorded run")


def _call(patch: RowPatch, rows: slice, tensor: Tensor) -> Tensor:
    return patch(tensor, rows)


@torch.no_grad()
def record(
    model: Model,
    batch: Batch,
    patches: Mapping[Stream, Patch] | None = None,
    keep: Iterable[Stream] = (),
    tokens_at_once: int | None = None,
    first: int = 0,
    check: bool = True,
) -> Recording:
    """Run the model and record what a replay needs.

    Args:
        model: any decoder.
        batch: texts of the same length in tokens.
        patches: as in `passes.hooks`; none of a stream that is kept.
        keep: streams to keep beside the states.
        tokens_at_once: see `Recording`; None: what suits the device.
        first: the lowest block that will be resumed.
        check: whether to check that blocks can be resumed; False where what is made of the recording is checked.

    Raises:
        ValueError: if the texts differ in length.
        UnsupportedModel: if blocks give other numbers even when they are called on whole texts.
    """
    if not bool(batch.attention_mask.all()):
        raise ValueError("a recording needs texts of one length: group them by their number of tokens")
    if engine_of(model) == "replay":
        recording = _record(model, batch, patches or {}, keep, tokens_at_once, first, DynamicCache())
        if not check:
            return recording
        with contextlib.suppress(UnsupportedModel):
            recording.check()
            return recording
        _remember(model, "plain")
    recording = _record(model, batch, patches or {}, keep, tokens_at_once, first, None)
    if check:
        recording.check()
    return recording


def engine_of(model: Model) -> Engine:
    """Engine of a model's runs: "replay" where its blocks can be resumed, "plain" where they run on whole texts.

    Measured once on a short text, for a model with the attention that it has now.
    """
    found = _engines.setdefault(model, {}).get(_kind(model))
    if found is None:
        length = min(_PROBED, model.max_length)
        rows = [[(17 * i + 5 * row) % model.vocab_size for i in range(length)] for row in range(2)]
        try:
            _record(model, model.batch(rows), {}, (), None, 0, DynamicCache()).check()
            found = _remember(model, "replay")
        except UnsupportedModel:
            found = _remember(model, "plain")
    return found


def tell_if_plain(model: Model) -> None:
    """Warn that runs take longer on this model, if they do."""
    if engine_of(model) == "plain":
        warnings.warn(
            f"{model.name} cannot be resumed in the middle of a text (it has recurrent layers, convolutions or a cache "
            "of its own), so every block is run on whole texts: the numbers are as exact, and take longer",
            stacklevel=3,
        )


def _kind(model: Model) -> tuple[object, ...]:
    attention = model.hf.config.get_text_config()._attn_implementation
    return (id(model.hf), model.device, model.dtype, attention)


def _remember(model: Model, engine: Engine) -> Engine:
    _engines.setdefault(model, {})[_kind(model)] = engine
    return engine


def _record(
    model: Model,
    batch: Batch,
    patches: Mapping[Stream, Patch],
    keep: Iterable[Stream],
    tokens_at_once: int | None,
    first: int,
    cache: DynamicCache | None,
) -> Recording:
    """`record` without self-check and without cache, for models that run on whole texts."""
    calls: list[Call] = []
    states: dict[int, Tensor] = {}
    kept: dict[Stream, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        state = arguments.pop(names[0])
        if len(calls) >= first:
            states[len(calls)] = state.to(model.device, copy=True)  # some blocks go on to add into it in place
        given = {name: PAST if cache is not None and value is cache else value for name, value in arguments.items()}
        calls.append(Call(given, len(state), state.shape[1], whole=cache is None))

    def keeper(stream: Stream) -> Patch:
        def note(tensor: Tensor) -> None:
            kept[stream] = tensor.clone()

        return note

    def end(tensor: Tensor) -> None:
        states[model.n_layers] = tensor.clone()
        raise _Enough  # nobody asks the head here

    watched = {**{stream: keeper(stream) for stream in keep}, ("state", model.n_layers - 1): end}
    entering = [functools.partial(block.register_forward_pre_hook, enter, with_kwargs=True) for block in model.blocks]
    try:
        with attached(*entering), hooked(model, {**patches, **watched}):
            model.forward(batch, keep=1, cache=cache)
    except _Enough:
        pass
    except (TypeError, ValueError, LookupError, AttributeError):
        if cache is not None:
            _require_plain_cache(model, batch)  # or else a patch has failed
        raise
    if cache is not None and len(cache.layers) < model.n_layers:
        raise UnsupportedModel(f"{model.name} leaves no keys and values of some blocks, so it cannot be replayed")
    return Recording(model, first, states, kept, cache, calls, tokens_at_once or budgets.tokens(model.device))


def _require_plain_cache(model: Model, batch: Batch) -> None:
    try:
        model.forward(batch, keep=1, cache=DynamicCache())
    except Exception as problem:  # whatever a foreign forward pass raises, it cannot be recorded
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise UnsupportedModel(
            f"{model.name} does not run with a plain cache of keys and values ({reason}), so it cannot be replayed "
            "from a recorded run"
        ) from problem
