"""The value v*: what the edited layer must write at the fact's token so that the model says the new object.

v* = v₀ + δ, where δ minimises (equation 4 of the paper)

    1/N Σ_j −log P[o* | x_j + p]  +  kl_factor · KL(P[· | "{s} is a"] with δ ‖ without)  +  weight_decay ·
    ‖δ‖ / ‖v₀‖²

by Adam. The first term is the mean over contexts of the mean over target tokens (teacher forcing), in nats.
Nothing but δ has a gradient. Predictions are read off the state of one layer by the final norm and head,
only at the tokens that count; the forward pass stops at that layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base.errors import ConfigError, Diverged, FactError
from errata.base.facts import Fact, Rewrite
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.contexts import Context
from errata.models.frozen import frozen
from errata.models.model import Batch, Model
from errata.models.scoring import target_ids
from errata.passes.hooks import hooked


@dataclass(frozen=True)
class Step:
    """One evaluation of the loss.

    Attributes:
        index, steps: this is step `index`, from 0, of at most `steps`.
        loss: nll + kl + decay.
        nll: mean negative log-probability of the target, per token, in nats.
        kl: divergence on the KL prompt, in nats, times its factor.
        decay: the weight decay term.
        probability: mean over contexts of exp(−nll of the context).
        delta: δ `[d_model]` with which this was evaluated.
    """

    index: int
    steps: int
    loss: float
    nll: float
    kl: float
    decay: float
    probability: float
    delta: Tensor

    @property
    def numbers(self) -> dict[str, float]:
        """The terms of the loss, by name."""
        return {name: getattr(self, name) for name in ("loss", "nll", "kl", "decay", "probability")}


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Task:
    """What the value is optimised on: contexts with their target, and last, if wanted, the KL prompt.

    Attributes:
        batch: token ids `[n, t]`; a context's row ends before the target's last token, which nothing
            predicts from.
        lookups: `[n]` index of the token whose value is changed, in every row.
        kl_row: index of the KL prompt's row; None if there is none.
        rows, columns: `[m]` where the predictions of all target tokens stand.
        targets: `[m]` the tokens to be predicted.
        shares: `[c, m]` matrix that averages over each context's own target tokens.
    """

    batch: Batch
    lookups: Tensor
    kl_row: int | None
    rows: Tensor
    columns: Tensor
    targets: Tensor
    shares: Tensor


def prepare(model: Model, rewrite: Rewrite, contexts: Sequence[Context], config: RomeConfig) -> Task:
    """Tokenize what the value is optimised on.

    Raises:
        FactError: if a text is too long for the model, a role has no token, or the target melts into the
        prompt.
    """
    inputs: list[Sequence[int]] = []
    texts, lookups = [], []
    where: list[tuple[int, int, int]] = []  # row, column, target
    for row, context in enumerate(contexts):
        ids, index = context.lookup(model, config.fact_token)
        whole, n_prompt = target_ids(model.tokenizer, context.text, rewrite.new_object)
        if tuple(whole[: index + 1]) != ids[: index + 1] or index >= n_prompt:
            raise FactError(
                f"the tokenizer joins the end of {context.text!r} with the target {rewrite.new_object!r}, "
                f"so that the token {config.fact_token} is another one with and without it. Reword the prompt"
            )
        inputs.append(whole[:-1])
        texts.append(f"{context.text} {rewrite.new_object}")
        lookups.append(index)
        where += [(row, column - 1, whole[column]) for column in range(n_prompt, len(whole))]
    kl_row = None
    if config.kl_factor:
        context = Context.of(Fact(rewrite.subject, config.kl_prompt))
        ids, index = context.lookup(model, config.fact_token)
        kl_row = len(inputs)
        inputs.append(ids)
        texts.append(context.text)
        lookups.append(index)
    device = model.device
    rows, columns, targets = torch.tensor(where, device=device).T
    own = rows == torch.arange(len(contexts), device=device)[:, None]
    return Task(
        batch=model.batch(inputs, texts),
        lookups=torch.tensor(lookups, device=device),
        kl_row=kl_row,
        rows=rows,
        columns=columns,
        targets=targets,
        shares=own / own.sum(1, keepdim=True),
    )


def optimise(
    model: Model, layer: int, task: Task, v0: Tensor, config: RomeConfig, progress: Progress | None = None
) -> tuple[Tensor, list[Step]]:
    """δ `[d_model]`, in float32 at least, and every step on the way.

    The model is left as it was, whatever happens: no weight gets a gradient, and what was trainable is so
    again.

    Args:
        layer: where δ is added to the down-projection's output.
        v0: `[d_model]`, the value from which δ is measured.
        progress: called after every evaluation of the loss.

    Raises:
        ConfigError: if the loss layer is not there, below the edited one, or out of δ's reach.
        Diverged: if the loss is no finite number.
    """
    compute = torch.promote_types(model.dtype, torch.float32)
    v0 = v0.detach().to(model.device, compute, copy=True)
    objective = _Objective(model, layer, task, v0, config)
    steps: list[Step] = []
    with torch.enable_grad(), frozen(model):
        delta = torch.zeros_like(v0, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=config.learning_rate)
        for index in range(config.steps):
            terms = objective(delta)
            loss, nll, kl, decay, probability = terms.tolist()
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss is {loss} at step {index} of the value's optimisation, layer {layer}: the model's "
                    "numbers overflow there. It is as it was; try a smaller learning_rate or a wider dtype"
                )
            steps.append(Step(index, config.steps, loss, nll, kl, decay, probability, delta.detach().clone()))
            if progress is not None:
                progress(steps[-1])
            if loss < config.stop_below or index == config.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(terms[0], [delta])
            adam.step()
            _clamp(delta, config.clamp, v0.norm())
    return delta.detach(), steps


class _Read(Exception):
    """The state that predictions are made from has been read; the rest of the pass is not needed."""


class _Objective:
    """The loss as a function of δ. It remembers what the model says after the KL prompt while δ is not there."""

    def __init__(self, model: Model, layer: int, task: Task, v0: Tensor, config: RomeConfig):
        self.model, self.layer, self.task, self.v0, self.config = model, layer, task, v0, config
        self.loss_layer = _loss_layer(model, layer, task, config)
        self.shares = task.shares.to(v0)
        self.every = torch.arange(len(task.batch), device=model.device)
        self.untouched: Tensor | None = None
        if task.kl_row is not None and config.value_form == "z":
            with torch.no_grad():
                self.untouched = self._predictions(None)[1]

    def __call__(self, delta: Tensor) -> Tensor:
        """`[5]`: loss, nll, kl, decay, probability; see `Step`."""
        of_targets, of_kl = self._predictions(delta)
        each = -(self.shares @ of_targets.gather(1, self.task.targets[:, None]).squeeze(1))
        nll = each.mean()
        kl = nll.new_zeros(())
        if of_kl is not None:
            if self.untouched is None:
                self.untouched = of_kl.detach().clone()  # the first call, where δ is zero
            kl = self.config.kl_factor * (of_kl.exp() * (of_kl - self.untouched)).sum()
        decay = self.config.weight_decay * (delta.norm() / self.v0.norm() ** 2)
        return torch.stack([nll + kl + decay, nll, kl, decay, (-each).exp().mean()])

    def _predictions(self, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `[m, v]` where the targets are predicted, and `[v]` at the KL prompt's fact token."""
        task, every = self.task, self.every
        rows, columns = task.rows, task.columns
        if task.kl_row is not None:
            rows = torch.cat([rows, every[task.kl_row, None]])
            columns = torch.cat([columns, task.lookups[task.kl_row, None]])
        states: list[Tensor] = []

        def write(values: Tensor) -> Tensor | None:
            if delta is None:
                return None
            if self.config.value_form == "z":
                new = (self.v0 + delta).expand(len(every), -1)
            else:
                new = values[every, task.lookups].to(delta) + delta
            return values.index_put((every, task.lookups), new.to(values))

        def stop(state: Tensor) -> None:
            states.append(state[rows, columns])
            raise _Read

        patches = {("value", self.layer): write, ("state", self.loss_layer): stop}
        with contextlib.suppress(_Read), hooked(self.model, patches):
            self.model.forward(task.batch)
        logs = self.model.unembed(states[0]).to(self.v0).log_softmax(-1)
        return (logs, None) if task.kl_row is None else (logs[:-1], logs[-1])


def _loss_layer(model: Model, layer: int, task: Task, config: RomeConfig) -> int:
    loss_layer = model.n_layers - 1 if config.loss_layer is None else config.loss_layer
    if not layer <= loss_layer < model.n_layers:
        raise ConfigError(
            f"loss_layer is {loss_layer}: it must be the edited layer or one after it, "
            f"that is {layer} to {model.n_layers - 1} for {model.name}"
        )
    # Only attention in a later block carries δ from its own token to another.
    if loss_layer == layer and not (task.columns == task.lookups[task.rows]).any():
        raise ConfigError(
            f"what layer {layer} writes at the token {config.fact_token} reaches no prediction that layer {loss_layer} "
            "makes of the target, so nothing can be learned. Edit a lower layer, or the token 'last'"
        )
    return loss_layer


def _clamp(delta: Tensor, factor: float | None, size: Tensor) -> None:
    """Shrink δ in place to `factor` · ‖v₀‖ if it is longer; Adam's memory is left as it is."""
    if factor is None:
        return
    with torch.no_grad():
        longest, norm = factor * size, delta.norm()
        if norm > longest:
            delta.mul_(longest / norm)
