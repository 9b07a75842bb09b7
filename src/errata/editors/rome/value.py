"""The value v*, which makes the model say the new object when the edited layer writes it at the fact's token.

v* = v₀ + δ, where δ minimises (equation 4 of the paper)

    1/N Σ_j −log P[o* | x_j + p]  +  kl_factor · KL(P[· | "{s} is a"] with δ ‖ without)  +  weight decay

by Adam. The first term is the mean over contexts of the mean over target tokens (teacher forcing), in nats. Only δ has
a gradient.

Each step computes only what depends on δ: the fact's token and the ones after it in the blocks above the edited one,
and the predictions that a target or the divergence needs. The texts of many facts run in one batch; each fact has its
own δ, the same as if it were alone, up to rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from errata.base.errors import ConfigError, Diverged, ErrataError
from errata.editors.editor import Progress, Step
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.key import Recorded
from errata.editors.rome.texts import Text
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.passes.suffixes import SuffixBatch


@dataclass(frozen=True, kw_only=True)
class RomeStep(Step):
    """One evaluation of the loss of one fact.

    Attributes:
        loss: nll + kl + decay.
        nll: mean negative log-probability of the target, per token, in nats.
        kl: divergence on the KL prompt, times its factor.
        decay: the weight decay term.
        probability: mean over contexts of exp(−nll of the context).
        delta: δ `[d_model]` with which this was evaluated.
    """

    nll: float
    kl: float
    decay: float
    probability: float
    delta: Tensor

    @property
    def numbers(self) -> dict[str, float]:
        """The terms of the loss, by name."""
        return {name: getattr(self, name) for name in ("loss", "nll", "kl", "decay", "probability")}


@dataclass(frozen=True)
class Found:
    """δ `[d_model]` of one fact, in float32 at least, and every step on the way."""

    delta: Tensor
    steps: tuple[RomeStep, ...]


def optimise(
    model: Model,
    layer: int,
    recorded: Recorded,
    owners: Sequence[int],
    v0: Tensor,
    config: RomeConfig,
    progress: Progress | None = None,
    served: Sequence[int] | None = None,
) -> list[Found | ErrataError]:
    """The δ of each fact, or its error.

    The model is left as it was, whatever happens: no weight gets a gradient, and what was trainable is so again.

    Args:
        layer: where δ is added to the down-projection's output.
        recorded: the recorded texts of the facts, with the model in its current state.
        owners: the fact of each text.
        v0: `[facts, d_model]`, the values from which δ is measured.
        progress: called after every evaluation of a fact's loss.
        served: how many rewrites each value serves; None: one each. A value that serves n has more steps, and its
            clamp is √n times as wide: what n rewrites ask for adds up like vectors of different directions.
    """
    served = [1] * len(v0) if served is None else list(served)
    limits = [config.steps if n == 1 else config.joint_steps or 2 * config.steps for n in served]
    compute = torch.promote_types(model.dtype, torch.float32)
    v0 = v0.detach().to(model.device, compute, copy=True)
    steps: list[list[RomeStep]] = [[] for _ in v0]
    failed: dict[int, ErrataError]
    running = set(range(len(v0)))
    with torch.enable_grad(), frozen(model), _quick_attention(model):
        objective = _Objective(model, layer, recorded, owners, v0, config)
        failed = {fact: _out_of_reach(model, layer, config) for fact in running - objective.reached()}
        running -= set(failed)
        deltas = [torch.zeros_like(each, requires_grad=True) for each in v0]
        adam = torch.optim.Adam(deltas, lr=config.learning_rate)
        for index in range(max(limits, default=0) if running else 0):
            at_end = {fact for fact in running if index == limits[fact] - 1}
            terms, gradients = objective(
                torch.stack([d.detach() for d in deltas]), running, differentiate=at_end != running
            )
            for fact, (loss, nll, kl, decay, probability) in enumerate(terms.tolist()):
                if fact not in running:
                    continue
                if not math.isfinite(loss):
                    failed[fact] = _diverged(loss, index, layer)
                    running.discard(fact)
                    continue
                step = RomeStep(
                    index,
                    limits[fact],
                    loss,
                    fact,
                    len(v0),
                    nll=nll,
                    kl=kl,
                    decay=decay,
                    probability=probability,
                    delta=deltas[fact].detach().clone(),
                )
                steps[fact].append(step)
                if progress is not None:
                    progress(step)
                if loss < config.stop_below or fact in at_end:
                    running.discard(fact)
            if not running:
                break
            for fact, delta in enumerate(deltas):  # Adam leaves alone what has no gradient
                delta.grad = gradients[fact] if fact in running else None
            adam.step()
            for fact in running:
                _clamp(deltas[fact], config.clamp, v0[fact].norm() * math.sqrt(served[fact]))
    return [
        failed[fact] if fact in failed else Found(delta.detach(), tuple(steps[fact]))
        for fact, delta in enumerate(deltas)
    ]


def _quick_attention(model: Model) -> contextlib.AbstractContextManager[None]:
    """On a CPU the fused attention of 16-bit numbers takes longer backwards over few tokens than all products do."""
    if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _diverged(loss: float, index: int, layer: int) -> Diverged:
    return Diverged(
        f"the loss is {loss} at step {index} of the value's optimisation, layer {layer}: the model's "
        "numbers overflow there. It is as it was; try a smaller learning_rate or a wider dtype"
    )


def loss_layer_of(model: Model, layer: int, texts: Sequence[Text], config: RomeConfig) -> int:
    """The layer whose state predictions are read from.

    Raises:
        ConfigError: if it is not there, below the edited one, or out of δ's reach.
    """
    loss_layer = model.n_layers - 1 if config.loss_layer is None else config.loss_layer
    if not layer <= loss_layer < model.n_layers:
        raise ConfigError(
            f"loss_layer is {loss_layer}: it must be the edited layer or one after it, "
            f"that is {layer} to {model.n_layers - 1} for {model.name}"
        )
    # Only attention in a later block carries δ from its own token to another.
    reached = any(text.kind == "context" and len(text.ids) - text.lookup <= len(text.targets) for text in texts)
    if loss_layer == layer and not reached:
        raise _out_of_reach(model, layer, config)
    return loss_layer


def _out_of_reach(model: Model, layer: int, config: RomeConfig) -> ConfigError:
    loss_layer = model.n_layers - 1 if config.loss_layer is None else config.loss_layer
    return ConfigError(
        f"what layer {layer} writes at the token {config.fact_token} reaches no prediction that layer {loss_layer} "
        "makes of the target, so nothing can be learned. Edit a lower layer, or the token 'last'"
    )


class _Objective:
    """The loss of every fact as a function of its δ. It stores the predictions on the KL prompts without δ."""

    def __init__(
        self, model: Model, layer: int, recorded: Recorded, owners: Sequence[int], v0: Tensor, config: RomeConfig
    ):
        self.model, self.layer, self.recorded, self.v0, self.config = model, layer, recorded, v0, config
        self.texts = recorded.texts
        self.owners = torch.tensor(owners, device=model.device)
        contexts = [owner for text, owner in zip(self.texts, owners, strict=True) if text.kind == "context"]
        self.contexts = torch.bincount(torch.tensor(contexts, device=model.device), minlength=len(v0)).to(v0)
        self.untouched: dict[int, Tensor] = {}
        if config.value_form == "z":  # else the first call, with no δ yet, tells
            with torch.no_grad():
                kl = {i for i, text in enumerate(self.texts) if text.kind == "kl"}
                for batch in self.recorded.after.micro_batches(kl):
                    logits, _, _ = self._predictions(batch, None)
                    self.untouched.update(zip(batch.labels, logits.log_softmax(-1), strict=True))

    def reached(self) -> set[int]:
        """The facts whose δ can affect some prediction of their target."""
        found: set[int] = set()
        contexts = {i for i, text in enumerate(self.texts) if text.kind == "context"}
        for batch in self.recorded.after.micro_batches(contexts):
            heard = batch.reached(self.layer + 1, self.recorded.loss_layer + 1)
            for row, i in enumerate(batch.labels):
                if heard[row, -len(self.texts[i].targets) :].any():
                    found.add(int(self.owners[i]))
        return found

    def __call__(self, deltas: Tensor, facts: set[int], differentiate: bool) -> tuple[Tensor, Tensor]:
        """Terms `[facts, 5]` (loss, nll, kl, decay, probability; see `RomeStep`) and ∂loss/∂δ `[facts, d_model]`.

        Facts that are not asked for have numbers that mean nothing.
        """
        deltas = deltas.requires_grad_(differentiate)
        variable = self.v0 + deltas if self.config.value_form == "z" else deltas
        decay = self.v0.new_zeros(len(deltas))
        gradients = torch.zeros_like(deltas)
        if self.config.decay == "loss":
            decay = self.config.weight_decay * deltas.norm(dim=1) / self.v0.norm(dim=1) ** 2
            if differentiate:
                gradients += torch.autograd.grad(decay.sum(), deltas)[0]
        else:  # as Adam's own: of the variable's square, felt by the gradient alone
            gradients += self.config.weight_decay * variable.detach()
        nll, kl, probability = (torch.zeros_like(decay) for _ in range(3))
        wanted = {i for i, owner in enumerate(self.owners.tolist()) if owner in facts}
        for batch in self.recorded.after.micro_batches(wanted):
            with torch.set_grad_enabled(differentiate):
                nll_each, owner, kl_each, kl_owner = self._losses(batch, deltas)
                share = nll_each / self.contexts[owner]
                if differentiate:
                    gradients += torch.autograd.grad(share.sum() + kl_each.sum(), deltas)[0]
            nll.index_add_(0, owner, share.detach())
            probability.index_add_(0, owner, (-nll_each.detach()).exp() / self.contexts[owner])
            kl.index_add_(0, kl_owner, kl_each.detach())
        return torch.stack([nll + kl + decay.detach(), nll, kl, decay.detach(), probability], 1), gradients

    def _losses(self, batch: SuffixBatch, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean negative log-probability and fact of each context of a batch; divergence and fact of each KL prompt."""
        logits, rows, targets = self._predictions(batch, deltas)
        owners = self.owners[list(batch.labels)]
        of_targets, of_kl = logits.split([len(targets), len(logits) - len(targets)])
        kl_rows = rows[len(targets) :]
        rows = rows[: len(targets)]
        each = functional.cross_entropy(of_targets, targets, reduction="none")
        counts = torch.bincount(rows, minlength=len(owners))
        sums = each.new_zeros(len(owners)).index_add(0, rows, each)
        has = counts > 0
        kl = each.new_zeros(0)
        if len(kl_rows):
            logs = of_kl.log_softmax(-1)
            labels = [batch.labels[row] for row in kl_rows.tolist()]
            for label, now in zip(labels, logs.detach(), strict=True):
                self.untouched.setdefault(label, now.clone())
            before = torch.stack([self.untouched[label] for label in labels])
            kl = self.config.kl_factor * (logs.exp() * (logs - before)).sum(1)
            if self.config.kl_reduction == "mean":
                kl = kl / logs.shape[1]
        return sums[has] / counts[has], owners[has], kl, owners[kl_rows]

    def _predictions(self, batch: SuffixBatch, deltas: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[m, v]` of all targets, then of KL prompts; the row that each is of `[m]`; the targets."""
        places, kl = [], []
        for row, i in enumerate(batch.labels):
            text = self.texts[i]
            if text.kind == "kl":
                kl.append((row, 1))
            places += [(row, len(text.targets) - j) for j in range(len(text.targets))]
        targets = [target for i in batch.labels for target in self.texts[i].targets]
        rows, from_end = torch.tensor(places + kl, device=self.model.device).T
        states = batch.states if deltas is None else self._changed(batch, deltas)
        out = batch.resume(self.layer + 1, states, self.recorded.loss_layer + 1, keep=int(from_end.max()))
        logits = self.model.unembed(out[rows, out.shape[1] - from_end]).to(self.v0)
        return logits, rows, torch.tensor(targets, dtype=torch.long, device=self.model.device)

    def _changed(self, batch: SuffixBatch, deltas: Tensor) -> Tensor:
        """Hidden states that leave the edited block, `[c, n, d_model]`, with δ at the fact's token."""
        labels, states = list(batch.labels), batch.states
        owners = self.owners[labels]
        values = self.recorded.keys.values[labels].to(deltas)
        new = (self.v0[owners] if self.config.value_form == "z" else values) + deltas[owners]
        before, after = (self.model.added(self.layer, each.to(self.model.dtype)).to(deltas) for each in (values, new))
        at_token = torch.arange(len(labels), device=states.device), states.shape[1] - batch.counts
        return states.index_put(at_token, (states[at_token] + after - before).to(states))


def _clamp(delta: Tensor, factor: float | None, size: Tensor) -> None:
    """Shrink δ in place to `factor` · ‖v₀‖ if it is longer; Adam's memory is left as it is."""
    if factor is None:
        return
    with torch.no_grad():
        longest, norm = factor * size, delta.norm()
        if norm > longest:
            delta.mul_(longest / norm)
