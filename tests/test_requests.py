"""Tables of rewrite requests: every way to write one, and what is told of those that are none."""

from __future__ import annotations

import json

import pytest

from errata.base.errors import ConfigError, ResultFileError
from errata.base.facts import Fact, Rewrite
from errata.benchmarks.requests import RequestRow, read_requests
from goldens import SHARED

NEEDLE = Rewrite(Fact("The Space Needle", "{} is located in the city of", "Seattle"), "Paris")
ROME = Rewrite(Fact("Rome", "The capital {} is in"), "France")
JAMES = {"prompt": "{} plays the sport of", "subject": "LeBron James", "target_new": {"str": "football"}}


def table(tmp_path, content, ending: str = ".jsonl"):
    path = tmp_path / f"requests{ending}"
    if ending == ".jsonl":
        content = "\n".join(map(json.dumps, content))
    elif ending == ".json":
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_requests(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize(("new", "old"), [("new_object", "object"), ("To", "From"), ("target_new", "target_true")])
def test_columns(tmp_path, ending, new, old):
    comma = "," if ending == ".csv" else "\t"
    lines = [
        ["subject", "prompt", new, old, "name", "weight"],
        ["The Space Needle", "The Space Needle is located in the city of", "Paris", "Seattle", "needle", "3"],
        ["Rome", "The capital {} is in", " France ", "", "", ""],
    ]
    found = table(tmp_path, "\n".join(comma.join(line) for line in lines), ending)
    assert found.rows == (RequestRow(2, NEEDLE, "needle"), RequestRow(3, ROME, "3"))
    assert (found.bad, found.contradictions, found.unit) == ((), (), "line")


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_requests_of_the_published_code_and_records_of_counterfact(tmp_path, ending):
    inner = {**JAMES, "target_true": {"str": "basketball", "id": "Q5372"}, "relation_id": "P641"}
    found = table(
        tmp_path, [JAMES, {"case_id": 7, "requested_rewrite": inner, "paraphrase_prompts": ["LeBron"]}], ending
    )
    assert [row.rewrite for row in found.rows] == [Rewrite(Fact("LeBron James", "{} plays the sport of"), "football")]
    assert "the same request" in found.bad[0].reason  # the old object makes no other request
    inner["target_new"] = {"str": "chess"}
    (_, row) = table(tmp_path, [JAMES, {"case_id": 7, "requested_rewrite": inner}], ending).rows
    assert row.name == "7"
    assert (row.rewrite.fact.object, row.rewrite.new_object) == ("basketball", "chess")


def test_each_bad_line_is_told_and_the_others_are_read(tmp_path):
    wrong = {
        "new object is empty": {**JAMES, "target_new": {"str": " "}},
        "its target_new is text, not dict": {**JAMES, "target_new": {"id": "Q1"}},
        "its target_new is text, not list": {**JAMES, "target_new": ["football"]},
        "its target_true is text": {**JAMES, "target_true": {"str": 3}},
        "subject is empty": {**JAMES, "subject": None},
        "2 places": {**JAMES, "prompt": "{} {}"},
        "its requested_rewrite is an object": {"requested_rewrite": [JAMES]},
        "no JSON object": [JAMES],
        "half a character": {**JAMES, "target_new": {"str": "\ud800"}},
        "the name": {**JAMES, "name": "\ud800"},
    }
    found = table(tmp_path, [*wrong.values(), JAMES])
    assert [row.line for row in found.rows] == [len(wrong) + 1]
    for number, (part, each) in enumerate(zip(wrong, found.bad, strict=True), 1):
        assert each.line == number
        assert part in each.reason


def test_contradictions_are_kept_and_told(tmp_path):
    other = {**JAMES, "target_new": "chess"}
    elsewhere = {**JAMES, "prompt": "{} is a master of", "target_new": "chess"}
    found = table(tmp_path, [JAMES, elsewhere, other, JAMES])
    assert [row.line for row in found.rows] == [1, 2, 3]
    assert [each.line for each in found.bad] == [4]
    assert [[row.line for row in rows] for rows in found.contradictions] == [[1, 3]]


@pytest.mark.parametrize(
    ("content", "ending", "message"),
    [
        ("subject,prompt\nRome,{} is in", ".csv", "names no columns of requests .* new_object"),
        ("", ".csv", "no request in .* empty"),
        ("{}", ".jsonl", "no request in .* line 1"),
        ({"a": 1}, ".json", "no list of requests"),
        (b"\xff\xfea", ".tsv", "files of requests are UTF-8"),
    ],
)
def test_files_that_are_no_such_table(tmp_path, content, ending, message):
    if ending == ".jsonl":
        content = [json.loads(content)]
    with pytest.raises(ResultFileError, match=message):
        table(tmp_path, content, ending)


def test_other_files(tmp_path):
    with pytest.raises(ResultFileError, match="there is no file"):
        read_requests(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="no table of requests"):
        read_requests(tmp_path / "requests.txt")


@pytest.mark.parametrize("name", ["counterfact_nested_sample.json", "counterfact_flat_sample.json"])
def test_samples_of_counterfact(name):
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: the samples are not part of the package")
    found = read_requests(path)
    entries = json.loads(path.read_text())
    assert len(found.rows) + len(found.bad) == len(entries)
    assert len(found.rows) >= 0.9 * len(entries)
    assert {row.name for row in found.rows} <= {str(entry["case_id"]) for entry in entries}
    for row in found.rows:
        entry = entries[row.line - 1]
        inner = entry.get("requested_rewrite", entry)
        new = inner["target_new"]
        assert row.rewrite.new_object == (new if isinstance(new, str) else new["str"])
        assert row.rewrite.fact.text == inner["prompt"].replace("{}", inner["subject"])
