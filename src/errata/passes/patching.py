"""A forward pass in which chosen streams are replaced as they go by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errata.base.autocast import without_autocast
from errata.base.interrupt import attached
from errata.models.model import Batch, Model, Stream
from errata.passes.hooks import Patch, hooked


@without_autocast
def run(
    model: Model, batch: Batch, patches: Mapping[Stream, Patch] | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits of a forward pass with patches: `[b, t, v]`, or `[b, v]` at one token index `[b]` a row.

    With `positions` the head runs only there. Gradients flow if the caller lets them: wrap the call in
    `torch.no_grad()` where none are wanted.

    Raises:
        ConfigError: if the model has no such stream.
        ValueError: if a patch returns another shape, or a position is outside the batch.
    """
    if positions is not None:
        _require_inside(positions, batch)
    with hooked(model, patches or {}):
        if positions is None:
            return model.forward(batch)
        rows = torch.arange(len(positions), device=model.device)
        columns = positions.to(model.device)

        def only_there(head: nn.Module, args: tuple) -> tuple:
            return args[0].to(model.device)[rows, columns][:, None], *args[1:]

        # In front of the head, not behind the last norm: whatever a family does to its logits
        # (soft caps, scales) is then still done by its own forward.
        head = model.hf.get_submodule(model.anatomy.head)
        with attached(lambda: head.register_forward_pre_hook(only_there)):
            return model.forward(batch)[:, 0]


def _require_inside(positions: Tensor, batch: Batch) -> None:
    """On a GPU, an index out of range would end the process."""
    rows, width = batch.input_ids.shape
    if positions.shape != (rows,) or positions.min() < 0 or positions.max() >= width:
        raise ValueError(f"positions are one index from 0 to {width - 1} for each of {rows} rows, not {positions}")
