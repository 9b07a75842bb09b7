"""Gradient of an edit's loss with respect to linear maps of the highest blocks, as factors.

For a map W, the gradient of a loss over n tokens is Σ δ_t ⊗ u_t: u_t is the map's input, δ_t the gradient with respect
to its output. It takes one forward pass, and one backward pass through the highest blocks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base.errors import ConfigError
from errata.editors.texts import Text, kept, predictions, recorded
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.models.weights import mlp_maps
from errata.passes.suffixes import Suffixes
from errata.passes.taps import tapped


@dataclass(frozen=True)
class Factors:
    """Rows of several edits for one map, grouped by edit, n in all.

    Attributes:
        entering: u, or what is read, `[n, d_in]`.
        leaving: δ, or what is written, `[n, d_out]`.
        owner: which edit each is of, ascending, `[n]`.
    """

    entering: Tensor
    leaving: Tensor
    owner: Tensor

    def of(self, edit: int) -> tuple[Tensor, Tensor]:
        """(leaving `[d_out, k]`, entering `[k, d_in]`) of one edit, whose product is the sum over its rows."""
        own = self.owner == edit
        return self.leaving[own].T, self.entering[own]


def edited_maps(model: Model, blocks: int) -> tuple[str, ...]:
    """The names of all linear maps of the MLPs of the highest blocks.

    Raises:
        ConfigError: if the model has fewer blocks.
    """
    if blocks > model.n_layers:
        raise ConfigError(f"blocks = {blocks}, and {model.name} has {model.n_layers}: name as many or fewer")
    return tuple(name for layer in range(model.n_layers - blocks, model.n_layers) for name in mlp_maps(model, layer))


# A caller in inference mode gets gradients all the same.
@torch.inference_mode(False)
def gradient_factors(
    model: Model, texts: Sequence[Text], maps: Sequence[str], first: int, suffixes: Suffixes | None = None
) -> dict[str, Factors]:
    """Gradient factors, by map, of each text's loss: −log P of its target in nats, mean over the target's tokens.

    Args:
        model: the model; left unchanged.
        texts: one an edit.
        maps: names of linear maps in blocks from `first` on.
        first: the lowest of these blocks.
        suffixes: the texts as recorded from `first` on, if they are already.

    Tokens without any gradient are left out.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in maps}
    suffixes = suffixes or recorded(model, first, texts)
    with frozen(model), torch.enable_grad():
        for batch in suffixes.micro_batches(range(len(texts))):
            some = [texts[row] for row in batch.labels]
            with tapped(model, maps) as taps:
                states = batch.resume(first, batch.states, model.n_layers, keep=kept(some))
            losses = predictions(model, some, states).losses()
            gradients = torch.autograd.grad(losses.sum(), [taps[name].added for name in maps])
            owner = torch.tensor(batch.labels, device=losses.device)
            for name, gradient in zip(maps, gradients, strict=True):
                delta = gradient.reshape(len(some), -1, gradient.shape[-1]).to(losses)
                u = taps[name].entering.reshape(*delta.shape[:2], -1).to(losses)
                there = (delta != 0).any(-1)
                found[name].append((u[there], delta[there], owner[:, None].expand_as(there)[there]))
    return {name: _sorted(parts) for name, parts in found.items()}


def _sorted(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Factors:
    entering, leaving, owner = (torch.cat(each) for each in zip(*parts, strict=True))
    order = owner.argsort(stable=True)
    return Factors(entering[order], leaving[order], owner[order])


def padded(factors: Mapping[str, Factors], edits: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By map, write `[edits, d_out, k]` and read `[edits, k, d_in]`, with zeros where an edit has fewer rows."""
    found = {}
    for name, each in factors.items():
        counts = torch.bincount(each.owner, minlength=edits)
        place = torch.arange(len(each.owner), device=counts.device) - (counts.cumsum(0) - counts)[each.owner]
        width = int(counts.max()) if len(each.owner) else 1
        write = each.leaving.new_zeros(edits, width, each.leaving.shape[1])
        read = each.entering.new_zeros(edits, width, each.entering.shape[1])
        write = write.index_put((each.owner, place), each.leaving)
        read = read.index_put((each.owner, place), each.entering)
        found[name] = write.mT, read
    return found
