"""Tables of rewrite requests: every way to write one, and what is told of those that are none."""

from __future__ import annotations

import json

import pytest

from errata.base.errors import ConfigError, ResultFileError
from errata.base.facts import Fact, Rewrite
from errata.data.requests import RequestRow, read_requests
from samples import sample

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
        "its requested_rewrite is an object": {"requested_rewrite": "JAMES"},
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
        ({"a": 1}, ".json", "not a list of requests"),
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
    with pytest.raises(ConfigError, match="not a table of requests"):
        read_requests(tmp_path / "requests.txt")


@pytest.mark.parametrize("name", ["counterfact_nested", "counterfact_flat"])
def test_samples_of_counterfact(name):
    path = sample(name)
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


# ---- published sets of requests --------------------------------------------------------------------------

KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": ["Munich", "München"],
    "portability": {"Reasoning": [{"prompt": "x", "ground_truth": [["y"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "x", "ground_truth": [["y"]]}]},
}
FASTEDIT = [
    {"prompt": "The head of {} is", "subject": "the club", "target": "Ann Lee", "queries": ["Who heads the club?"]},
    {"prompt": "{}的首都是", "subject": "法国", "target": "柏林", "queries": []},
]
TRACING = {
    "relation": "{} plays",
    "prompt": "Ann Lee plays",
    "subject": " Ann Lee",
    "target_true": " chess",
    "target_false": " golf",
    "target_true_id": "Q1",
    "target_false_id": "Q2",
    "relation_prefix": "",
    "relation_suffix": " plays",
    "relation_id": "P641",
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q224"},
            "target_true": {"str": "Norway", "id": "Q20"},
            "subject": "Ann Lee",
            "question": "What is the citizenship of Ann Lee?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Oslo", "id": "Q585"},
            "target_true": {"str": "Zagreb", "id": "Q1435"},
            "subject": "Croatia",
            "question": "What is the capital of Croatia?",
        },
    ],
    "questions": ["a", "b", "c"],
    "answer": "Oslo",
    "answer_alias": [],
    "new_answer": "Zagreb",
    "new_answer_alias": [],
    "single_hops": [],
    "new_single_hops": [],
    "orig": {"triples": []},
}


def ripple(new: str, old: str | None) -> dict:
    edit = {"prompt": new, "subject_id": "Q38111", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q858"}
    if old is not None:
        edit["original_fact"] = {"prompt": old, "subject_id": "Q38111", "target_id": "Q30"}
    return {"example_type": "popular", "edit": edit, "Relation_Specificity": [], "Logical_Generalization": []}


def rewrites(found) -> list[Rewrite]:
    return [row.rewrite for row in found.rows]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_sets_of_other_tools(tmp_path, ending):
    found = table(tmp_path, [KNOWEDIT, {**KNOWEDIT, "prompt": "{} lived in", "ground_truth": []}], ending)
    assert rewrites(found) == [
        Fact("Leo Arons", "The place of death of {} is", "Munich").rewrite("Berlin"),
        Fact("Leo Arons", "{} lived in").rewrite("Berlin"),
    ]
    assert (found.bad, found.unread) == ((), ())
    found = table(tmp_path, FASTEDIT, ending)
    assert [rewrite.statement for rewrite in rewrites(found)] == ["The head of the club is Ann Lee", "法国的首都是柏林"]
    assert (found.bad, found.unread) == ((), ())
    found = table(tmp_path, [TRACING], ending)
    assert rewrites(found) == [Fact("Ann Lee", "{} plays", "chess").rewrite("golf")]
    assert (found.bad, found.unread) == ((), ())


def test_each_edit_of_an_entry_is_a_row_and_is_there_once(tmp_path):
    one = {**MQUAKE, "case_id": 2, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    found = table(tmp_path, [MQUAKE, one, {"case_id": 3, "requested_rewrite": ["x"]}], ".json")
    assert rewrites(found) == [
        Fact("Ann Lee", "{} is a citizen of", "Norway").rewrite("Croatia"),
        Fact("Croatia", "The capital of {} is", "Zagreb").rewrite("Oslo"),
    ]
    assert [(row.line, row.name) for row in found.rows] == [(1, "1.1"), (1, "1.2")]
    assert [each.line for each in found.bad] == [3]
    assert found.unread == ()


@pytest.mark.parametrize(
    ("sentence", "prompt", "subject", "object_"),
    [
        ("The name of the mother of Ann Lee is {}.", "The name of the mother of {} is", "Ann Lee", "Eve"),
        ("The names of the siblings of Ann Lee are {}.", "The names of the siblings of {} are", "Ann Lee", "Eve"),
        ("The gender of Ann Lee is {}.", "The gender of {} is", "Ann Lee", "female"),
        ("The place of birth of Ann of York is {}.", "The place of birth of {} is", "Ann of York", "Isle of Man"),
        ("The number of children Ann Lee has is {}.", "The number of children {} has is", "Ann Lee", "3"),
        ("The name of the award Ann Lee won is {}.", "The name of the award {} won is", "Ann Lee", "a cup"),
        ("The name of the position held by Ann is {}.", "The name of the position held by {} is", "Ann", "king of x"),
        ("The name of the currency in Japan is {}.", "The name of the currency in {} is", "Japan", "won"),
        ("The name of the country which Rome is the capital of is {}.",
         "The name of the country which {} is the capital of is", "Rome", "Spain"),
        ("The name of the country which Rome is associated with is {}.",
         "The name of the country which {} is associated with is", "Rome", "Spain"),
        ("The name of the league which Ann plays in is {}.", "The name of the league which {} plays in is", "Ann", "A"),
        ("Star Song is followed by {}.", "{} is followed by", "Star Song", "St. Song"),
        ("Star Song follows {}.", "{} follows", "Star Song", "St. Song"),
    ],
)  # fmt: skip
def test_edits_of_ripple_edits(tmp_path, sentence, prompt, subject, object_):
    entries = [ripple(sentence.format(object_), sentence.format("something else"))]
    assert rewrites(table(tmp_path, entries, ".json")) == [Fact(subject, prompt, "something else").rewrite(object_)]
    entries = [ripple(sentence.format(object_), None)]
    assert rewrites(table(tmp_path, entries, ".json")) == [Fact(subject, prompt).rewrite(object_)]


def test_edits_of_ripple_edits_that_cannot_be_told(tmp_path):
    good = ripple("The gender of Ann is female.", None)
    wrong = [
        ripple("Ann was not there.", None),
        ripple("The gender of Ann is female.", "The gender of Eve is male."),
        {"edit": {"prompt": 3, "subject_id": "Q1"}},
    ]
    found = table(tmp_path, [good, *wrong], ".json")
    assert [each.line for each in found.bad] == [2, 3, 4]
    for each, part in zip(found.bad, ["of no form", "not told as its edit", "is text, not int"], strict=True):
        assert part in each.reason


def test_names_and_separators(tmp_path):
    found = table(tmp_path, "Subject,Prompt,New Object,FROM,Separator\nRome,x {},Oslo,Bern,none\n", ".csv")
    assert rewrites(found) == [Fact("Rome", "x {}", "Bern", "").rewrite("Oslo")]
    (row,) = table(tmp_path, [{"Requested_Rewrite": {**JAMES, "Separator": " "}}]).rows
    assert row.rewrite.separator == " "
    with pytest.raises(ResultFileError, match="has no column 'objct', which is like 'object'"):
        table(tmp_path, "subject,prompt,to,objct\nRome,x {},Oslo,Bern\n", ".csv")
