"""Patches of a model's streams inside a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errata.base.interrupt import unbroken
from errata.models.model import Model, Stream

Patch = Callable[[Tensor], Tensor | None]

# Streams of one module run in the order in which the forward pass meets them.
_ORDER = ("embedding", "key", "value", "mlp", "attention", "state")


@unbroken
def hooked(model: Model, patches: Mapping[Stream, Patch]) -> Iterator[None]:
    """Context in which every forward pass gives each stream's tensor to its function.

    A function is given the stream `[b, t, d]` and returns what takes its place, of the same shape, or None
    to leave it. It sees what earlier functions made of the pass. Of a model spread over several devices
    every stream is handed over on `model.device`. All hooks are gone when the block ends, however it ends.

    Raises:
        ConfigError: if the model has no such stream.
        ValueError: if a function returns another shape.
    """
    for stream in patches:
        model.path(stream)  # before the first hook: raises for a stream that is not there
    rows: list[int] = [1]  # batch size of the pass under way
    with contextlib.ExitStack() as stack:
        # Some blocks (OPT) flatten [b, t, d] to [b * t, d] around their MLP: the batch size undoes it.
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            rows[0] = _tensor_of(output).shape[0]

        stack.callback(model.module(("embedding", 0)).register_forward_hook(note).remove)
        for stream in sorted(patches, key=lambda stream: _ORDER.index(stream[0])):
            stack.callback(_register(model, stream, patches[stream], rows).remove)
        yield


@unbroken
def hooked_block(model: Model, patches: Mapping[Stream, Patch], rows: int, begin: int = 0) -> Iterator[None]:
    """`hooked` for blocks that are called on their own; the batch size is given, since the embedding does not run.

    Tokens before `begin` are hidden from the functions.
    """
    with contextlib.ExitStack() as stack:
        for stream in sorted(patches, key=lambda stream: _ORDER.index(stream[0])):
            stack.callback(_register(model, stream, patches[stream], [rows], begin).remove)
        yield


def _register(model: Model, stream: Stream, patch: Patch, rows: list[int], begin: int = 0) -> Any:
    module, home = model.module(stream), model.device

    def patched(tensor: Tensor) -> Tensor | None:
        whole = tensor.unflatten(0, (rows[0], -1)) if tensor.dim() == 2 else tensor
        seen = whole[:, begin:] if begin else whole
        new = patch(seen.to(home))
        if new is None:
            return None
        if new.shape != seen.shape:
            raise ValueError(f"the patch of {stream} returned shape {tuple(new.shape)} for {tuple(seen.shape)}")
        new = new.to(tensor.device)
        return (torch.cat([whole[:, :begin], new], 1) if begin else new).reshape(tensor.shape)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = patched(args[0])
        return None if new is None else (new, *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = patched(_tensor_of(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if stream[0] == "key":
        return module.register_forward_pre_hook(before)
    return module.register_forward_hook(after)


def _tensor_of(output: Any) -> Tensor:
    """Blocks and attentions return a tensor, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output
