"""All restored runs of one token in a single sweep through the blocks.

A restored run equals the corrupted run up to its first restored site, so its rows join the sweep there: the corrupted
run's hidden states from this token on, with the restored output inserted. Runs whose windows begin at the same layer
are equal until the first window ends, and share rows until then. Tokens before the restored one, and blocks below it,
are never run again. Severed runs under their own noise are the exception: their modules are held in all layers, so they
share rows from block 0 on, each until its state is restored.
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
SEVERED = {"severed_mlp": "mlp", "severed_attention": "attention"}


@dataclass(frozen=True)
class VariantGroup:
    """Restored variants of a run whose first restored site is the same.

    Attributes:
        part: the restored part, one of `PARTS`.
        layer: the first restored layer.
        ends: (last restored layer, layers of the sites whose windows end there), ascending. For a state the layer
            itself.
    """

    part: str
    layer: int
    ends: tuple[tuple[int, tuple[int, ...]], ...]


def plan(parts: Sequence[str], layers: int, width: int, edges: WindowEdges) -> list[VariantGroup]:
    """The restored variants of all layers, for one token."""
    groups = []
    for part in parts:
        windows: dict[int, dict[int, list[int]]] = {}
        for layer in range(layers):
            reach = (
                window_layers(layer, width, edges, layers) if part in ("mlp", "attention") else range(layer, layer + 1)
            )
            windows.setdefault(reach[0], {}).setdefault(reach[-1], []).append(layer)
        groups += [
            VariantGroup(part, first, tuple((last, tuple(sites)) for last, sites in sorted(ends.items())))
            for first, ends in sorted(windows.items())
        ]
    return groups


def window_layers(layer: int, width: int, edges: WindowEdges, layers: int) -> range:
    """The layers of the window around one layer, cut at both ends of the model."""
    before = (width - 1) // 2 if edges == "paper" else width // 2
    return range(max(0, layer - before), min(layers, layer - before + width))


@dataclass
class _Variant:
    """Rows of the sweep, one for each corrupted row, in which the same sites are restored."""

    group: VariantGroup
    ends: list[tuple[int, tuple[int, ...]]]  # those still ahead

    def holds(self, layer: int) -> str | None:
        """The part whose stored output replaces that of block `layer` at the token, if any."""
        if self.group.part in SEVERED:
            return SEVERED[self.group.part]
        inside = self.group.part != "state" and self.ends[0][0] >= layer
        return self.group.part if inside else None


@torch.no_grad()
def sweep(
    recording: Recording,
    groups: Sequence[VariantGroup],
    token: int,
    corrupted: Tensor,
    clean: Tensor,
    scored: int = 1,
    redrawn: Tensor | None = None,
) -> tuple[list[tuple[str, tuple[int, ...]]], Tensor]:
    """The restored runs of one token.

    Args:
        recording: of clean and corrupted runs, with the streams that are restored or severed; where MLPs are restored,
            with both.
        groups: which restored variants.
        token: index of the restored token.
        corrupted: recorded rows `[g]` of corrupted runs.
        clean: for each, the recorded row `[g]` of its clean run.
        scored: how many positions at the end are wanted.
        redrawn: for each, the recorded row `[g]` of the run under other noise in which severed states are restored;
            None: `corrupted`.

    Returns:
        For each variant, (part, layers of the sites that it serves), and the last block's states
        `[variants, g, scored, d_model]`.
    """
    count, layers = recording.length - token, recording.model.n_layers
    # Of severed parts under noise of their own: the runs without a restored state, which all others leave.
    common = {group.part: redrawn for group in groups if redrawn is not None and group.part in SEVERED}
    variants = [_Variant(VariantGroup(part, 0, ()), [(layers, ())]) for part in common]
    states = recording.states[0][corrupted if redrawn is None else redrawn, token:].repeat(len(variants), 1, 1, 1)
    for layer in range(0 if variants else min(group.layer for group in groups), layers):
        wanted = count if layer < layers - 1 else scored  # of the last block
        if variants:
            rows = torch.cat([common.get(variant.group.part, corrupted) for variant in variants])
            held = [variant.holds(layer) for variant in variants]
            sources = torch.cat([corrupted if variant.group.part in SEVERED else clean for variant in variants])
            patches = _put(recording, held, layer, token, sources)
            states = recording.step(
                layer,
                states.flatten(0, 1),
                token,
                rows,
                patches if wanted == count else None,
                wanted,
            ).unflatten(0, (len(variants), -1))
        joining = []
        for index, variant in enumerate(list(variants)):
            if variant.ends[0][0] == layer and len(variant.ends) > 1:  # one window ends here, the others go on
                variants.append(_Variant(variant.group, [variant.ends.pop(0)]))
                joining.append(states[index])
        for group in groups:
            if group.layer == layer:
                variants.append(_Variant(group, list(group.ends)))
                if group.part in common:
                    joined = states[list(common).index(group.part)].clone()
                else:
                    joined = recording.states[layer + 1][corrupted, token:]
                if joined.shape[1] == count:  # else nothing scored reads the token
                    joined[:, 0] = _restored(recording, group.part, layer, token, corrupted, clean)
                joining.append(joined[:, -wanted:])
                if group.ends[0][0] == layer and len(group.ends) > 1:
                    variants.append(_Variant(group, [variants[-1].ends.pop(0)]))
                    joining.append(joining[-1])
        if joining:
            states = torch.cat([states, torch.stack(joining)])
    sites = [(variant.group.part, tuple(site for _, sites in variant.ends for site in sites)) for variant in variants]
    return sites[len(common) :], states[len(common) :]


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
    """Patches that put a part's recorded output of rows `sources` at the token, in variants that hold the part."""
    count = len(sources) // len(held)

    def patch(part: str) -> RowPatch:
        where = torch.tensor([one == part for one in held], device=sources.device).repeat_interleave(count)
        values = recording.kept[part, layer][sources, token]

        def put(tensor: Tensor, rows: slice) -> Tensor:
            tensor = tensor.clone()
            tensor[:, 0] = torch.where(where[rows, None], values[rows], tensor[:, 0])
            return tensor

        return put

    return {part: patch(part) for part in dict.fromkeys(held) if part is not None}
