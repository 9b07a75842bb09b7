"""Training of a copy of some parameters of one block on one fact, or on many facts with one copy each.

Each step computes only what depends on the change: the blocks from the trained one on, whose input is recorded once,
and the predictions that a target needs. Only ΔW has a gradient. The blocks above the trained one run the texts of all
facts in one batch; each fact's result is the same as if it were alone, up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base.errors import Diverged, ErrataError
from errata.editors.editor import Progress, Step
from errata.editors.fine_tuning.config import FineTuningConfig
from errata.editors.fine_tuning.trained import full_name, with_weights
from errata.editors.texts import Text, kept, predictions, recorded
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.passes.suffixes import SuffixBatch


@dataclass(frozen=True)
class Found:
    """Result of training on one fact.

    Attributes:
        changes: ΔW by name within the block, as the model stores the parameter, in float32 at least.
        losses: before each change, and the one at which it stopped, if it did.
        updates: how often the parameters were changed.
    """

    changes: Mapping[str, Tensor]
    losses: tuple[float, ...]
    updates: int


def optimise(
    model: Model,
    names: Sequence[str],
    texts: Sequence[Text],
    config: FineTuningConfig,
    progress: Progress | None = None,
) -> list[Found | ErrataError]:
    """The change for each text, or the error. The model is left unchanged in any case.

    Args:
        names: names of the parameters within the block (`trained`).
        texts: one a fact.
        progress: called after every evaluation of a fact's loss.
    """
    losses: list[list[float]] = [[] for _ in texts]
    updates = [0] * len(texts)
    failed: dict[int, ErrataError] = {}
    running = set(range(len(texts)))
    with torch.enable_grad(), frozen(model):
        objective = _Objective(model, names, texts, config)
        deltas = [[torch.zeros_like(each, requires_grad=True) for each in objective.before] for _ in texts]
        adam = torch.optim.Adam(itertools.chain(*deltas), lr=config.learning_rate, fused=True)
        for index in range(config.steps):
            for fact, loss in objective(deltas, running).items():
                losses[fact].append(loss)
                if progress is not None:
                    progress(Step(index, config.steps, loss, fact, len(texts)))
                if not math.isfinite(loss):
                    failed[fact] = _diverged(f"the loss is {loss} at step {index}", config)
                if fact in failed or loss < config.stop_below:
                    running.discard(fact)
                    for delta in deltas[fact]:
                        delta.grad = None  # which Adam leaves alone
                else:
                    updates[fact] += 1
            if not running:
                break
            adam.step()
            if config.epsilon is not None:
                with torch.no_grad():
                    for delta in itertools.chain(*deltas):
                        delta.clamp_(-config.epsilon, config.epsilon)
    found: list[Found | ErrataError] = []
    for fact, own in enumerate(deltas):
        if fact not in failed and not all(delta.isfinite().all() for delta in own):
            failed[fact] = _diverged("the change of the weight is not a finite number", config)
        changes = dict(zip(names, (delta.detach() for delta in own), strict=True))
        found.append(failed.get(fact) or Found(changes, tuple(losses[fact]), updates[fact]))
    return found


def _diverged(what: str, config: FineTuningConfig) -> Diverged:
    return Diverged(
        f"{what} of fine-tuning, layer {config.layer}: the model's numbers overflow there. It is as it was; try a "
        "smaller learning_rate or a wider dtype"
    )


class _Objective:
    """The loss of every fact as a function of its own changes; it leaves their gradients on them."""

    def __init__(self, model: Model, names: Sequence[str], texts: Sequence[Text], config: FineTuningConfig):
        assert config.layer is not None  # settled
        self.model, self.names, self.texts, self.config = model, names, texts, config
        self.layer = config.layer
        self.weights = [model.weight(full_name(model, self.layer, name)).detach() for name in names]
        self.before = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in self.weights]
        self.suffixes = recorded(model, self.layer, texts)
        self.alone = {fact: next(self.suffixes.micro_batches({fact}, 1)) for fact in range(len(texts))}

    def __call__(self, deltas: Sequence[Sequence[Tensor]], facts: set[int]) -> dict[int, float]:
        """The loss of each of these facts."""
        found: dict[int, float] = {}
        decay = self.config.weight_decay
        for batch in self.suffixes.micro_batches(facts):
            owners = list(batch.labels)
            weights = {
                fact: [before + delta for before, delta in zip(self.before, deltas[fact], strict=True)]
                for fact in owners
            }
            losses = self._losses(batch, weights)
            variables = [delta for fact in owners for delta in deltas[fact]]
            now = [weight.detach() for fact in owners for weight in weights[fact]]
            gradients = torch.autograd.grad(losses.sum(), variables)
            for delta, gradient, weight in zip(variables, gradients, now, strict=True):
                delta.grad = gradient.add_(weight, alpha=decay) if decay else gradient
            found.update(zip(owners, losses.tolist(), strict=True))
        return found

    def _losses(self, batch: SuffixBatch, weights: Mapping[int, Sequence[Tensor]]) -> Tensor:
        """`[c]`, each row with its own parameters in the trained block."""
        model, last = self.model, self.model.n_layers - 1
        texts = [self.texts[fact] for fact in batch.labels]
        keep = kept(texts)
        here = keep if self.layer == last else None
        out = torch.cat([self._trained_block(fact, weights[fact], here) for fact in batch.labels])
        if self.layer < last:
            out = batch.resume(self.layer + 1, out, last + 1, keep=keep)
        return predictions(model, texts, out).losses()

    def _trained_block(self, fact: int, weights: Sequence[Tensor], keep: int | None) -> Tensor:
        """Hidden states that leave the trained block with these parameters, `[1, keep or n, d_model]`."""
        batch = self.alone[fact]
        rounded = {
            name: wide.to(stored.dtype) for name, wide, stored in zip(self.names, weights, self.weights, strict=True)
        }
        block = self.model.blocks[self.layer]
        return with_weights(block, rounded, lambda: batch.step(self.layer, batch.states, keep=keep))
