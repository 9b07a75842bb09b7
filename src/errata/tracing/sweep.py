"""All restored runs of one token in a single sweep through the blocks.

A restored run is the corrupted run up to the first restored site. So it joins the sweep only there: as the corrupted
run's states at this token and after it, with what was restored put in. Rows whose windows of layers begin together are
the same until the first window ends; they share a lane until then. Tokens before the restored one are never run again,
nor is any block below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.passes.replay import Recording, RowPatch

PARTS = ("state", "mlp", "attention", "severed_mlp", "severed_attention")
WindowEdges = Literal["paper", "reference"]
_SEVERED = {"severed_mlp": "mlp", "severed_attention": "attention"}


@dataclass(frozen=True)
class Start:
    """Restored runs that begin alike.

    Attributes:
        part: what is restored, one of `PARTS`.
        layer: the first restored layer.
        ends: (last restored layer, layers of the sites whose windows end there), ascending. For a state the layer
            itself.
    """

    part: str
    layer: int
    ends: tuple[tuple[int, tuple[int, ...]], ...]


def plan(parts: Sequence[str], layers: int, width: int, edges: WindowEdges) -> list[Start]:
    """Where the restored runs of all layers begin and end, for one token."""
    starts = []
    for part in parts:
        windows: dict[int, dict[int, list[int]]] = {}
        for layer in range(layers):
            reach = (
                window_layers(layer, width, edges, layers) if part in ("mlp", "attention") else range(layer, layer + 1)
            )
            windows.setdefault(reach[0], {}).setdefault(reach[-1], []).append(layer)
        starts += [
            Start(part, first, tuple((last, tuple(sites)) for last, sites in sorted(ends.items())))
            for first, ends in sorted(windows.items())
        ]
    return starts


def window_layers(layer: int, width: int, edges: WindowEdges, layers: int) -> range:
    """The layers of the window around one layer, cut at both ends of the model."""
    before = (width - 1) // 2 if edges == "paper" else width // 2
    return range(max(0, layer - before), min(layers, layer - before + width))


@dataclass
class _Lane:
    """Rows of the sweep, one for each corrupted row, in which the same sites are restored."""

    start: Start
    ends: list[tuple[int, tuple[int, ...]]]  # those still ahead

    def holds(self, layer: int) -> str | None:
        """The part whose output is put in place of what block `layer` would write at the token, if any."""
        if self.start.part in _SEVERED:
            return _SEVERED[self.start.part]
        inside = self.start.part != "state" and self.ends[0][0] >= layer
        return self.start.part if inside else None


@torch.no_grad()
def sweep(
    recording: Recording, starts: Sequence[Start], token: int, corrupted: Tensor, clean: Tensor, scored: int = 1
) -> tuple[list[tuple[str, tuple[int, ...]]], Tensor]:
    """The restored runs of one token.

    Args:
        recording: of clean and corrupted runs, with the streams that are restored or severed; where MLPs are restored,
            with both.
        starts: which restored runs.
        token: index of the restored token.
        corrupted: recorded rows `[g]` of corrupted runs.
        clean: for each, the recorded row `[g]` of its clean run.
        scored: how many positions at the end are wanted.

    Returns:
        For each lane of rows, (part, layers of the sites that it serves), and the last block's states
        `[lanes, g, scored, d_model]`.
    """
    lanes: list[_Lane] = []
    count, layers = recording.length - token, recording.model.n_layers
    states = recording.states[0].new_empty(0, len(corrupted), count, recording.states[0].shape[-1])
    for layer in range(min(start.layer for start in starts), layers):
        wanted = count if layer < layers - 1 else scored  # of the last block
        if lanes:
            rows = corrupted.repeat(len(lanes))
            held = [lane.holds(layer) for lane in lanes]
            sources = torch.cat([corrupted if lane.start.part in _SEVERED else clean for lane in lanes])
            patches = _put(recording, held, layer, token, sources)
            states = recording.step(
                layer,
                states.flatten(0, 1),
                token,
                rows,
                patches if wanted == count else None,
                wanted,
            ).unflatten(0, (len(lanes), -1))
        joining = []
        for index, lane in enumerate(list(lanes)):
            if lane.ends[0][0] == layer and len(lane.ends) > 1:  # one window ends here, the others go on
                lanes.append(_Lane(lane.start, [lane.ends.pop(0)]))
                joining.append(states[index])
        for start in starts:
            if start.layer == layer:
                lanes.append(_Lane(start, list(start.ends)))
                joined = recording.states[layer + 1][corrupted, token:]
                joined[:, 0] = _restored(recording, start.part, layer, token, corrupted, clean)
                joining.append(joined[:, -wanted:])
                if start.ends[0][0] == layer and len(start.ends) > 1:
                    lanes.append(_Lane(start, [lanes[-1].ends.pop(0)]))
                    joining.append(joining[-1])
        if joining:
            states = torch.cat([states, torch.stack(joining)])
    return [(lane.start.part, tuple(site for _, sites in lane.ends for site in sites)) for lane in lanes], states


def _restored(recording: Recording, part: str, layer: int, token: int, corrupted: Tensor, clean: Tensor) -> Tensor:
    """The state `[g, d_model]` that leaves block `layer` at the token once its first site is restored."""
    if part not in ("mlp", "attention"):
        return recording.states[layer + 1][clean, token]
    entering = recording.states[layer][corrupted, token : token + 1]
    patches = _put(recording, [part], layer, token, clean)
    if part == "mlp":
        # Attention of this token alone is over fewer keys, and a softmax in float32, which many blocks take whatever
        # their dtype, rounds otherwise over fewer.
        patches |= _put(recording, ["attention"], layer, token, corrupted)
    return recording.step(layer, entering, token, corrupted, patches)[:, 0]


def _put(
    recording: Recording, held: Sequence[str | None], layer: int, token: int, sources: Tensor
) -> dict[str, RowPatch]:
    """Patches that put, in lanes that hold a part, its recorded output of rows `sources` at the token."""
    group = len(sources) // len(held)

    def patch(part: str) -> RowPatch:
        where = torch.tensor([one == part for one in held], device=sources.device).repeat_interleave(group)
        values = recording.kept[part, layer][sources, token]

        def put(tensor: Tensor, rows: slice) -> Tensor:
            tensor = tensor.clone()
            tensor[:, 0] = torch.where(where[rows, None], values[rows], tensor[:, 0])
            return tensor

        return put

    return {part: patch(part) for part in dict.fromkeys(held) if part is not None}
