"""Rows of tokens that go through blocks together: the one way in which errata calls a block on its own.

A `TokenBatch` holds the position of each token in its text, the tokens that it sees, and the past of each row. Its rows
are made in three ways: variations of recorded texts from one token on (`replay`), suffixes of recorded texts of many
lengths (`suffixes`), and texts packed side by side (`packed`). The three are separate because they differ in everything
before a block runs: what was recorded, how rows are grouped, and how callers address tokens.

`mismatch` is the self-check of all three: blocks that are called in this way must return the hidden states of Hugging
Face's own forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.base.errors import UnsupportedModel
from errata.models.model import Model
from errata.passes.block_call import Call, Earlier, Past, run
from errata.passes.hooks import Patch, hooked_block
from errata.passes.rowwise import RowChanges, rowwise

# Largest error of a block that is called on its own, relative to the largest feature of a token.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows `[r, n]` of tokens, each with p earlier ones.

    Attributes:
        calls: recorded arguments of every block.
        past: earlier tokens of all rows in a block.
        token: index of the first token in its text, where all rows stand alike and see all tokens before.
        layout: where they do not: index of each token in its text, the earlier ones first, `[r, p + n]`; and which
            tokens each sees, `[r, 1, n, p + n]`.
    """

    model: Model
    calls: Sequence[Call]
    past: Callable[[int], Past | Earlier]
    token: int = 0
    layout: tuple[Tensor, Tensor] | None = None
    _known: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    def step(
        self,
        layer: int,
        states: Tensor,
        keep: int | None = None,
        patches: Mapping[str, Patch] | None = None,
        changes: RowChanges | None = None,
    ) -> Tensor:
        """Output of block `layer`, `[r, keep or n, d_model]`, for the input `states` `[r, n, d_model]`.

        Args:
            layer: the block.
            states: hidden states of all tokens.
            keep: number of tokens at the end that are wanted; None: all. Of the others only keys and values are
                computed, and patches do not see them.
            patches: functions on the block's streams "attention", "mlp", "key" or "value", as in `passes.hooks`.
            changes: low-rank changes of the block's weights, one for each token, `[r, n]`.

        Gradients flow to `states` and through patches if the caller lets them.
        """
        rows, count = states.shape[:2]
        past, block = self.past(layer), self.model.blocks[layer]
        unwanted = 0 if keep is None else max(0, count - keep)
        # A block that runs on whole texts runs on all tokens.
        begin = 0 if self.calls[layer].whole else unwanted
        if begin and isinstance(past, Past):
            ahead, states = states.split([begin, count - begin], 1)
            given = self.arguments(layer, 0, begin, rows)
            with _changed(self.model, changes, slice(begin)):
                past = past.after(lambda cache: run(block, ahead, given, cache))
        hidden = unwanted - begin + (past.states.shape[1] if isinstance(past, Earlier) else 0)
        bound = {(part, layer): patch for part, patch in (patches or {}).items()}
        given = self.arguments(layer, begin, count, rows)
        with _changed(self.model, changes, slice(begin, None)), hooked_block(self.model, bound, rows, hidden):
            return run(block, states, given, past)[:, unwanted - begin :]

    def resume(self, layer: int, states: Tensor, end: int, keep: int | None = None) -> Tensor:
        """Input of block `end`, `[r, keep or n, d_model]`, for the input `states` of block `layer`."""
        for index in range(layer, end):
            states = self.step(index, states, keep if index == end - 1 else None)
        return states if keep is None else states[:, -keep:]

    def arguments(self, layer: int, begin: int, end: int, rows: int) -> dict[str, Any]:
        """Arguments of a block for the tokens from `begin` to `end` of all rows."""
        call = self.calls[layer]
        key = (begin, end, rows, *map(id, call.arguments.values()))  # most blocks are given the very same tensors
        if key not in self._known:
            if self.layout is None:
                self._known[key] = call.at(self.token + begin, rows, end - begin, self.model.device)
            else:
                positions, sees = self.layout
                seen = sees.shape[3] - sees.shape[2] + end
                self._known[key] = call.gathered(positions[:, :seen], sees[:, :, begin:end, :seen])
        return self._known[key]


def _changed(model: Model, changes: RowChanges | None, tokens: slice) -> contextlib.AbstractContextManager[None]:
    if changes is None or not changes.factors:
        return contextlib.nullcontext()
    return rowwise(model, RowChanges(changes.factors, changes.rows[:, tokens]))


# ---- self-check ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """A block whose output differs from the recording, with a description of the difference."""

    layer: int
    problem: str

    def refusal(self, model: Model, how: str, consequence: str) -> UnsupportedModel:
        """The error for a model with this mismatch."""
        return UnsupportedModel(
            f"{model.anatomy.blocks}.{self.layer}: {how}, {self.problem}, so {model.name} {consequence}; load it with "
            "attn_implementation='eager' if it has another"
        )


@torch.no_grad()
def mismatch(
    step: Callable[[int, Tensor], Tensor],
    layers: Iterable[int],
    states: Callable[[int], Tensor],
    compared: Tensor | None = None,
) -> Mismatch | None:
    """The first block whose output differs from Hugging Face's own pass; None if there is none.

    Args:
        step: calls a block on hidden states, `[r, n, d_model]`, in the way that is checked, with as many rows as are
            used. It may leave out the first tokens.
        layers: which blocks.
        states: recorded hidden states that enter a block and leave the one below it, `[r, n, d_model]`.
        compared: the tokens that are compared, `[r, n]`; None: all.
    """
    for layer in layers:
        wanted = states(layer + 1)
        try:
            found = step(layer, states(layer))
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a foreign block raises, it cannot be called in this way
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            return Mismatch(layer, f"it fails with {reason}")
        count = found.shape[1]
        which = ... if compared is None else compared[:, -count:]
        if not same_states(found[which], wanted[:, -count:][which]):
            return Mismatch(layer, "it comes out otherwise than in one piece")
    return None


def same_states(found: Tensor, want: Tensor) -> bool:
    """True if hidden states are equal up to rounding; positions where `want` is not finite are ignored."""
    error = (found - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-30)
    return bool((error <= _TOLERANCE[want.dtype])[want.isfinite().all(-1)].all())
