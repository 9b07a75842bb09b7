"""Running sums of k kᵀ over batches, with checkpoints on disk.

Only the upper triangle of the symmetric matrix is computed and stored, in panels of rows: panel i holds rows [i, i +
512) from column i on. Products are computed in float32 (float64 for a float64 model), one for each batch, and added in
float64. Even and odd batches are summed separately, so that the two halves of the tokens can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from errata.base.errors import ResultFileError
from errata.base.parsing import of_type, taking_apart
from errata.base.tensor_files import read_tensors, write_tensors
from errata.statistics.fingerprint import different
from errata.statistics.second_moment import Halves, SecondMoment

KIND = "second moment, unfinished"
VERSION = 1
PANEL = 512  # rows; smaller ones save more of the lower triangle, larger ones multiply faster
SAMPLED = 64  # keys a layer by which the halves are compared


class _Header(TypedDict):
    """Header of unfinished sums."""

    batches: int
    counts: tuple[int, int]
    trail: str
    fingerprints: dict[str, dict[str, Any]]


class Sums:
    """Sums over the tokens of some batches, for several layers.

    Attributes:
        batches: how many batches are in them.
        counts: tokens of the even and of the odd batches.
        trail: digest of the batches, in order; "" before the first.
    """

    def __init__(self, layers: Sequence[int], size: int, device: torch.device):
        # Apple's GPUs have no float64
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._size = size
        self._panels = {layer: (self._zeros(), self._zeros()) for layer in layers}
        self._sampled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.batches = 0
        self.counts = [0, 0]
        self.trail = ""

    @property
    def layers(self) -> list[int]:
        """Layers that the sums belong to."""
        return list(self._panels)

    def _zeros(self) -> list[Tensor]:
        starts = range(0, self._size, PANEL)
        shapes = [(min(PANEL, self._size - start), self._size - start) for start in starts]
        return [torch.zeros(shape, dtype=torch.float64, device=self._device) for shape in shapes]

    def add(self, layer: int, keys: Tensor) -> None:
        """Add the keys `[n, d_mlp]` of a layer in the current batch."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        for start, panel in zip(range(0, self._size, PANEL), self._panels[layer][self.batches % 2], strict=True):
            panel += (keys[:, start : start + PANEL].T @ keys[:, start:]).to(self._device)
        if self.batches < SAMPLED:
            self._sampled[layer].append(keys[len(keys) // 2].cpu().clone())

    def close_batch(self, count: int, trail: str) -> None:
        """Finish the current batch of `count` tokens, which has been added in every layer."""
        self.counts[self.batches % 2] += count
        self.batches += 1
        self.trail = trail

    def moment(self, layer: int, fingerprint: dict[str, Any]) -> SecondMoment:
        """The second moment of a layer; its sums are released."""
        even, odd = (_whole(panels, self._size) for panels in self._panels.pop(layer))
        count = sum(self.counts)
        matrix = (even + odd).div_(count)
        halves = None
        if min(self.counts) >= self._size:  # with fewer tokens than features, a ridge would decide
            parts = zip((even, odd), self.counts, strict=True)
            first, second = (SecondMoment(part.div_(tokens), tokens, layer) for part, tokens in parts)
            halves = Halves.of(first, second, torch.stack(self._sampled[layer]))
        return SecondMoment(matrix, count, layer, fingerprint, halves=halves)

    def save(self, path: Path, fingerprints: dict[int, dict[str, Any]]) -> None:
        """Write the sums to a checkpoint after a complete batch.

        Raises:
            OutputError: if the file cannot be written; an older one stays unchanged.
        """
        header = {
            "batches": self.batches,
            "counts": self.counts,
            "trail": self.trail,
            "fingerprints": {str(layer): fingerprints[layer] for layer in self._panels},
        }
        tensors = {
            f"{layer}.{half}.{index}": panel.cpu()
            for layer, halves in self._panels.items()
            for half, panels in enumerate(halves)
            for index, panel in enumerate(panels)
        }
        tensors |= {f"{layer}.sampled": torch.stack(keys) for layer, keys in self._sampled.items() if keys}
        write_tensors(path, KIND, VERSION, header, tensors)

    def resume(self, path: Path, fingerprints: dict[int, dict[str, Any]]) -> None:
        """Continue from a checkpoint, if it is intact and has these layers and fingerprints, or more layers."""
        try:
            header, tensors = read_tensors(path, KIND, VERSION, ResultFileError)
            with taking_apart(path, "whole sums"):
                of_type({**header, "counts": tuple(header["counts"])}, _Header)
                kept = header["fingerprints"]
                if any(different(kept.get(str(each), {}), fingerprints[each]) for each in self._panels):
                    return
                sums = {
                    layer: [
                        [_like(panel, tensors[f"{layer}.{half}.{index}"]) for index, panel in enumerate(panels)]
                        for half, panels in enumerate(halves)
                    ]
                    for layer, halves in self._panels.items()
                }
                sampled = {layer: list(tensors[f"{layer}.sampled"]) for layer in self._panels}
        except ResultFileError:
            return
        for layer, halves in self._panels.items():
            for panels, stored in zip(halves, sums[layer], strict=True):
                for panel, one in zip(panels, stored, strict=True):
                    panel.copy_(one)
        self._sampled |= sampled
        self.batches, self.counts, self.trail = header["batches"], header["counts"], header["trail"]


def _like(panel: Tensor, stored: Tensor) -> Tensor:
    """A stored panel, once it is sure that it can take the place of this one."""
    if stored.shape != panel.shape or stored.dtype != panel.dtype or not torch.isfinite(stored).all():
        raise ValueError("a sum has another shape or type, or is not a number")
    return stored


def _whole(panels: list[Tensor], size: int) -> Tensor:
    """The symmetric matrix of which panels hold the upper triangle, on the CPU."""
    matrix = torch.empty(size, size, dtype=torch.float64)
    for start, panel in zip(range(0, size, PANEL), panels, strict=True):
        stop = start + len(panel)
        matrix[start:stop, start:] = panel.cpu()
        matrix[start:, start:stop] = panel.cpu().T
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)  # a product is symmetric but for rounding
    return matrix
