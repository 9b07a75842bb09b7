"""Batch sizes and memory budgets of everything that runs a model.

A batch is as large as suits the device (`tokens`, `predictions`) or as free memory holds (`fitting`). `groups` and
`padded_groups` deal items into such batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    import torch

Work = Literal["forward", "backward", "record"]

TOKENS: dict[Work, dict[str, int]] = {
    # On a CPU a block's activations should stay in its cache; a GPU wants large products.
    "forward": {"cpu": 512, "cuda": 16384},
    # Gradients keep what every block made on its way.
    "backward": {"cpu": 512, "cuda": 4096},
    # A recording keeps the hidden states of many blocks.
    "record": {"cpu": 4096, "cuda": 32768},
}
LOGITS = 2**26  # of one batch; at float32, a quarter of a GiB
CACHE = {"cpu": 2**31, "cuda": 2**33}  # bytes of keys and values of one batch
ENOUGH = {"cpu": 2 * 2**30, "cuda": 24 * 2**30}  # bytes beyond which a trace gets no faster


def tokens(device: torch.device, work: Work = "forward") -> int:
    """Largest number of tokens for one call of a block."""
    return TOKENS[work].get(device.type, TOKENS[work]["cuda"])


def predictions(vocabulary: int, logits: int | None = None) -> int:
    """Number of positions whose predictions are computed at once, at least one, with at most `logits` logits."""
    return max(1, min(LOGITS, LOGITS if logits is None else logits) // vocabulary)


def cached_tokens(device: torch.device, bytes_each: int) -> int:
    """Largest number of tokens whose keys and values are in memory at once."""
    return CACHE.get(device.type, CACHE["cpu"]) // bytes_each


def enough_memory(device: torch.device) -> int:
    """Number of bytes above which more memory does not make a trace faster."""
    return ENOUGH.get(device.type, ENOUGH["cpu"])


def fitting(devices: Iterable[torch.device], bytes_each: int, part: int = 4) -> int:
    """Number of items that fit into free memory divided by `part`."""
    return free_memory(*devices) // part // bytes_each


def free_memory(*devices: torch.device) -> int:
    """Bytes that are free on each of these devices."""
    return min(map(_free_memory, devices))


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    import torch

    torch.cuda.empty_cache()  # what torch keeps for itself is free to us
    return int(torch.cuda.mem_get_info(device)[0])


def groups(costs: Sequence[float], most: float) -> Iterator[range]:
    """Groups of consecutive items; each group costs at most `most`, or is a single item."""
    begin, spent = 0, 0.0
    for index, cost in enumerate(costs):
        if index > begin and spent + cost > most:
            yield range(begin, index)
            begin, spent = index, 0.0
        spent += cost
    if costs:
        yield range(begin, len(costs))


def padded_groups(lengths: Sequence[int], most: int, rows: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Groups of item indexes in order of length; each has at most `most` tokens with padding, or is a single item.

    Args:
        lengths: tokens in each row of an item.
        most: tokens of a group.
        rows: number of rows of each item; None: one.
    """
    group: list[int] = []
    height = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        own = rows[index] if rows else 1
        if group and lengths[index] * (height + own) > most:
            yield group
            group, height = [], 0
        group.append(index)
        height += own
    if group:
        yield group
