"""Reading streams of a forward pass, which stops once it has passed the last of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from errata.base.autocast import without_autocast
from errata.models.model import Batch, Model, Stream
from errata.passes.hooks import Patch, hooked


class _Enough(Exception):
    """Everything asked for has been read."""


@without_autocast
def read(model: Model, batch: Batch, streams: Iterable[Stream]) -> dict[Stream, Tensor]:
    """The named streams of one forward pass, each `[b, t, d]`, detached, without gradients.

    Values at padded positions are there but mean nothing.

    Raises:
        ConfigError: if the model has no such stream.
    """
    wanted = dict.fromkeys(streams)
    found: dict[Stream, Tensor] = {}

    def reader(stream: Stream) -> Patch:
        def keep(tensor: Tensor) -> None:
            found[stream] = tensor.detach().clone()  # some blocks go on to add into it in place
            if len(found) == len(wanted):
                raise _Enough

        return keep

    if wanted:
        try:
            with torch.no_grad(), hooked(model, {stream: reader(stream) for stream in wanted}):
                model.forward(batch)
        except _Enough:
            pass
    return {stream: found[stream] for stream in wanted}
