"""`layer="auto"`: a quick trace of the facts chooses the layer in the middle of the MLP's early site.

Causal tracing finds that the outputs of early MLPs at the subject's last token matter most (section 2 of the paper),
and ROME edits in the middle of those layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from errata.base.errors import ConfigError, FactError
from errata.base.facts import Fact
from errata.models.model import Model
from errata.tracing.config import TraceConfig
from errata.tracing.trace import trace

# Facts that are traced, of many.
_FACTS_TRACED = 10
# A total effect below this leaves nothing to find a site by.
_MIN_EFFECT = 0.01
# An indirect effect below this is weak evidence for a layer.
_WEAK_EFFECT = 0.02


class WeakSite(UserWarning):
    """Warning: a trace chose a layer although restoring its MLP outputs brings back little of the answer."""


@dataclass(frozen=True)
class LayerChoice:
    """The chosen layer, and the effects on which the choice is based.

    Attributes:
        layer: the layer.
        effects: indirect effect of the MLP's outputs around each layer at the subject's last token, mean over facts.
        facts: how many facts were traced.
    """

    layer: int
    effects: tuple[float, ...]
    facts: int

    @property
    def weak(self) -> bool:
        """Whether the chosen layer restores too little for the choice to be trusted."""
        return self.effects[self.layer] < _WEAK_EFFECT

    def __str__(self) -> str:
        of = "the fact" if self.facts == 1 else f"{self.facts} facts"
        points = f"{'only ' if self.weak else ''}{100 * self.effects[self.layer]:.1f} points"
        return (
            f"the middle of the MLP's early site by a trace of {of} (restoring MLP outputs around it at the subject's "
            f"last token brings back {points}{': weak evidence' if self.weak else ''})"
        )


def choose_layer(
    model: Model,
    facts: Sequence[Fact],
    samples: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LayerChoice:
    """Trace facts and choose the layer at the centre of those whose effect is at least half of the largest.

    The last layer is never chosen: nothing above it could carry what it writes to later tokens.

    Args:
        facts: of many, ten are traced. Their answers are what the model itself says; those that hardly depend on the
            subject do not count.
        samples: number of noise samples for each fact.
        progress: called with facts traced and in all.

    Raises:
        ConfigError: if the model has one layer only.
        FactError: if no fact can be traced, or the answer depends on the subject in none.
    """
    config = TraceConfig(parts=("mlp",), samples=samples, tokens=("subject_last",), seed=seed)
    if model.n_layers < 2:
        raise ConfigError(
            f"{model.name} has one layer, above which nothing could carry what it writes: there is no site"
        )
    effects, untraced = [], None
    chosen = list(dict.fromkeys(facts))[:_FACTS_TRACED]
    for done, fact in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        try:
            found = trace(model, fact, config)
        except FactError as error:  # of many, the others tell
            untraced = error
            continue
        if found.total_effect >= _MIN_EFFECT:
            effects.append(found.indirect_effect("mlp")[found.subject[1]])
    if not effects and untraced:
        raise untraced
    if not effects:
        raise FactError(
            "the trace finds no site: what the model answers hardly depends on the subject, so it may not know the "
            "fact. "
            "Say the layer, or trace facts that it knows"
        )
    mean = np.mean(effects, axis=0)
    choice = LayerChoice(_centre(mean[:-1]), tuple(map(float, mean)), len(effects))
    if choice.weak:
        warnings.warn(
            f"weak evidence for layer {choice.layer}: restoring the MLP outputs around it brings back only "
            f"{100 * choice.effects[choice.layer]:.1f} points of the answer's probability, so another layer may be "
            "better. Trace facts that the model knows, or compare edits at several layers",
            WeakSite,
            stacklevel=2,
        )
    return choice


def _centre(effects: np.ndarray) -> int:
    """The middle, by weight, of the run of layers around the largest effect that have at least half of it."""
    peak = int(effects.argmax())
    enough = effects >= effects[peak] / 2
    low, high = peak, peak
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < len(effects) - 1 and enough[high + 1]:
        high += 1
    layers = np.arange(low, high + 1)
    weights = np.clip(effects[low : high + 1], 0, None)
    return round(float(layers @ weights / weights.sum())) if weights.sum() > 0 else peak
