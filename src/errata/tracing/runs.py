"""Clean, corrupted and restored runs of facts of one length.

Clean and corrupted runs are recorded once; restored runs are replayed from them, token by token (`sweep`), in batches
that fit into the memory given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errata.base import budgets
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, Diverged
from errata.models.model import Model
from errata.passes.replay import Recording, engine_of, record
from errata.tracing.config import TraceConfig
from errata.tracing.noise import Disturbance
from errata.tracing.result import CausalTrace, token_roles
from errata.tracing.sweep import SEVERED, plan, sweep
from errata.tracing.tokenized import TokenizedFact

Progress = Callable[[int, int], None]  # (sites or facts done, sites or facts in all)

_ROWS_WAITING = 1024  # before the head reads them together


def checked_memory(memory: int | None, model: Model) -> int:
    """Bytes that runs may use; one clean and one corrupted row are always allowed.

    Raises:
        ConfigError: if they are fewer than one.
    """
    if memory is not None and memory < 1:
        raise ConfigError(f"memory is {memory}: give the bytes that runs may take, or None to have them measured")
    return memory or min(budgets.enough_memory(model.device), budgets.free_memory(*model.devices) // 2)


def rows_at_once(model: Model, length: int, config: TraceConfig, memory: int) -> int:
    """Number of rows of `length` tokens that are recorded together: at least two, a clean and a corrupted one."""
    # A state, keys and values for each layer, and the outputs that are restored or held.
    streams = 3 + len(_kept_parts(config))
    per_row = length * model.n_layers * streams * model.d_model * model.dtype.itemsize
    return max(2, memory // 2 // per_row)


@without_autocast
@torch.no_grad()
def trace_together(
    model: Model,
    facts: Sequence[TokenizedFact],
    config: TraceConfig,
    disturbances: Sequence[Disturbance],
    memory: int,
    fingerprint: str,
    progress: Progress | None = None,
) -> list[CausalTrace]:
    """Trace facts whose rows have the same length in tokens. `disturbances` are each fact's own.

    `fingerprint` is that of the model's weights, which is not taken anew for every few facts.

    Raises:
        ValueError: if the lengths differ.
        Diverged: if the model gives probabilities that are not numbers.
    """
    runs = _Runs(model, facts, config, memory)
    draws = config.draws
    noise = [
        disturbance.draw(draws * config.samples, len(runs.corrupted_tokens(fact)), config.seed).unflatten(
            0, (draws, -1)
        )
        for fact, disturbance in zip(facts, disturbances, strict=True)
    ]
    rows = rows_at_once(model, runs.length, config, memory) // len(facts)
    share = max(1, min(config.samples, (rows - 1) // draws))
    pieces = range(0, config.samples, share)
    for number, begin in enumerate(pieces):
        samples = [each[:, begin : begin + share] for each in noise]

        def tell(done: int, of: int, number: int = number) -> None:
            if progress:
                progress(number * of + done, len(pieces) * of)

        runs.add(samples, config.corruption.replace, tell)
    common = {
        "parts": list(config.parts),
        "samples": config.samples,
        "window": config.width(model.n_layers),
        "window_edges": config.window_edges,
        **({"severed_noise": config.severed_noise} if draws > 1 else {}),
        "seed": config.seed,
        "answer": config.answer,
        "scored": config.scored,
        "tokens": list(config.tokens) if config.tokens else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.hf.config._attn_implementation,
        **({"engine": "plain"} if engine_of(model) == "plain" else {}),
    }
    return [
        CausalTrace(
            fact=fact.fact,
            answer=str(model.tokenizer.decode(runs.targets[index].tolist())),
            tokens=fact.span.tokens,
            subject=(fact.span.first, fact.span.last),
            clean=float(runs.clean[index]),
            corrupted=float(runs.corrupted[index]) / config.samples,
            restored={part: values[index] / config.samples for part, values in runs.restored.items()},
            settings={**disturbance.settings, **common},
            model=model.name,
            known=None if fact.begins is None else bool(runs.said[index] == fact.begins),
            fingerprint=fingerprint,
        )
        for index, (fact, disturbance) in enumerate(zip(facts, disturbances, strict=True))
    ]


@dataclass(frozen=True)
class _Ended:
    """Restored runs of a token, before the head.

    Attributes:
        token: which.
        traced: indexes of the facts.
        variants: (part, layers of the sites), each of rows for every fact and sample.
        states: the last block's `[rows, scored, d_model]`.
        targets: `[rows, scored]`.
    """

    token: int
    traced: Sequence[int]
    variants: Sequence[tuple[str, tuple[int, ...]]]
    states: Tensor
    targets: Tensor


class _Runs:
    """Clean, corrupted and restored runs of facts of one length, summed over samples of noise.

    Attributes:
        length: tokens in every row.
        clean: P[o] of each fact.
        corrupted: P*[o] of each fact, summed over samples.
        restored: for each part P*,clean[o] `[facts, tokens, layers]`, summed over samples.
        targets: token ids of the answers `[facts, scored]`.
        said: each fact's most probable next token.
    """

    def __init__(self, model: Model, facts: Sequence[TokenizedFact], config: TraceConfig, memory: int):
        self.model, self.facts, self.config, self.memory = model, facts, config, memory
        lengths = {(len(fact.ids), len(fact.span.ids)) for fact in facts}
        if len(lengths) != 1:
            raise ValueError(f"facts that are traced together have one length, not {sorted(lengths)}")
        ((self.length, self.prompt),) = lengths
        self.groups = plan(config.parts, model.n_layers, config.width(model.n_layers), config.window_edges)
        self.clean = torch.zeros(len(facts), dtype=torch.float64)
        self.corrupted = torch.zeros(len(facts), dtype=torch.float64)
        shape = (len(facts), self.prompt, model.n_layers)
        self.restored: dict[str, np.ndarray] = {part: np.zeros(shape) for part in config.parts}
        self.targets = torch.empty(0)
        self.said = torch.empty(0)

    @property
    def scored(self) -> int:
        """Number of positions at the end that predict the answer."""
        return self.length - self.prompt + 1

    def corrupted_tokens(self, fact: TokenizedFact) -> range:
        """The corrupted tokens of a fact."""
        return range(fact.span.first, min(fact.span.last + 1 + self.config.corruption.after, self.prompt))

    def add(self, noise: Sequence[Tensor], replace: bool, tell: Progress) -> None:
        """Run all of it with some samples of noise, `[draws, samples, tokens, d_model]` for each fact."""
        count, (draws, samples) = len(self.facts), noise[0].shape[:2]
        owner = torch.arange(count).repeat_interleave(samples)  # of each corrupted row: its fact
        ids = torch.tensor([fact.ids for fact in self.facts])
        batch = self.model.batch(torch.cat([ids, *[ids[owner]] * draws]).tolist())

        def corrupt(embedding: Tensor) -> Tensor:
            disturbed = embedding.clone()
            for index, (fact, its_noise) in enumerate(zip(self.facts, noise, strict=True)):
                tokens = self.corrupted_tokens(fact)
                for draw, drawn in enumerate(its_noise):
                    first = count + (draw * count + index) * samples
                    place = disturbed[first : first + samples, tokens.start : tokens.stop]
                    place.copy_(drawn) if replace else place.add_(drawn.to(place))
            return disturbed

        keep = [(part, layer) for part in _kept_parts(self.config) for layer in range(self.model.n_layers)]
        recording = record(self.model, batch, {("embedding", 0): corrupt}, keep)
        last = recording.states[self.model.n_layers][:, -self.scored :]
        if not len(self.targets):
            self._read_answers(last[:count])
        found = self._probabilities(last, torch.cat([self.targets, *[self.targets[owner]] * draws]))
        self.clean = found[:count]
        corrupted = found[count:].reshape(draws, count, samples).sum(-1)
        self.corrupted += corrupted[0]
        bases = {part: corrupted[-1 if part in SEVERED else 0].numpy() for part in self.restored}
        self._restore(recording, owner, bases, tell)

    def _read_answers(self, clean: Tensor) -> None:
        """Set next tokens and scored answers from the last states `[facts, scored, d_model]` of clean runs."""
        self.said = self.model.unembed(clean[:, 0]).argmax(-1).cpu()
        own = [(int(token),) for token in self.said]
        self.targets = torch.tensor([fact.target or mine for fact, mine in zip(self.facts, own, strict=True)])

    def _restore(self, recording: Recording, owner: Tensor, bases: Mapping[str, np.ndarray], tell: Progress) -> None:
        """Add restored runs, token by token.

        Args:
            recording: the recorded clean and corrupted runs.
            owner: of each corrupted row of one draw: its fact.
            bases: for each part, probabilities of the facts' answers where nothing is restored, summed over samples.
            tell: is told of progress.
        """
        layers = self.model.n_layers
        roles = [token_roles(self.prompt, fact.span.first, fact.span.last) for fact in self.facts]
        todo: list[tuple[int, list[int]]] = []
        for token in range(self.prompt):
            traced = []
            for index, fact in enumerate(self.facts):
                wanted = self.config.tokens is None or roles[index][token] in self.config.tokens
                untouched = token < fact.span.first
                for part, values in self.restored.items():
                    values[index, token] += bases[part][index] if wanted or untouched else np.nan
                if wanted and not untouched:
                    traced.append(index)
            todo.append((token, traced))
        sites = sum(len(traced) for _, traced in todo) * len(self.config.parts) * layers
        done, ended = 0, []
        for token, traced in todo:
            if traced:
                rows = torch.isin(owner, torch.tensor(traced)).nonzero()[:, 0]
                ended += self._sweep(recording, token, rows, owner[rows], traced)
            done += len(traced) * len(self.config.parts) * layers
            if sum(len(each.states) for each in ended) >= _ROWS_WAITING or token == self.prompt - 1:
                self._read_restored(ended, bases)
                ended = []
            tell(done, sites)

    def _sweep(
        self, recording: Recording, token: int, rows: Tensor, owner: Tensor, traced: Sequence[int]
    ) -> list[_Ended]:
        """Restored runs of one token of some facts; `rows` count corrupted runs alone, `owner` are their facts."""
        device, count = self.model.device, len(self.facts)
        # What the last block writes at a token that is not scored reaches nothing.
        reaching = self.model.n_layers if token >= self.prompt - 1 else self.model.n_layers - 1
        redrawn = self.config.draws > 1
        groups = [group for group in self.groups if group.layer < reaching or (redrawn and group.part in SEVERED)]
        corrupted = (rows + count).to(device)
        again = corrupted + (len(recording.states[0]) - count) // 2 if redrawn else None
        ended = []
        numbers = len(rows) * (self.length - token) * self.model.d_model  # of one restored variant
        # The states of a sweep are there thrice when rows join.
        most = self.memory // 4 // 3 // self.model.dtype.itemsize
        for chosen in budgets.groups([len(group.ends) * numbers for group in groups], most):
            some = [groups[i] for i in chosen]
            variants, states = sweep(
                recording, some, token, corrupted, owner.to(device), scored=self.scored, redrawn=again
            )
            ended.append(
                _Ended(token, traced, variants, states.flatten(0, 1), self.targets[owner].repeat(len(variants), 1))
            )
        return ended

    def _read_restored(self, ended: Sequence[_Ended], bases: Mapping[str, np.ndarray]) -> None:
        """Put probabilities of restored runs in the place of `bases`. All at once: the head is large."""
        if not ended:
            return
        states, targets = torch.cat([e.states for e in ended]), torch.cat([e.targets for e in ended])
        found = self._probabilities(states, targets).split([len(e.states) for e in ended])
        for each, values in zip(ended, found, strict=True):
            sums = values.reshape(len(each.variants), len(each.traced), -1).sum(-1).numpy()
            for (part, layers), of_variant in zip(each.variants, sums, strict=True):
                for layer in layers:
                    self.restored[part][each.traced, each.token, layer] += of_variant - bases[part][each.traced]

    def _probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """Probabilities of answers `[rows, scored]` after last states `[rows, scored, d_model]`.

        Float64 `[rows]`, on the CPU.

        Raises:
            Diverged: if one is not a number.
        """
        # Logits and their softmax, in four bytes or eight.
        share = max(1, budgets.predictions(self.model.vocab_size, self.memory // 4 // 8) // self.scored)
        found = []
        for some, wanted in zip(states.split(share), targets.to(states.device).split(share), strict=True):
            logits = self.model.unembed(some)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found.append(wide.softmax(-1).gather(-1, wanted[..., None])[..., 0].cpu().double().prod(-1))
        whole = torch.cat(found)
        if not bool(whole.isfinite().all()):
            raise Diverged(
                f"{self.model.name} gives probabilities that are not numbers in {self.model.dtype}, so nothing can be "
                "traced: load it with dtype 'float32' or 'bfloat16'"
            )
        return whole


def _kept_parts(config: TraceConfig) -> list[str]:
    """The modules whose outputs a sweep puts in places."""
    kept = {name for name in ("mlp", "attention") if any(part.endswith(name) for part in config.parts)}
    return sorted(kept | ({"attention"} if "mlp" in config.parts else set()))
