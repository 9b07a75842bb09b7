"""Tasks: those of errata, one that another package brings, and a metric from outside."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import errata
from errata.base.errors import ConfigError
from errata.base.facts import Fact
from errata.data.records import Record, WikiBigEditRecord, ZsreRecord
from errata.editors.editor import Editor
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.evaluation import formats
from errata.evaluation.page import write_page
from errata.evaluation.report import table
from errata.evaluation.results import Run
from errata.evaluation.runner import evaluate
from errata.evaluation.setting_scores import SettingScores
from errata.evaluation.training_examples import training_examples
from errata.models.loading import load_pretrained
from errata.models.scoring import score
from errata.models.weights import down_weight_name
from errata.statistics import SecondMoment
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.describe import describe
from errata.tasks.registry import TASKS, task_of, task_of_records, tasks
from errata.tasks.zsre import ZSRE
from made_runs import counterfact_run
from samples import sample
from tiny import byte_tokenizer, tiny

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "data.md"
OLD_RUNS = Path(__file__).parent / "old_runs"
POINTS = """[errata.tasks]
recall = recall_task:RECALL

[errata.metrics]
counterfact.margin = recall_task:MARGIN
"""
ENTRIES = [
    {
        "subject": subject,
        "template": "{} is in",
        "new_object": new,
        "others": ["Naples is in", "Dante wrote in"],
        "other_objects": ["Italy", "Italian"],
    }
    for subject, new in (("Rome", "Paris"), ("", "Oslo"), ("The Space Needle", "the city"))
]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the package that the guide shows, as pip would have installed it."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    (code,) = [text for text in found if "RECALL = Task(" in text]
    folder = tmp_path / "site"
    info = folder / "recall_task-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "recall_task.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recall-task\nVersion: 1.0\n")

    def brings(points: str = POINTS) -> Path:
        (info / "entry_points.txt").write_text(points)
        importlib.invalidate_caches()
        return folder

    brings()
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "recall.json").write_text(json.dumps(ENTRIES))
    yield brings
    sys.modules.pop("recall_task", None)


def model():
    return load_pretrained((tiny("gpt2", layers=3), byte_tokenizer()), name="tiny")


def editor(live) -> Editor:
    """An editor whose edits move what the model says."""

    def make(live, rewrites, *, progress=None):
        import torch

        drawn = torch.Generator().manual_seed(0)
        write, read = (torch.randn(n, generator=drawn) for n in (live.d_model, live.d_mlp))
        return [Edit.of(live, [RankOne(down_weight_name(live, 1), write, read)], "made", [each]) for each in rewrites]

    return Editor("made", {"layer": 1}, make, model=live)


# ---- a task from outside ------------------------------------------------------------------------------


def test_a_task_from_outside_is_read_evaluated_reported_and_shown(outside, tmp_path):
    found = errata.read_records(tmp_path / "recall.json")
    assert (found.task.name, [bad.line for bad in found.bad]) == ("recall", [2])
    assert [*tasks()] == [*TASKS, "recall"]
    assert task_of_records(found.records).title == "Recall"
    live = model()
    run = evaluate(live, found, {"made": editor(live)}, tmp_path / "run", source="recall.json")
    assert Run.load(tmp_path / "run").records == run.records
    for results, edits in ((run.unedited, None), (run.edited["made"], editor(live))):
        numbers = run.numbers(results)
        assert [*numbers] == ["new", "kept"]
        for record in found.records:
            edit = edits and edits.make(live, [record.rewrite])[0]
            if edit:
                edit.apply(live)
            said = score(live, [record.rewrite.text], [record.rewrite.new_object])
            others = score(live, *map(list, zip(*record.others, strict=True)))
            if edit:
                edit.undo(live)
            assert numbers["new"][record.case_id] == said[0].greedy
            assert numbers["kept"][record.case_id] == sum(each.greedy for each in others) / 2
            hits = [one.hits for (one,) in results.by_case[record.case_id].answers["others"]]
            assert hits == [each.hits for each in others]
    made = table([run])
    assert made.title == "Recall: tiny"
    assert made.legend()[-1] == "Fails, the whole interval: New below 50."
    for kind in ("markdown", "latex", "csv", "json"):
        text = formats.as_text(made, kind)
        assert "made" in text
        assert "Kept" in text or "kept" in text
    write_page(tmp_path / "page.html", [run], made)
    assert "Naples is in" in (tmp_path / "page.html").read_text()
    assert SettingScores.of(run, "layer").metrics == ("new", "kept")
    assert describe(found).kind == "recall"
    (example, _) = training_examples(found.task, found.records)
    assert (example.equivalents, example.others) == (("Rome is in",), found.records[0].others)


def test_a_task_from_outside_on_the_command_line(outside, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(outside()), *sys.path])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "errata.cli.app", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    layers = ("--layers", "4", "--tokens", "subject_last", "--identity", "--editor", "rome:steps=2,prefixes=none")
    done = run("sweep", "--data", "recall.json", *layers, "--out", "run", "--json")
    assert done.returncode == 1, done.stderr
    assert "recall.json, entry 2: its subject is empty" in done.stderr
    assert set(json.loads(done.stdout)["unedited"]) == {"new", "kept"}
    done = run("report", "run", "--page", "page.html", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert [column["name"] for column in json.loads(done.stdout)["columns"]] == ["new", "kept"]
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_a_run_of_a_task_that_is_gone_says_so(outside, tmp_path, monkeypatch):
    found = errata.read_records(tmp_path / "recall.json")
    evaluate(model(), found.records, {}, tmp_path / "run")
    outside("")
    with pytest.raises(errata.ErrataError, match=r"unknown task 'recall': choose from counterfact, zsre, wikibigedit"):
        Run.load(tmp_path / "run")


def test_a_metric_from_outside_is_a_column(outside, tmp_path):
    run = Run.load(counterfact_run(tmp_path / "run", 5))
    numbers = run.numbers(run.edited["rome"])["margin"]
    for case, result in run.edited["rome"].by_case.items():
        ((new, old),) = result.answers["rewrite"]
        assert numbers[case] == new.total - old.total
    row = json.loads(formats.as_text(table([run]), "json"))["rows"]
    (mean,) = [each["values"]["margin"]["mean"] for each in row if (each["name"], each["source"]) == ("rome", "run")]
    assert mean == pytest.approx(math.fsum(numbers.values()) / 5)
    assert "| Margin |" in formats.as_text(table([run]), "markdown")
    write_page(tmp_path / "page.html", [run], table([run]))
    assert "Margin" in (tmp_path / "page.html").read_text()
    assert COUNTERFACT.column("margin") is None  # the task itself is as it was


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("[errata.tasks]\nzsre = recall_task:RECALL", "has the name of another task"),
        ("[errata.tasks]\nrecall = nowhere:RECALL", "of recall-task .* cannot be loaded: ModuleNotFoundError"),
        ("[errata.tasks]\nrecall = recall_task:MARGIN", "is not a Task called 'recall'"),
        ("[errata.tasks]\nother = recall_task:RECALL", "is not a Task called 'other'"),
        ("[errata.metrics]\nzsre.efficacy = recall_task:MARGIN", "has the name of another metric of zsre"),
        ("[errata.metrics]\nmargin = recall_task:MARGIN", "belongs to no task that is installed"),
        ("[errata.metrics]\nzsre.margin = recall_task:RECALL", "is not a Column called 'margin'"),
    ],
)
def test_what_cannot_be_used(outside, points, message):
    outside(points)
    with pytest.raises(ConfigError, match=message):
        tasks()
    assert task_of("counterfact") == COUNTERFACT  # the others work all the same


# ---- errata's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_describes_itself(task):
    names = [column.name for column in task.columns]
    assert len(set(names)) == len(names)
    assert all(part in names for column in task.columns for part in column.harmonic)
    assert all(column.what for column in task.columns)
    for paper in task.paper.values():
        assert set(paper.columns) <= set(names)
        assert all(len(row) == len(paper.columns) for row in paper.rows.values())
    assert next(iter(task.parts)) == "subjects"


def test_questions_and_answers_are_in_one_order():
    record = ZsreRecord(0, Fact("Rome", "Where is {}?").rewrite("Paris"), ("a", "b"), (("c", "x"),))
    asked = ZSRE.requests(record)
    assert [request.prompt for request in asked] == ["Where is Rome?", "a", "b", "c"]
    assert ZSRE.scored(record, asked) == {
        "rewrite": (asked[0],),
        "paraphrase": tuple(asked[1:3]),
        "locality": (asked[3],),
    }


def test_records_of_no_task():
    with pytest.raises(ConfigError, match="records are of class str, which belongs to no known task"):
        task_of_records(["x"])


WIKI = {
    "subject": "Rome",
    "prompt": "Where is Rome?",
    "target_new": "Paris",
    "rephrase_prompt": "In which city is Rome?",
    "locality_prompt": ["Who is it?", "What is it?"],
    "locality_ground_truth": ["He", "This"],
}


def test_flat_questions_are_told_from_flat_counterfact_by_the_old_object(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps([WIKI, {**WIKI, "locality_prompt": "One"}]))
    found = errata.read_records(tmp_path / "w.json")
    assert found.records == (
        WikiBigEditRecord(
            0,
            Fact("Rome", "Where is {}?").rewrite("Paris"),
            ("In which city is Rome?",),
            (("Who is it?", "He"), ("What is it?", "This")),
        ),
    )
    assert [(bad.line, bad.reason) for bad in found.bad] == [
        (2, "it has 1 locality_prompt and 2 locality_ground_truth: one for each")
    ]
    (tmp_path / "c.json").write_text(json.dumps([{**WIKI, "ground_truth": "Italy", "locality_ground_truth": "Italy"}]))
    assert isinstance(errata.read_records(tmp_path / "c.json").records[0], Record)


def test_wikibigedit_is_read_and_evaluated(tmp_path):
    found = errata.read_records(sample("wikibigedit"))
    assert (found.task.name, len(found.records) + len(found.bad)) == ("wikibigedit", 200)
    assert len(found.records) > 190
    live = model()
    rome = errata.rome.bind(
        live, layer=1, prefixes="none", steps=2, second_moment=SecondMoment.identity(live.d_mlp), fact_token="last"
    )
    run = evaluate(live, found.records[:3], {"rome": rome}, tmp_path / "run")
    numbers = run.numbers(run.edited["rome"])
    assert [*numbers] == ["efficacy", "paraphrase", "specificity"]
    for record in found.records[:3]:
        (plain,) = score(live, [record.rewrite.text], [record.rewrite.new_object])
        assert run.numbers(run.unedited)["efficacy"][record.case_id] == plain.hits / plain.n_tokens
    assert table([run]).title == "WikiBigEdit: tiny"


# ---- run folders of errata before tasks were objects ----------------------------------------------------


@pytest.mark.parametrize("name", ["counterfact", "zsre"])
def test_old_run_folders_load_with_the_numbers_that_they_had(name):
    run = Run.load(OLD_RUNS / name)
    assert run.task is TASKS[name]
    rows = json.loads(formats.as_text(table([run]), "json"))["rows"]
    wanted = json.loads((OLD_RUNS / f"{name}.json").read_text())
    assert [{key: row[key] for key in wanted[0]} for row in rows] == wanted
