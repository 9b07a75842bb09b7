"""Evaluation of editors on records, with one model, into a run folder that survives any number of kills.

Records are measured in chunks. A chunk's results depend on nothing else, so an interrupted chunk is measured again with
the same results. Only this process writes; an executor decides where chunks are measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, ResultFileError
from errata.base.files import write_text
from errata.base.interrupt import deferred_interrupt
from errata.base.journal import Journal, read_journal
from errata.base.parsing import load_json, of_type
from errata.editors.editor import Editor
from errata.evaluation.executors import Chunk, Executor, Here, Work
from errata.evaluation.measure import Measures
from errata.evaluation.results import (
    FORMAT,
    KIND,
    UNEDITED,
    Result,
    Run,
    by_case,
    editor_file,
    read_back,
    written_out,
)
from errata.evaluation.run_header import provenance, sha256
from errata.evaluation.training_examples import require_unseen
from errata.metrics.side_effects import predict_texts
from errata.metrics.text import words
from errata.models.model import Model
from errata.tasks.records import RecordSet
from errata.tasks.registry import task_of_records
from errata.tasks.task import Case, Task

# Records of a chunk at most: more fill batches better, and more is lost with a kill. On a CPU, one record of a model of
# some size fills them by itself, so that each is there as soon as it is measured.
TOGETHER = 16
_WEIGHTS_AT_ONCE = 32e6
_BEGUN = ("begun",)  # of a header, what may differ when a run goes on
_NAMES = {
    "fingerprint": "the weights of the model",
    "records.digest": "the records",
    "probes": "the texts on which drift is measured (--probe, or the model's own by --seed)",
    "generation.references": "the reference texts",
    "generation.tfidf": "the word frequencies for RS",
}


@checked(model="Model")
@without_autocast
def evaluate(
    model: Model,
    records: Sequence[Case] | RecordSet,
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
    """Measure records before and after edits, and write each result to a folder as soon as it is measured.

    Existing results are not measured again: the same call continues a stopped run, and editors can be added to it,
    or records behind those that it has.
    The unedited model is measured once for all of them. Ctrl-C ends the run after the chunk under way; a second one at
    once.

    Args:
        model: any decoder; left as it was.
        records: records of one task, each with a case id of its own; or what `read_records` returned.
        editors: editors by the names of their rows.
        folder: the run folder (`evaluation.results`).
        measures: settings of the measurement; None: only predictions on prompts.
        source: name of the record set.
        keep_edits: whether edits are saved in the folder.
        executor: where chunks are measured; None: here.
        allow_seen: whether an editor may be measured on facts that it was trained on.
        progress: called with results there and results in all.

    Raises:
        ConfigError: if there is nothing to do, records are of several tasks, a case id or name cannot be used, an
            editor was trained on one of the facts, or edits are to be kept of results that are there without.
        MissingExtra: if texts are to be written and what splits them is not installed.
        FactError: if reference texts are too long for the model, or too short.
        ResultFileError: if the folder is of another model, other records or settings, or broken.
        OutputError: if it cannot be written, or another run is writing to it.
        KeyboardInterrupt: after Ctrl-C, once the files are in order.
    """
    records = list(records.records if isinstance(records, RecordSet) else records)
    measures, folder = measures or Measures(), Path(folder)
    task = task_of_records(records)
    _require_cases(records)
    for name, editor in editors.items():
        if not allow_seen:
            require_unseen(name, editor.trained_on, task, records)
    text = written_out(records)
    settings = {
        **provenance(model),
        "records": {"kind": task.name, "source": source},
        **_measures_as_dict(measures),
        "together": _together(model, folder / "unedited.jsonl"),
    }
    cases = {record.case_id: record for record in records}
    if measures.generation:
        words("")  # what splits texts is there, or it is told before anything is written
    if measures.probes:
        predict_texts(model, measures.probes)  # unusable texts are refused before anything is written
    files = {name: editor_file(folder, name) for name in editors}
    _require_no_more(folder, task, records)
    with ExitStack() as stack, deferred_interrupt() as stop_here:

        def opened(path: Path, **more: Any) -> tuple[Journal, dict[int, Result]]:
            journal = stack.enter_context(
                Journal.open(
                    path,
                    KIND,
                    FORMAT,
                    {
                        **settings,
                        "records": _records_as_dict(records, settings["records"], path),
                        **more,
                        "begun": time.time(),
                    },
                    ignore=_BEGUN,
                    names=_NAMES,
                )
            )
            return journal, by_case(journal.records, cases, path, task)

        # The first journal is the lock of the folder.
        journals = {UNEDITED: opened(folder / "unedited.jsonl")}
        if not (folder / "records.json").is_file() or read_back(folder / "records.json", task) != records:
            write_text(folder / "records.json", text)
        for name in sorted(editors, key=lambda name: not files[name].exists()):  # if one is refused, none is begun
            editor = editors[name]
            journals[name] = opened(files[name], editor=editor.method, config=dict(editor.config))
            if keep_edits:
                _require_kept(name, journals[name][1].values())
        _write_card(folder, {**settings, "records": _records_as_dict(records, settings["records"])}, editors)

        def tell() -> None:
            if progress:
                progress(sum(len(there) for _, there in journals.values()), len(records) * len(journals))

        chunks = []
        share = settings["together"]
        for begin in range(0, len(records), share):
            some = records[begin : begin + share]
            missing = [name for name, (_, there) in journals.items() if any(r.case_id not in there for r in some)]
            if missing:
                wanted = tuple(name for name in missing if name != UNEDITED)
                chunks.append(Chunk(tuple(some), wanted, UNEDITED in missing))
        tell()
        measured = (executor or Here(model)).run(Work(task.name, editors, measures, keep_edits), chunks)
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


def _together(model: Model, path: Path) -> int:
    """Number of records measured at once. A run keeps the number it began with: the last bits depend on it."""
    with suppress(ResultFileError):
        begun = read_journal(path, KIND, FORMAT)[0].get("together")
        if isinstance(begun, int) and begun > 0:
            return begun
    if model.device.type != "cpu":
        return TOGETHER
    weights = sum(parameter.numel() for parameter in model.hf.parameters())
    return max(1, min(TOGETHER, int(_WEIGHTS_AT_ONCE / weights)))


def _records_as_dict(records: Sequence[Case], settings: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Records as the header names them: those with which the journal at `path` was begun, if it exists."""
    count = len(records)
    if path is not None:
        with suppress(ResultFileError, AttributeError):
            begun = read_journal(path, KIND, FORMAT)[0].get("records", {}).get("count")
            count = begun if isinstance(begun, int) and 0 < begun <= len(records) else count
    return {**settings, "count": count, "digest": sha256(written_out(records[:count]))}


def _require_no_more(folder: Path, task: Task, records: Sequence[Case]) -> None:
    """Refuse to continue a run with fewer records than it has.

    Raises:
        ConfigError: if it is.
    """
    with suppress(ResultFileError):
        there = read_back(folder / "records.json", task)
        if len(there) > len(records) and there[: len(records)] == list(records):
            raise ConfigError(
                f"{folder} is a run over {len(there)} records, and {len(records)} are asked for: give a --limit of "
                f"{len(there)} or more, which adds records to it, or name another folder"
            )


def _require_kept(name: str, there: Iterable[Result]) -> None:
    """Check that the edits of existing results were kept, if they are requested.

    Raises:
        ConfigError: if they were not.
    """
    lost = sum(result.answers is not None and result.edit is None for result in there)
    if lost:
        raise ConfigError(
            f"{lost} results of {name} are there already without their edits, which cannot be kept any more: name "
            "another folder to keep edits, or go on without"
        )


def _require_cases(records: Sequence[Case]) -> None:
    """Check that records have distinct case ids.

    Raises:
        ConfigError: if two have one case id.
    """
    seen: set[int] = set()
    for record in records:
        if record.case_id in seen:
            raise ConfigError(f"the case {record.case_id} is there twice, and its results could not be told apart")
        seen.add(record.case_id)


def _measures_as_dict(measures: Measures) -> dict[str, Any]:
    """Settings of the measurement, JSON-able."""
    generation = measures.generation.model_dump() if measures.generation else None
    if generation is not None:
        texts = sha256(measures.snippets.texts) if measures.snippets else None
        generation |= {"references": texts, "tfidf": measures.tfidf.digest if measures.tfidf else None}
        generation["essence"] = measures.essence
    probes = sha256(measures.probes) if measures.probes else None
    return {"generation": generation, "probes": probes, "seed": measures.seed}


def _write_card(folder: Path, settings: Mapping[str, Any], editors: Mapping[str, Editor]) -> None:
    """The run card, with the editors of earlier runs."""
    path = folder / "card.json"
    try:
        before = load_json(path.read_bytes())
        known = of_type(before["editors"], dict[str, Any])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    told = {name: {"editor": editor.method, "config": dict(editor.config)} for name, editor in editors.items()}
    card = {"settings": settings, "editors": {**known, **told}}
    write_text(path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
