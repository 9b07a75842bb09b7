"""Side effects of an edit: how probable the new object is after it, and how far other predictions move.

An edit that makes the model say its fact may also make it say nonsense (a *disabling* edit). Therefore the model's
predictions on unrelated texts, by default samples of its own, are compared before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, FactError
from errata.base.facts import Fact, Rewrite
from errata.base.seeds import derive
from errata.edits.edit import Edit
from errata.metrics.edited import run_edited
from errata.models.generation import generate, start_text
from errata.models.model import Model
from errata.models.scoring import score
from errata.passes.packing import PackedSequence

SAMPLED_TEXTS, SAMPLED_TOKENS = 4, 24
ESSENCE = "{} is a"
MAX_DRIFT = 1.0  # nats per token


@dataclass(frozen=True)
class SideEffects:
    """Side effects of an edit.

    Attributes:
        probability_before, probability_after: probability of the new object (all tokens) after the bare prompt.
        essence_kl: divergence of what is said after "{subject} is a", KL(before ‖ after), in nats.
        drift: that divergence on reference texts, mean over tokens, in nats.
        perplexity_before, perplexity_after: perplexity of the reference texts.
        max_drift: the bound above which the edit counts as disabling.
    """

    probability_before: float
    probability_after: float
    essence_kl: float
    drift: float
    perplexity_before: float
    perplexity_after: float
    max_drift: float

    @property
    def disabling(self) -> bool:
        """Whether the edit disables the model: its drift exceeds the bound, or is not a number."""
        return not self.drift <= self.max_drift

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, with `disabling`; None for numbers that are not finite."""
        numbers = {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}
        return {**numbers, "disabling": self.disabling}


@dataclass(frozen=True)
class FactPredictions:
    """Predictions of a model about a fact.

    Attributes:
        probability: probability of the new object after the bare prompt.
        essence: log-probabilities of what follows the essence prompt, `[v]`.
    """

    probability: float
    essence: Tensor


@dataclass(frozen=True)
class TextPredictions:
    """Predictions of a model on reference texts.

    Attributes:
        log_probabilities: log-probabilities of every next token, `[t, v]`, all texts one after the other.
        nll: negative log-probability of the texts' own next tokens, `[t]`, in nats.
    """

    log_probabilities: Tensor
    nll: Tensor


@without_autocast
def predict_fact(model: Model, rewrite: Rewrite, essence: str) -> FactPredictions:
    """Predictions of the current model about a fact.

    Args:
        rewrite: the fact and its new object, whose probability is measured after the prompt.
        essence: a prompt about the subject's essence, with `{}` for the subject, such as "{} is a".

    Raises:
        FactError: if a text is too long for the model.
    """
    own = _log_probabilities(model, [Fact(rewrite.subject, essence).text])[0]
    return FactPredictions(
        math.exp(score(model, [rewrite.text], [rewrite.new_object], [rewrite.separator])[0].total), own[-1]
    )


@without_autocast
def predict_texts(model: Model, texts: Sequence[str]) -> TextPredictions:
    """Predictions of the current model on texts.

    Raises:
        FactError: if a text is too long for the model, or none has two tokens.
    """
    rows = [model.ids(text) for text in texts]
    if max(map(len, rows), default=0) < 2:
        raise FactError(
            "no reference text has two tokens, so there is nothing that the model could foretell: give longer ones"
        )
    return _text_predictions(list(zip(rows, _log_probabilities(model, texts), strict=True)))


def sampled_texts(model: Model, seed: int) -> tuple[str, ...]:
    """Reference texts sampled from the model itself.

    Raises:
        ConfigError: if its tokenizer has no token to start from.
    """
    start = start_text(model)
    texts = generate(model, [start] * SAMPLED_TEXTS, SAMPLED_TOKENS, top_k=None, seed=derive(seed, "probes"))
    kept = tuple(text for text in texts if len(model.ids(text)) > 1)
    if not kept:
        raise ConfigError(
            f"{model.name} ends every text that it begins at once, so there are no texts of its own to measure drift "
            "on. Give some: RomeConfig(probes=(...))"
        )
    return kept


def compare(
    of_fact: tuple[FactPredictions, FactPredictions],
    of_texts: tuple[TextPredictions, TextPredictions],
    max_drift: float,
) -> SideEffects:
    """Side effects of an edit, from predictions before and after it."""
    return SideEffects(
        probability_before=of_fact[0].probability,
        probability_after=of_fact[1].probability,
        essence_kl=float(_divergence(of_fact[0].essence, of_fact[1].essence)),
        drift=float(_divergence(of_texts[0].log_probabilities, of_texts[1].log_probabilities).mean()),
        perplexity_before=float(of_texts[0].nll.mean().exp()),
        perplexity_after=float(of_texts[1].nll.mean().exp()),
        max_drift=max_drift,
    )


@without_autocast
def side_effects_of(
    model: Model,
    rewrites: Sequence[Rewrite],
    edits: Sequence[Edit],
    probabilities: Sequence[tuple[float, float]],
    *,
    texts: Sequence[str],
    before: TextPredictions,
    essence: str = ESSENCE,
    max_drift: float = MAX_DRIFT,
) -> list[SideEffects]:
    """Side effects of many edits, each measured alone on the model, which is left unchanged.

    Args:
        model: without the edits.
        rewrites, edits: which edit is of which rewrite.
        probabilities: of each rewrite's new object after its bare prompt, before and after.
        texts: reference texts, on which drift is measured; before: `predict_texts` of them on the model.
        essence: as of `predict_fact`.
        max_drift: the bound above which an edit counts as disabling, in nats per token.

    Raises:
        FactError: if a text is too long for the model.
    """
    if not edits:
        return []
    essences = [Fact(rewrite.subject, essence).text for rewrite in rewrites]
    sequences = [PackedSequence(tuple(model.ids(text))) for text in [*essences, *(list(texts) * len(edits))]]
    # Without and with the edit, states by sequence; of reference texts only with it.
    kept: list[dict[int, Tensor]] = [{}, {}]
    owners = [*range(len(edits)), *(i for i in range(len(edits)) for _ in texts)]
    with_edits = [edits[i] for i in owners]
    with closing(run_edited(model, sequences, [[None] * len(sequences), with_edits])) as parts:
        for variant, batch, hidden in parts:
            for place, member in enumerate(batch.members):
                if variant or member < len(edits):
                    tokens = range(len(sequences[member].prefix))
                    kept[variant][member] = batch.pick(hidden, [(place, None, token) for token in tokens])
    found = []
    for i, pair in enumerate(probabilities):
        own, after = (_next_token(model, states[i][-1]) for states in kept)
        first = len(edits) + i * len(texts)
        rows = [(sequences[j].prefix, _next_token(model, kept[1][j])) for j in range(first, first + len(texts))]
        of_fact = FactPredictions(pair[0], own), FactPredictions(pair[1], after)
        found.append(compare(of_fact, (before, _text_predictions(rows)), max_drift))
    return found


def _next_token(model: Model, states: Tensor) -> Tensor:
    """Log-probabilities of what follows states of the last block, in float32 at least."""
    with torch.no_grad():
        return model.unembed(states).to(torch.promote_types(model.dtype, torch.float32)).log_softmax(-1)


def _text_predictions(rows: Sequence[tuple[Sequence[int], Tensor]]) -> TextPredictions:
    """Predictions on texts, from their token ids and log-probabilities `[t, v]`."""
    own = [
        -logs[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long, device=logs.device)[:, None])[:, 0]
        for ids, logs in rows
    ]
    return TextPredictions(torch.cat([logs[:-1] for _, logs in rows]), torch.cat(own))


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) over the last axis, of log-probabilities."""
    return (before.exp() * (before - after)).sum(-1).double()


@torch.no_grad()
def _log_probabilities(model: Model, texts: Sequence[str]) -> list[Tensor]:
    """Log-probabilities of each text, `[t, v]`, in float32 or wider."""
    batch = model.encode(texts)
    logs = model.forward(batch).to(torch.promote_types(model.dtype, torch.float32)).log_softmax(-1)
    return [row[:length] for row, length in zip(logs, (batch.last + 1).tolist(), strict=True)]
