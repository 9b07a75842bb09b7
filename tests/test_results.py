"""Run folders as they are read: lines there and back, folders that grow, and folders that are none of ours."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from errata.base.errors import ResultFileError
from errata.base.facts import Fact
from errata.data.records import Record
from errata.evaluation.results import (
    Result,
    Run,
    by_case,
    read_back,
    written_out,
)
from errata.models.scoring import Score
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.registry import task_of_records
from errata.tasks.zsre import ZSRE
from helpers.scores import numbers_of
from made_runs import (
    counterfact_records,
    counterfact_result,
    counterfact_run,
    failed,
    write_run,
    zsre_records,
    zsre_run,
)

SAID = ((Score(-1.25, 2, 1), Score(-0.1 - 0.2, 3, 0)),)
ANSWERS = {"rewrite": SAID, "paraphrase": SAID * 2, "neighborhood": SAID * 3, "attribute": ()}
CASES = {
    case: Record(case, "", Fact("Rome", "{} is", "a").rewrite("b"), ("p",) * 2, ("n",) * 3, (), ()) for case in (6, 7)
}
HEALTH = {"drift": 0.25, "disabling": False, "relative_norm": 0.1}
LINE = Result(7, ANSWERS, ("Röm is “it”",), 6.1, 0.3, 21.5, HEALTH, None, "edits/r/7.safetensors", {"ask": 0.5})


def there_and_back(result: Result) -> Result:
    return Result.from_line(json.loads(json.dumps(result.as_line(), allow_nan=False)))


@pytest.mark.parametrize(
    "result",
    [
        LINE,
        Result(0, None, error="no"),
        Result(0, {"rewrite": SAID, "paraphrase": (), "locality": SAID}),
        replace(LINE, entropy=None, reference=None, essence=None, health=None, texts=()),
    ],
)
def test_a_line_is_read_back_as_it_was(result):
    assert there_and_back(result) == result


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_left_out_and_count_as_impossible(value):
    broken = ((Score(value, 2, 0), Score(-1.0, 1, 1)),)
    health = {"drift": value, "disabling": True, "residual": value}
    result = replace(
        LINE, answers={**dict.fromkeys(ANSWERS, ()), "rewrite": broken}, entropy=value, essence=value, health=health
    )
    found = there_and_back(result)
    assert found.answers["rewrite"][0][0] == Score(-math.inf, 2, 0)
    assert (found.entropy, found.essence) == (None, None)
    assert found.health == {"drift": None, "disabling": True, "residual": None}
    assert numbers_of(found.answers)["es"] == 0.0
    assert numbers_of(found.answers)["em"] == -math.exp(-1.0)
    assert there_and_back(found) == found


@pytest.mark.parametrize(
    "change",
    [
        {"case": 8},
        {"case": None},
        {"case": []},
        {"answers": None},
        {"answers": 3},
        {"answers": {}},
        {"answers": {"rewrite": [[["x", 1, 1]]]}},
        {"answers": {**LINE.as_line()["answers"], "rewrite": [[[-1.0]]]}},
        {"answers": {**LINE.as_line()["answers"], "other": []}},
        {"texts": None},
    ],
)
def test_lines_that_were_changed_by_hand_are_refused(change, tmp_path):
    with pytest.raises(ResultFileError, match=r"line 3 of .* changed by hand"):
        by_case([replace(LINE, case=6).as_line(), {**LINE.as_line(), **change}], CASES, tmp_path, COUNTERFACT)


def test_lines_that_lack_something_or_are_there_twice_are_refused(tmp_path):
    line = LINE.as_line()
    for key in line:
        with pytest.raises(ResultFileError, match="line 2"):
            by_case([{name: value for name, value in line.items() if name != key}], CASES, tmp_path, COUNTERFACT)
    with pytest.raises(ResultFileError, match=r"line 3 .* twice"):
        by_case([line, line], CASES, tmp_path, COUNTERFACT)


@pytest.mark.parametrize("records", [counterfact_records(5), zsre_records(3)])
def test_records_are_read_back_as_they_were(records, tmp_path):
    (tmp_path / "r.json").write_text(written_out(records), encoding="utf-8")
    assert read_back(tmp_path / "r.json", task_of_records(records)) == records


def test_records_of_any_text_are_read_back(tmp_path):
    odd = Record(0, "", Fact("a\u2028b\n“c”", "{} \x00is", "").rewrite("é𝄞"), (), (), (), ("\t",), ("Q1", ""))
    (tmp_path / "r.json").write_bytes(written_out([odd]).encode())
    assert read_back(tmp_path / "r.json", COUNTERFACT) == [odd]


@pytest.mark.parametrize("text", ["", "{}x", "3", "null", '["x"]', "[{}]", '[{"case_id": 1, "rewrite": {"fact": 3}}]'])
def test_records_that_are_none(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ResultFileError, match="Begin another folder"):
        read_back(tmp_path / "r.json", COUNTERFACT)


def test_numbers_of_a_run(tmp_path):
    run = Run.load(counterfact_run(tmp_path / "r", count=6))
    numbers = run.numbers(run.edited["rome"])
    assert tuple(numbers) == tuple(column.name for column in COUNTERFACT.columns if column.name != "s")
    for case, result in run.edited["rome"].by_case.items():
        scores = numbers_of(result.answers)
        assert {name: numbers[name][case] for name in scores} == scores
        assert (numbers["ge"][case], numbers["rs"][case]) == (result.entropy, result.reference)
        assert numbers["essence"][case] == result.essence
    total = run.numbers(run.edited["rome"], "total")
    assert total["es"] == numbers["es"]  # objects of one token
    zsre = Run.load(zsre_run(tmp_path / "z"))
    assert tuple(zsre.numbers(zsre.unedited)) == tuple(column.name for column in ZSRE.columns)


def test_failed_edits_count_as_the_unedited_model_has_it(tmp_path):
    records = [replace(record, attribute=()) for record in counterfact_records(4)]
    unedited = [counterfact_result(record, "unedited") for record in records[:2]] + [failed(records[2])]
    edited = [counterfact_result(records[0], "rome"), *map(failed, records[1:])]
    run = Run.load(write_run(tmp_path / "r", records, {"unedited": unedited, "rome": edited}))
    numbers, before = run.numbers(run.edited["rome"]), run.numbers(run.unedited)
    for name in numbers:
        # The third cannot even be asked; of the fourth the unedited model has not come yet.
        assert [*numbers[name]] == [0, 1]
        assert numbers[name][1] == before[name][1]
    assert numbers["ats"] == {0: None, 1: None}


def test_a_folder_that_grows_is_read_as_far_as_it_is(tmp_path):
    folder = counterfact_run(tmp_path / "r", count=4, names=("rome",))
    path = folder / "editors" / "rome.jsonl"
    content = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    for cut in range(0, len(content) + 1, 97):
        path.write_bytes(content[:cut])
        run = Run.load(folder)
        if cut < ends[0]:
            assert not run.edited  # it has not begun
        else:
            assert len(run.edited["rome"].by_case) == sum(end <= cut for end in ends) - 1
        assert len(run.unedited.by_case) == 4


def test_rows_are_in_the_order_in_which_they_were_begun(tmp_path):
    folder = counterfact_run(tmp_path / "r", count=1, names=("rome", "ft", "kn"))
    assert [*Run.load(folder).edited] == ["rome", "ft", "kn"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "unedited.jsonl").unlink(), "is not a run folder"),
        (lambda folder: (folder / "records.json").unlink(), "records.json is broken"),
        (lambda folder: (folder / "records.json").write_text("[]"), "line 2 of"),
        (lambda folder: (folder / "unedited.jsonl").write_text(""), "ends within its first line"),
        (lambda folder: (folder / "unedited.jsonl").write_text('{"kind": "traces", "version": 1}\n'), "traces"),
        (lambda folder: (folder / "unedited.jsonl").write_text('{"kind": "evaluation", "version": 9}\n'), "Upgrade"),
        (
            lambda folder: (folder / "unedited.jsonl").write_text('{"kind": "evaluation", "version": 1}\n'),
            "Field required",
        ),
        (lambda folder: (folder / "editors" / "x.jsonl").write_text("hello\n"), "not written by errata"),
        (lambda folder: _of_another_run(folder, {"fingerprint": "ff00"}), "rome.jsonl is of another run .*fingerprint"),
        (lambda folder: _of_another_run(folder, {"seed": 1, "extra": 2}), "other extra, seed"),
        (lambda folder: _other_records(folder), "records.json holds other records"),
        (lambda folder: _cut_in_the_middle(folder / "editors" / "rome.jsonl"), "line 2 of .* is broken"),
    ],
)
def test_folders_that_are_none_or_broken(tmp_path, spoil, message):
    folder = counterfact_run(tmp_path / "r", count=3)
    spoil(folder)
    with pytest.raises(ResultFileError, match=message):
        Run.load(folder)


def _of_another_run(folder, changes):
    path = folder / "editors" / "rome.jsonl"
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(header) | changes) + "\n" + rest)


def _other_records(folder):
    path = folder / "records.json"
    path.write_text(path.read_text().replace("comes from", "came from"))


def _cut_in_the_middle(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")


@pytest.mark.parametrize("name", ["nothing", "."])
def test_no_folder_of_a_run(tmp_path, name):
    with pytest.raises(ResultFileError, match="errata evaluate --out"):
        Run.load(tmp_path / name)
