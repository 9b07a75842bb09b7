"""Editors × records on one model, into a run folder that any number of kills leaves whole.

Records are dealt out in chunks, which are measured as a whole and depend on nothing but themselves, so that a chunk
that was cut short is done again and gives the very same. This process alone writes; an executor says where chunks are
measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError
from errata.base.files import write_text
from errata.base.interrupt import deferred_interrupt
from errata.base.journal import Journal
from errata.base.reading import load_json, of_type
from errata.benchmarks.records import Record
from errata.editors.editor import Editor
from errata.evaluation.executors import Chunk, Executor, Here, Work
from errata.evaluation.lessons import require_unseen
from errata.evaluation.measure import Measures
from errata.evaluation.results import (
    FORMAT,
    KIND,
    UNEDITED,
    AnyRecord,
    Result,
    Run,
    by_case,
    editor_file,
    read_back,
    written_out,
)
from errata.evaluation.run import digest, standing
from errata.metrics.health import probe
from errata.metrics.text import words
from errata.models.model import Model

TOGETHER = 16  # records of a chunk: more fill batches better, and more is lost with a kill
_BEGUN = ("begun",)  # of a header, what may differ when a run goes on


@checked(model="Model", records=["Record|ZsreRecord"])
@without_autocast
def evaluate(
    model: Model,
    records: Sequence[AnyRecord],
    editors: Mapping[str, Editor],
    folder: str | Path,
    measures: Measures | None = None,
    *,
    source: str = "",
    keep_edits: bool = False,
    executor: Executor | None = None,
    allow_seen: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Run:
    """Measure records before and after edits, and keep each result in a folder as soon as it is there.

    What the folder holds already is not measured again: a run that was stopped goes on, and editors can be added to it.
    The unedited model is measured once for all of them. Ctrl-C ends the run after the chunk under way; a second one at
    once.

    Args:
        model: any decoder; left as it was.
        records: of one kind, each with a case id of its own.
        editors: by the names of their rows.
        folder: the run folder (`evaluation.results`).
        measures: what is measured; None: what the model says to prompts alone.
        source: what to call the records.
        keep_edits: whether edits are saved in the folder.
        executor: where chunks are measured; None: here.
        allow_seen: whether an editor may be measured on facts that it was trained on.
        progress: called with results there and results in all.

    Raises:
        ConfigError: if there is nothing to do, records are of two kinds, a case id or name is no such, an editor was
            trained on one of the facts, or edits are to be kept of results that are there without.
        MissingExtra: if texts are to be written and what splits them is not installed.
        FactError: if probe texts are too long for the model, or too short.
        ResultFileError: if the folder is of another model, other records or settings, or broken.
        OutputError: if it cannot be written, or another run is writing to it.
        KeyboardInterrupt: after Ctrl-C, once the files are in order.
    """
    records, measures, folder = list(records), measures or Measures(), Path(folder)
    kind = _checked(records)
    for name, editor in editors.items():
        if not allow_seen:
            require_unseen(name, editor.seen, records)
    text = written_out(records)
    settings = {
        **standing(model),
        "records": {"kind": kind, "source": source, "count": len(records), "digest": digest(text)},
        **_told(measures),
        "together": TOGETHER,
    }
    cases = {record.case_id for record in records}
    if measures.generation:
        words("")  # what splits texts is there, or it is told before anything is written
    if measures.probes:
        probe(model, measures.probes)  # texts that do not do are refused before anything is written
    files = {name: editor_file(folder, name) for name in editors}
    with ExitStack() as stack, deferred_interrupt() as stop_here:

        def opened(path: Path, **more: Any) -> tuple[Journal, dict[int, Result]]:
            journal = stack.enter_context(
                Journal.open(path, KIND, FORMAT, {**settings, **more, "begun": time.time()}, ignore=_BEGUN)
            )
            return journal, by_case(journal.records, cases, path)

        # The first journal is the lock of the folder.
        journals = {UNEDITED: opened(folder / "unedited.jsonl")}
        if not (folder / "records.json").is_file() or read_back(folder / "records.json") != records:
            write_text(folder / "records.json", text)
        for name in sorted(editors, key=lambda name: not files[name].exists()):  # if one is refused, none is begun
            editor = editors[name]
            journals[name] = opened(files[name], editor=editor.method, config=dict(editor.config))
            if keep_edits:
                _require_kept(name, journals[name][1].values())
        _write_card(folder, settings, editors)

        def tell() -> None:
            if progress:
                progress(sum(len(there) for _, there in journals.values()), len(records) * len(journals))

        chunks = []
        for begin in range(0, len(records), TOGETHER):
            some = records[begin : begin + TOGETHER]
            missing = [name for name, (_, there) in journals.items() if any(r.case_id not in there for r in some)]
            if missing:
                wanted = tuple(name for name in missing if name != UNEDITED)
                chunks.append(Chunk(tuple(some), wanted, UNEDITED in missing))
        tell()
        measured = (executor or Here(model)).run(Work(editors, measures, keep_edits), chunks)
        stack.callback(getattr(measured, "close", lambda: None))
        for _, found in measured:
            for name, results in found.results.items():
                journal, there = journals[name]
                for i, result in enumerate(results):
                    if result.case in there:
                        continue
                    edit = found.edits[name][i] if name in found.edits else None
                    if edit is not None:
                        place = f"edits/{name}/{result.case}.safetensors"
                        edit.save(folder / place)
                        result = Result(**{**vars(result), "edit": place})
                    journal.append(result.as_line())
                    there[result.case] = result
                    tell()
            stop_here()
    return Run.load(folder)


def _require_kept(name: str, there: Iterable[Result]) -> None:
    """Make sure that edits of results that are there already were kept, where they are asked for.

    Raises:
        ConfigError: if they were not.
    """
    lost = sum(result.answers is not None and result.edit is None for result in there)
    if lost:
        raise ConfigError(
            f"{lost} results of {name} are there already without their edits, which cannot be kept any more: name "
            "another folder to keep edits, or go on without"
        )


def _checked(records: Sequence[AnyRecord]) -> str:
    """The kind of the records, once it is sure that they can be told apart."""
    if not records:
        raise ConfigError("there are no records to measure: give at least one")
    kinds = {"counterfact" if isinstance(record, Record) else "zsre" for record in records}
    if len(kinds) > 1:
        raise ConfigError("there are records of CounterFact and of zsRE, which have different numbers: give one kind")
    seen: set[int] = set()
    for record in records:
        if record.case_id in seen:
            raise ConfigError(f"the case {record.case_id} is there twice, and its results could not be told apart")
        seen.add(record.case_id)
    return kinds.pop()


def _told(measures: Measures) -> dict[str, Any]:
    """What is measured, JSON-able."""
    generation = measures.generation.model_dump() if measures.generation else None
    if generation is not None:
        texts = digest(measures.snippets.texts) if measures.snippets else None
        generation |= {"references": texts, "tfidf": measures.tfidf.digest if measures.tfidf else None}
    probes = digest(measures.probes) if measures.probes else None
    return {"generation": generation, "probes": probes, "seed": measures.seed}


def _write_card(folder: Path, settings: Mapping[str, Any], editors: Mapping[str, Editor]) -> None:
    """The run card, with the editors of earlier runs."""
    path = folder / "card.json"
    try:
        before = load_json(path.read_bytes())
        settings, known = of_type(before["settings"], dict[str, Any]), of_type(before["editors"], dict[str, Any])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    told = {name: {"editor": editor.method, "config": dict(editor.config)} for name, editor in editors.items()}
    card = {"settings": settings, "editors": {**known, **told}}
    write_text(path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
