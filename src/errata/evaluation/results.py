"""A run folder: results of each record, for the unedited model and with each editor's edits applied.

| file | holds |
|---|---|
| `card.json` | the run card: model, records, settings, versions, and each editor's settings; for people |
| `records.json` | the records themselves |
| `unedited.jsonl` | one line for each record: results of the unedited model |
| `editors/NAME.jsonl` | one line for each record: results with the editor's edit applied, or why there was no edit |
| `edits/NAME/CASE.safetensors` | the edits, where they were kept |

The .jsonl files are journals (`base.journal`): the settings are in their first lines, lines are only added, and a file
with other settings is not continued.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from errata.base.errors import ConfigError, ResultFileError
from errata.base.facts import as_plain
from errata.base.files import content
from errata.base.journal import read_journal
from errata.base.parsing import load_json, of_type, reason_of, taking_apart
from errata.base.settings_diff import differing, flat
from errata.evaluation.run_header import sha256
from errata.models.scoring import Score
from errata.tasks.registry import task_of
from errata.tasks.task import Case, Probability, Scored, Task

KIND = "evaluation"
FORMAT = 1
UNEDITED = "unedited"


class _Line(TypedDict):
    """A result as a line of a file."""

    case: int
    answers: dict[str, list[list[Annotated[list[float | None], Field(min_length=3, max_length=3)]]]] | None
    texts: list[str]
    entropy: float | None
    reference: float | None
    essence: float | None
    health: dict[str, float | bool | None] | None
    error: str | None
    edit: str | None
    seconds: dict[str, float]


class _Records(TypedDict):
    kind: str  # name of the task
    count: NotRequired[int]
    digest: str


class _Header(TypedDict):
    """Settings in the header of a run, as far as they are read."""

    model: str
    records: _Records
    generation: NotRequired[dict[str, Any] | None]
    config: NotRequired[dict[str, Any]]
    editor: NotRequired[str]


@dataclass(frozen=True)
class Result:
    """Measurements of one record, with one editor's edit applied or with none.

    Attributes:
        case: the record's case id.
        answers: scores of the record's prompts, by kind; None if there was no edit.
        texts: generated, each with its prompt; empty where none were asked for.
        entropy: GE, n-gram entropy of the texts in bits; None without texts.
        reference: RS, similarity of the texts to the reference texts, 0 to 1; None without texts or references.
        essence: perplexity of what is known of the subject with the new object; None where nothing is.
        health: side effects of the edit, `metrics.side_effects.SideEffects.as_dict`, with `residual`, `rounding` and
            `relative_norm` where the editor tells them; None of the unedited model, or if not asked for.
        error: why there was no edit; None if there was.
        edit: the file of the edit, relative to the run folder; None if it was not kept.
        seconds: wall time: "edit", "ask", "generate", each the record's share of what was done together.
    """

    case: int
    answers: Scored | None
    texts: tuple[str, ...] = ()
    entropy: float | None = None
    reference: float | None = None
    essence: float | None = None
    health: Mapping[str, Any] | None = None
    error: str | None = None
    edit: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def as_line(self) -> dict[str, Any]:
        """The result as JSON-able values; `from_line` reads it back. A number that is not finite becomes None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.answers is not None:
            values["answers"] = {
                kind: [[[_finite(each.total), each.n_tokens, each.hits] for each in one] for one in said]
                for kind, said in self.answers.items()
            }
        values |= {name: _finite(values[name]) for name in ("entropy", "reference", "essence")}
        if self.health is not None:
            values["health"] = {name: _finite(value) for name, value in self.health.items()}
        return {**values, "texts": list(self.texts), "seconds": dict(self.seconds)}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """The result in a line. Raises KeyError, TypeError or ValueError if the line is not a result."""
        of_type(line, _Line)
        values = {name: line[name] for name in cls.__dataclass_fields__}
        if values["answers"] is not None:
            values["answers"] = {
                kind: tuple(tuple(_score(*each) for each in one) for one in some)
                for kind, some in values["answers"].items()
            }
        elif not isinstance(values["error"], str):
            raise ValueError("there is neither an answer nor an error")
        return cls(**{**values, "texts": tuple(values["texts"])})


@dataclass(frozen=True)
class Results:
    """Results of one editor, or of the unedited model, on the records so far.

    Attributes:
        name: name of the row; "unedited" for the model without an edit.
        settings: the header of its file: the run's settings, and under "editor" and "config" the editor's own.
        by_case: results by case id, in the order of measurement.
    """

    name: str
    settings: Mapping[str, Any]
    by_case: Mapping[int, Result]


@dataclass(frozen=True)
class Run:
    """A run folder, which may still be growing. No model is needed to read it.

    Attributes:
        folder: where it is.
        task: the task of its records.
        settings: settings of the run, as in the header of its files.
        records: records by case id, in order.
        unedited: results of the unedited model.
        edited: results of each editor by name, in the order of their first runs.
    """

    folder: Path
    task: Task
    settings: Mapping[str, Any]
    records: Mapping[int, Case]
    unedited: Results
    edited: Mapping[str, Results]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a folder that `evaluate` writes.

        Raises:
            ResultFileError: if it is none, or broken.
        """
        folder = Path(folder)
        if not (folder / "unedited.jsonl").is_file():
            raise ResultFileError(
                f"{folder} is not a run folder: it has no unedited.jsonl. Give the folder of errata evaluate --out"
            )
        task = _task(folder / "unedited.jsonl")
        records = {record.case_id: record for record in read_back(folder / "records.json", task)}
        unedited = _results(folder / "unedited.jsonl", UNEDITED, records, task)
        files = [path for path in (folder / "editors").glob("*.jsonl") if _has_header(path)]
        files.sort(key=lambda path: (_begun(path), path.name))
        edited = {path.stem: _results(path, path.stem, records, task) for path in files}
        _require_one_run(folder, task, unedited, list(edited.values()))
        settings = {
            **unedited.settings,
            "records": {**unedited.settings["records"], "count": len(records)},
        }  # it may have grown since
        return cls(folder, task, settings, records, unedited, edited)

    def numbers(self, results: Results, probability: Probability = "per_token") -> dict[str, dict[int, float | None]]:
        """Each number of the task by case, a fraction (GE: bits; essence: perplexity).

        A record whose edit could not be made counts as the unedited model has it. None: the record has no such number.
        """
        found: dict[str, dict[int, float | None]] = {
            column.name: {} for column in self.task.columns if not column.harmonic
        }
        for case, result in results.by_case.items():
            if result.answers is None:
                result = self.unedited.by_case.get(case, result)
            if result.answers is None:  # not even the unedited model can be asked
                continue
            for name, value in self.task.numbers(result, probability).items():
                found[name][case] = value
        return found


def _require_one_run(folder: Path, task: Task, unedited: Results, edited: Sequence[Results]) -> None:
    """Check that the files of a folder belong together: numbers of two models or record sets are not comparable.

    Raises:
        ResultFileError: if one does not.
    """
    records = content(folder / "records.json", "records").decode()  # `written_out`, by this errata or an earlier one
    whole, found = sha256(records), read_back(folder / "records.json", task)
    for each in (unedited, *edited):  # of all, or of the first ones, if it was begun with fewer
        told = each.settings.get("records")
        told = told if isinstance(told, dict) else {}
        count = told.get("count")
        first = sha256(written_out(found[:count])) if isinstance(count, int) and 0 < count < len(found) else whole
        if told.get("digest") not in (first, whole):
            raise ResultFileError(
                f"{folder / 'records.json'} holds other records than {each.name}.jsonl is of: it was changed by hand. "
                "Measure again into another folder"
            )
    for each in edited:
        names = sorted(differing(_shared(unedited), _shared(each)))
        if names:
            raise ResultFileError(
                f"{editor_file(folder, each.name)} is of another run than {folder / 'unedited.jsonl'} (other "
                f"{', '.join(names)}), so their numbers do not compare: take it out of the folder"
            )


def _shared(results: Results) -> dict[str, Any]:
    """Settings that all files of a run have in common, flat."""
    settings = {name: value for name, value in results.settings.items() if name not in ("editor", "config", "begun")}
    records = {name: settings["records"].get(name) for name in ("kind", "source")}
    return flat({**settings, "records": records})


def _require_scores(task: Task, record: Case, result: Result) -> None:
    """Raises ValueError unless there is a score for every target of every prompt of the record."""
    if result.answers is not None:
        asked = {kind: [len(one.targets) for one in some] for kind, some in task.prompts(record).items()}
        if asked != {kind: [len(one) for one in some] for kind, some in result.answers.items()}:
            raise ValueError("scores of other prompts than the record has")


def _finite(value: float | None) -> float | None:
    """A number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def _score(total: float | None, n_tokens: int, hits: int) -> Score:
    """A log-probability that is not a number, from a model that an edit broke, counts as that of the impossible."""
    if type(n_tokens) is not int or type(hits) is not int or not 0 <= hits <= n_tokens or n_tokens < 1:
        raise ValueError("a score of no such number of tokens")
    if total is not None and total > 1e-3:  # rounding may leave it above 0
        raise ValueError("a log-probability above 0")
    return Score(-math.inf if total is None else float(total), n_tokens, hits)


def editor_file(folder: Path, name: str) -> Path:
    """Path of an editor's results.

    Raises:
        ConfigError: if the name cannot be a file's.
    """
    if not re.fullmatch(r"\w[\w.+=,-]*", name) or len(name.encode()) > 100 or name == UNEDITED:
        raise ConfigError(
            f"{name!r} cannot name a row of results: use up to 100 letters, digits and . _ - + = , and begin with a "
            f"letter or digit; {UNEDITED!r} is taken"
        )
    return folder / "editors" / f"{name}.jsonl"


def written_out(records: Sequence[Case]) -> str:
    """Records as the text of `records.json`."""
    return json.dumps([as_plain(record) for record in records], ensure_ascii=False, indent=0) + "\n"


def read_back(path: Path, task: Task) -> list[Case]:
    """The records of `records.json`.

    Raises:
        ResultFileError: if it is missing, or is not a list of the task's records.
    """
    with taking_apart(path, "a file of the records of a run", advice="Begin another folder"):
        entries = load_json(path.read_bytes())  # pydantic's own parser refuses lone surrogates
        for entry in entries:
            of_type(entry["case_id"], int)
        records: list[Case] = TypeAdapter(list[task.record]).validate_python(entries)  # type: ignore[name-defined]
        return records


def _task(path: Path) -> Task:
    """The task that a journal says it is of.

    Raises:
        ResultFileError: if it says none, or one that is not installed.
    """
    settings, _ = read_journal(path, KIND, FORMAT)
    with taking_apart(path, "a file of results", advice="Measure again into another folder"):
        name = of_type(settings, _Header)["records"]["kind"]
    try:
        return task_of(name)
    except ConfigError as error:
        raise ResultFileError(f"{path}: {error}") from error


def _has_header(path: Path) -> bool:
    """Whether its first line is whole: of a run that is just beginning, or was killed then, it may not be."""
    with taking_apart(path, "a file of results"), open(path, "rb") as file:
        return file.readline().endswith(b"\n")


def _begun(path: Path) -> float:
    begun = read_journal(path, KIND, FORMAT)[0].get("begun")
    return begun if isinstance(begun, (int, float)) else 0.0


def _results(path: Path, name: str, records: Mapping[int, Case], task: Task) -> Results:
    settings, lines = read_journal(path, KIND, FORMAT)
    with taking_apart(path, "a file of results", advice="Measure again into another folder"):
        of_type(settings, _Header)
    return Results(name, settings, by_case(lines, records, path, task))


def by_case(
    lines: Sequence[Mapping[str, Any]], records: Mapping[int, Case], path: Path, task: Task
) -> dict[int, Result]:
    """Results by case id.

    Raises:
        ResultFileError: if a line is none of ours, of no such case, or of one that was there.
    """
    found: dict[int, Result] = {}
    for number, line in enumerate(lines, 2):
        try:
            result = Result.from_line(line)
            if result.case in found or result.case not in records:
                raise ValueError("a case that is there twice, or does not belong here")
            _require_scores(task, records[result.case], result)
        except Exception as error:
            raise ResultFileError(
                f"line {number} of {path} does not fit its header ({reason_of(error)}): it was "
                "changed by hand. Begin another folder"
            ) from error
        found[result.case] = result
    return found
