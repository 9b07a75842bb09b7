"""Causal tracing of one fact: Figure 1 of the paper.

There are three kinds of runs on a fact's prompt:

- clean: the prompt unchanged. The answer is its most probable next token, with probability P[o].
- corrupted: noise on the subject's embeddings. The answer's probability is P*[o].
- restored: corrupted, but at one site (part, layer, token) the clean run's activation is put back; P*,clean[o].

Total effect TE = P[o] − P*[o]; indirect effect of a site IE = P*,clean[o] − P*[o]. Probabilities are means over
samples of noise. A `state` site is one block output h. An `mlp` or `attention` site is a window of layers around
its layer, in which the module's outputs at that token are restored together, since one layer alone has little effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.facts import Fact
from errata.models.fingerprint import weights_digest
from errata.models.model import Model
from errata.passes.replay import tell_if_plain
from errata.tracing.config import TraceConfig, chosen
from errata.tracing.noise import measure
from errata.tracing.result import CausalTrace
from errata.tracing.runs import Progress, checked_memory, trace_together
from errata.tracing.tokenized import tokenize_fact, warn_of_sinks


@checked(model="Model", fact="Fact", config="TraceConfig")
@without_autocast
def trace(
    model: Model,
    fact: Fact,
    config: TraceConfig | None = None,
    *,
    subjects: Sequence[str] = (),
    memory: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CausalTrace:
    """Trace one fact: measure the indirect effect of every site from the subject's first token on.

    Sites before the subject are not run: nothing there is corrupted, so their effect is exactly zero.

    Args:
        model: any decoder.
        fact: its object is not needed, unless the settings say answer="object".
        config: the settings; or give them by name, as in `trace(model, fact, samples=5, noise="u3")`.
        subjects: where σ is measured; if none are given, on what the model's config says
            (`errata["subject_sigma"]`), and failing that on this fact's subject.
        memory: bytes that the runs may take beside the model; None: half of what is free, at most 2 GiB (24 on a GPU).
        progress: called with sites done and sites in all.
        **settings: of `TraceConfig`.

    Raises:
        ConfigError: if a setting is unknown or out of range.
        FactError: if the prompt does not fit the model's context, or there is no object where one is needed.
        UnsupportedModel: if the model's blocks cannot be resumed.
        Diverged: if the model gives probabilities that are not numbers.
    """
    config = chosen(config, settings)
    tokenized = tokenize_fact(model, fact, config)
    warn_of_sinks(model, [tokenized])
    disturbance = measure(config.corruption, model, subjects, own=fact.subject)
    budget = checked_memory(memory, model)
    fingerprint = weights_digest(model.hf)
    tell_if_plain(model)
    return trace_together(model, [tokenized], config, [disturbance], budget, fingerprint, progress)[0]
