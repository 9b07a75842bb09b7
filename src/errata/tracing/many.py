"""Tracing of many facts into one file. A run that was killed continues where it stopped.

Facts of one length in tokens are traced together. The grouping depends only on the facts and settings, not on the
progress of an earlier run, so a resumed file equals that of an uninterrupted run, number for number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base import budgets
from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, Diverged, FactError, ResultFileError
from errata.base.facts import Fact
from errata.base.interrupt import deferred_interrupt
from errata.base.journal import Journal, read_journal
from errata.base.versions import library_versions
from errata.models.fingerprint import weights_digest
from errata.models.model import Model
from errata.tracing.config import TraceConfig, chosen
from errata.tracing.noise import measure
from errata.tracing.result import FORMAT, KIND, CausalTrace, as_record, from_record
from errata.tracing.runs import Progress, checked_memory, rows_at_once, trace_together
from errata.tracing.tokenized import TokenizedFact, tokenize_fact, warn_of_sinks

# More facts at a time are not faster, and more is lost with a kill. The bounds are on multiply-adds.
_MOST_FACTS = 8
_MOST_WORK = {"cpu": 5e10, "cuda": 5e12}  # a second or so


@dataclass(frozen=True, eq=False)
class TracedFacts:
    """Result of tracing many facts.

    Attributes:
        traces: traces of the facts that could be traced, in the order of the facts.
        refused: (index of the fact, reason) of those that could not.
    """

    traces: tuple[CausalTrace, ...]
    refused: tuple[tuple[int, str], ...]


@checked(model="Model", facts=["Fact"], config="TraceConfig")
@without_autocast
def trace_facts(
    model: Model,
    facts: Sequence[Fact],
    path: str | Path,
    config: TraceConfig | None = None,
    *,
    subjects: Sequence[str] | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TracedFacts:
    """Trace facts and write every trace to a file as soon as it is computed.

    If the file exists, with the same model, facts and settings, its facts are not traced again; facts behind
    those that it was begun with are added, under the noise that was measured for the first ones. Ctrl-C ends
    the run after the facts under way; a second one at once.

    Args:
        model: any decoder.
        facts: the facts to trace.
        path: the file, which `load_traces` reads too.
        config: the settings; or give them by name, as for `trace`.
        subjects: where σ is measured; None: on the subjects of all facts that can be traced, as in the paper.
        memory: as for `trace`.
        progress: called with facts done and facts in all.
        **settings: of `TraceConfig`.

    Raises:
        ConfigError: if there are no facts, or a setting is unknown or out of range.
        ResultFileError: if the file is of another model, other facts or settings, or broken.
        OutputError: if the file cannot be written, or another run is writing to it.
        KeyboardInterrupt: after Ctrl-C, once the file is in order.
    """
    config = chosen(config, settings)
    facts = list(facts)
    if not facts:
        raise ConfigError("there is no fact to trace: give at least one")
    tokenized, refused = _tokenize_all(model, facts, config)
    if not tokenized:
        return TracedFacts((), tuple(refused))
    begun = _begun(path, facts)
    warn_of_sinks(model, list(tokenized.values()))
    if subjects is None:
        subjects = [each.fact.subject for index, each in tokenized.items() if index < begun]
    if not subjects:  # none of the first ones can be traced
        subjects = [each.fact.subject for each in tokenized.values()]
    disturbance = measure(config.corruption, model, list(subjects))
    budget = checked_memory(_memory_of(path) if memory is None else memory, model)
    fingerprint = weights_digest(model.hf)
    header = {
        "model": model.name,
        "fingerprint": fingerprint,
        "versions": library_versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": model.hf.config._attn_implementation,
        **({"start_token": model.start_token} if model.start_token else {}),
        "config": config.model_dump(mode="json"),
        "noise": disturbance.settings,
        "facts": _digest(facts[:begun]),
        "count": begun,
        "memory": budget,
    }
    with (
        Journal.open(path, KIND, FORMAT, header, ignore=_ignored(path), names=_NAMES) as journal,
        deferred_interrupt() as stop_here,
    ):
        traces = _kept(journal.records, facts, header, path)
        if progress:
            progress(len(traces), len(tokenized))

        def run(group: Sequence[int]) -> list[CausalTrace]:
            together = [tokenized[index] for index in group]
            return trace_together(model, together, config, [disturbance] * len(group), budget, fingerprint)

        for group in _groups(model, tokenized, config):
            if traces.keys() >= set(group):
                continue
            for index, trace in _each(run, group, refused):
                if index not in traces:
                    journal.append({"index": index, **as_record(trace)})
                    traces[index] = trace
                    if progress:
                        progress(len(traces), len(tokenized))
            stop_here()
    return TracedFacts(tuple(traces[index] for index in sorted(traces)), tuple(sorted(refused)))


def _each(
    run: Callable[[Sequence[int]], list[CausalTrace]], group: Sequence[int], refused: list[tuple[int, str]]
) -> list[tuple[int, CausalTrace]]:
    """Traces of a group by their facts. If one has no numbers, it is refused, and the others run by themselves."""
    try:
        return list(zip(group, run(group), strict=True))
    except Diverged as error:
        if len(group) == 1:
            refused.append((group[0], str(error)))
            return []
    return [pair for index in group for pair in _each(run, [index], refused)]


def _kept(
    records: Sequence[Mapping[str, Any]], facts: Sequence[Fact], header: Mapping[str, Any], path: str | Path
) -> dict[int, CausalTrace]:
    """The traces that a file holds already, by the index of their fact.

    Raises:
        ResultFileError: if one is broken, there twice, or of another fact than the file says.
    """
    kept: dict[int, CausalTrace] = {}
    for record in records:
        trace, index = from_record(record, header, path), record.get("index")
        if type(index) is not int or index in kept or not 0 <= index < len(facts) or facts[index] != trace.fact:
            raise ResultFileError(
                f"{path} holds a trace of {trace.fact.text!r} with the index {index!r}, which does not fit its facts: "
                "it was changed by hand. Trace them into another file"
            )
        kept[index] = trace
    return kept


def _tokenize_all(
    model: Model, facts: Sequence[Fact], config: TraceConfig
) -> tuple[dict[int, TokenizedFact], list[tuple[int, str]]]:
    tokenized, refused = {}, []
    for index, fact in enumerate(facts):
        try:
            tokenized[index] = tokenize_fact(model, fact, config)
        except FactError as error:
            refused.append((index, str(error)))
    return tokenized, refused


def _groups(model: Model, tokenized: dict[int, TokenizedFact], config: TraceConfig) -> list[list[int]]:
    """Indexes of facts that are traced together: of one length, short ones first."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, fact in tokenized.items():
        by_length.setdefault((len(fact.ids), len(fact.span.ids)), []).append(index)
    groups = []
    for (length, _), members in sorted(by_length.items()):
        size = _together(model, length, config)
        groups += [[members[i] for i in group] for group in budgets.groups([1] * len(members), size)]
    return groups


def _together(model: Model, length: int, config: TraceConfig) -> int:
    """Number of facts of one length that are traced at once; depends on the settings alone."""
    rows = rows_at_once(model, length, config, budgets.enough_memory(model.device))
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    work = len(config.parts) * config.samples * block * (model.n_layers * length) ** 2 / 4
    bounds = (_MOST_FACTS, rows // (config.samples * config.draws + 1), _MOST_WORK.get(model.device.type, 2e12) // work)
    return max(1, int(min(bounds)))


_NAMES = {"fingerprint": "the weights of the model", "facts": "the facts"}


def _header_of(path: str | Path) -> dict[str, Any]:
    with contextlib.suppress(ResultFileError):  # there is none, or opening it will say what is wrong
        return read_journal(path, KIND, FORMAT)[0]
    return {}


def _begun(path: str | Path, facts: Sequence[Fact]) -> int:
    """With how many of these facts the file at `path` was begun; all of them if it was not."""
    count = _header_of(path).get("count")
    return count if isinstance(count, int) and 0 < count < len(facts) else len(facts)


def _ignored(path: str | Path) -> tuple[str, ...]:
    """Keys that the header of an older file has not."""
    return () if "count" in _header_of(path) else ("count",)


def _memory_of(path: str | Path) -> int | None:
    """The memory with which the file at `path` was begun: how rows are batched decides the last bits."""
    memory = _header_of(path).get("memory")
    return memory if type(memory) is int and memory > 0 else None


def _digest(facts: Sequence[Fact]) -> str:
    """sha256, in hex, of facts in their order."""
    return hashlib.sha256(json.dumps([fact.as_list() for fact in facts]).encode()).hexdigest()
