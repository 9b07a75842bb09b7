"""Runs as one self-contained HTML page: tables, distributions of the numbers, and every record.

`page.html` is its frame, `page.css` its style, `page.js` its script. The page holds the data once, as JSON; the script
draws the part in view. The page's own security policy forbids the browser to fetch anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from errata.base.extras import needed
from errata.base.files import write_text
from errata.evaluation.formats import STRONG, panels
from errata.evaluation.report import Table
from errata.evaluation.results import Result, Results, Run
from errata.tasks.task import Case, Column, Probability, Task

TEXTS = (
    40_000_000  # characters of generated text in a page, at most: beyond, the last texts of each record are left out
)

_DRIFT = Column(
    "drift",
    "Drift",
    "Side effects",
    "how far predictions on reference texts move",
    unit="nats per token",
    scale=1,
    lower_is_better=True,
    axis="log",
)


def write_page(path: str | Path, runs: Sequence[Run], table: Table) -> None:
    """Write the page of some runs.

    Args:
        path: path of the file.
        runs: the runs in the table.
        table: the table of the runs.

    Raises:
        MissingExtra: if jinja2 is not installed.
        OutputError: if the file cannot be written.
    """
    write_text(path, page(runs, table))


def page(runs: Sequence[Run], table: Table) -> str:
    """The page of some runs as text; see `write_page`.

    Raises:
        MissingExtra: if jinja2 is not installed.
    """
    jinja2 = needed("jinja2", "evaluation")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    safe = needed("markupsafe", "evaluation").Markup  # comes with jinja2
    text = environment.from_string(_beside("page.html")).render(
        title=table.title,
        panels=panels(table),
        legend=[*table.legend(), f"Bold: {STRONG}."],
        runs=[_about(run) for run in runs],
        style=safe(_beside("page.css")),
        script=safe(_beside("page.js")),
        data=safe(in_script(data(runs, table))),
    )
    # Half a character, as files may hold it, becomes what can be written.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def in_script(value: Any) -> str:
    """JSON that is safe within `<script>`: nothing in it ends or hides the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def data(runs: Sequence[Run], table: Table) -> dict[str, Any]:
    """Data for the page's script, JSON-able. Lists over records are in the run's order; null: not measured."""
    texts = _texts_kept(runs)
    short = {row.name: row.short for block in table.blocks for row in block if row.short}
    found = [_run(run, table.probability, texts, short) for run in runs]
    columns = [
        {
            **{name: getattr(column, name) for name in ("name", "symbol", "unit", "scale")},
            "what": _of_one_record(column, table.task),
            "axis": column.axis,
            "highIsBad": column.lower_is_better,
        }
        for column in (*table.columns, _DRIFT)
        if any(
            value is not None for run in found for row in run["rows"] for value in row["numbers"].get(column.name, [])
        )
    ]
    held = next((column.name for column in table.task.columns if column.fails == "below half"), "")
    return {"columns": columns, "kinds": _kinds(runs), "held": held, "textsKept": texts, "runs": found}


def _of_one_record(column: Column, task: Task) -> str:
    """A column's meaning for one record, of which a harmonic mean of means is that of its own numbers."""
    if not column.harmonic:
        return column.what
    symbols = [part.symbol for name in column.harmonic if (part := task.column(name))]
    return f"harmonic mean of the record's own {', '.join(symbols[:-1])} and {symbols[-1]}"


def _kinds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The kinds of prompts: name, heading, and which target should win."""
    task = runs[0].task
    names = dict.fromkeys(kind for run in runs for record in run.records.values() for kind in task.prompts(record))
    return [
        {"name": kind, "title": task.titles.get(kind, kind), "preferred": task.preferred.get(kind, 0)} for kind in names
    ]


def _run(run: Run, probability: Probability, texts: int, short: Mapping[str, str]) -> dict[str, Any]:
    relations = sorted(set(filter(None, map(run.task.relation, run.records.values()))))
    rows = (run.unedited, *run.edited.values())
    return {
        "model": str(run.settings.get("model", "")),
        "folder": str(run.folder),
        "relations": relations,
        "records": [_record(run.task, record) for record in run.records.values()],
        "rows": [{**_row(run, results, probability, texts), "short": short.get(results.name, "")} for results in rows],
    }


def _record(task: Task, record: Case) -> dict[str, Any]:
    """A record's texts; `targets` of a prompt are null where they are the new and the old object."""
    rewrite = record.rewrite
    pair = rewrite.new_object, rewrite.fact.object
    prompts = task.prompts(record)
    return {
        "id": record.case_id,
        "subject": rewrite.subject,
        "text": rewrite.text,
        "new": rewrite.new_object,
        "old": rewrite.fact.object,
        "relation": task.relation(record),
        "prompts": [[request.prompt for request in kind] for kind in prompts.values()],
        "targets": [[None if one.targets == pair else one.targets for one in kind] for kind in prompts.values()],
        "generation": task.generation(record),
    }


def _row(run: Run, results: Results, probability: Probability, texts: int) -> dict[str, Any]:
    cases = list(run.records)
    numbers: dict[str, Mapping[int, float | None]] = dict(run.numbers(results, probability))
    for column in run.task.columns:
        if column.harmonic:
            parts = [numbers[part] for part in column.harmonic]
            numbers[column.name] = {case: _score([part.get(case) for part in parts]) for case in cases}
    health = {case: each.health for case, each in results.by_case.items() if each.health is not None}
    numbers["drift"] = {case: each.get("drift") for case, each in health.items()}
    return {
        "name": results.name,
        "numbers": {name: [_short(values.get(case)) for case in cases] for name, values in numbers.items()},
        "results": [_result(results.by_case.get(case), probability, texts) for case in cases],
    }


def _score(parts: Sequence[float | None]) -> float | None:
    there = [part for part in parts if part is not None]
    return float(harmonic_mean(there)) if len(there) == len(parts) else None


def _result(result: Result | None, probability: Probability, texts: int) -> dict[str, Any] | None:
    """`said`: of each kind and prompt, of each target its probability, tokens that are the most probable, tokens."""
    if result is None:
        return None
    found: dict[str, Any] = {}
    if result.answers is not None:
        found["said"] = [
            [
                [
                    [
                        _short(math.exp(each.mean if probability == "per_token" else each.total)),
                        each.hits,
                        each.n_tokens,
                    ]
                    for each in one
                ]
                for one in kind
            ]
            for kind in result.answers.values()
        ]
    optional = {
        "texts": result.texts[:texts],
        "health": {name: _short(value) for name, value in _health(result, probability).items()},
        "error": result.error,
        "edit": result.edit,
        "seconds": {name: _short(value) for name, value in result.seconds.items()},
    }
    return found | {name: value for name, value in optional.items() if value}


def _health(result: Result, probability: Probability) -> dict[str, Any]:
    """The edit's side effects, with the new object's probability taken as everywhere on the page."""
    health = dict(result.health or {})
    scores = [score for scores in (result.answers["rewrite"] if result.answers else ()) for score in scores]
    if probability == "per_token" and scores:
        for name in ("probability_before", "probability_after"):
            stored = health.get(name)  # of all tokens
            if isinstance(stored, float) and stored >= 0:
                health[name] = stored ** (1 / scores[0].n_tokens)
    return health


def _short(value: Any) -> Any:
    """A number with four digits; None if it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _texts_kept(runs: Sequence[Run]) -> int:
    """Number of texts for each record and row that fit into the page; at least one."""
    lengths: list[int] = []  # of all first texts, all second texts, ...
    for run in runs:
        for results in (run.unedited, *run.edited.values()):
            for result in results.by_case.values():
                lengths += [0] * (len(result.texts) - len(lengths))
                for place, text in enumerate(result.texts):
                    lengths[place] += len(text)
    kept = next((n for n in range(len(lengths), 1, -1) if sum(lengths[:n]) <= TEXTS), 1)
    return min(kept, max(1, len(lengths)))


def _about(run: Run) -> str:
    """One line about a run: records, dtype, device, seed."""
    said = run.settings
    records = said.get("records", {})
    parts = [str(run.folder), f"{len(run.records)} records of {records.get('source', 'a set')}"]
    parts += [f"{name} {said[name]}" for name in ("dtype", "device", "seed") if name in said]
    return " · ".join(parts)


def _beside(name: str) -> str:
    return files("errata.evaluation").joinpath(name).read_text(encoding="utf-8")
