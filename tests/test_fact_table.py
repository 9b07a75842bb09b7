"""Tables of facts: every format, and every way in which a line can be no fact."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.base.errors import ConfigError, OutputError, ResultFileError
from errata.base.facts import Fact
from errata.data.fact_table import FACTS, FactRow, read_facts, unread_message, write_facts
from samples import sample

NEEDLE = Fact("The Space Needle", "{} is located in the city of", "Seattle")
ROME = Fact("Rome", "The capital {} is in", "Italy")


def table(tmp_path, content: str | bytes, ending: str = ".csv"):
    path = tmp_path / f"facts{ending}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_facts(path)


def bad(found) -> dict[int, str]:
    return {each.line: each.reason for each in found.bad}


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".CSV"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns(tmp_path, ending, newline, mark):
    lines = [
        ["Relation", "subject", "prompt", "object", "weight"],
        ["city", "The Space Needle", "{} is located in the city of", " Seattle ", "0.5"],
        [],
        ["", "Rome", "The capital {} is in", "Italy", ""],
    ]
    comma = "," if ending.lower() == ".csv" else "\t"
    found = table(tmp_path, mark + newline.join(comma.join(line) for line in lines) + newline, ending)
    assert found.rows == (FactRow(2, NEEDLE, "city", "2"), FactRow(4, ROME, "", "4"))
    assert not found.bad
    assert found.unit == "line"


def test_quotes_and_newlines_in_fields(tmp_path):
    content = 'subject,prompt\n"Tom,\nDick","{} said\n ""no"" to"\n\nRome,{} is in\n'
    found = table(tmp_path, content)
    assert [(row.line, row.fact.subject) for row in found.rows] == [(2, "Tom,\nDick"), (6, "Rome")]
    assert found.rows[0].fact.prompt == '{} said\n "no" to'


def test_a_long_field_over_many_lines_is_one_field(tmp_path):
    long = "\n".join(f"Oslo {i},{{}} is in,Norway" for i in range(8000))
    assert len(long) > 131_072  # where the csv module gives up unless told
    found = table(tmp_path, f'subject,prompt,notes\nRome,{{}} is in,"{long}"\nBern,{{}} is in,\n')
    assert [(row.line, row.fact.subject) for row in found.rows] == [(2, "Rome"), (8002, "Bern")]
    assert not found.bad


def test_each_bad_line_is_told_and_the_others_are_read(tmp_path):
    lines = [
        b"subject,prompt,object,relation",
        b"Rome,The capital {} is in,Italy,",
        b",{} is in,France,",
        b"Paris,,France,",
        b"Paris,{} and {} are in,France,",
        b"Paris,The capital is in,France,",
        b"Paris,Paris is Paris in,France,",
        b"Paris,In {}, the river is,Seine,",
        b"Z\xfcrich,{} is in,Switzerland,",
        b'"Heroes,{} is by,David Bowie,',
        b'"Weird Al" Yankovic,{} is from,California,',
        b" Rome , The capital {} is in , Italy,again",
        b",,,",
        b"Bern,{} is in",
        b"Bern,{} is in,,",
    ]
    found = table(tmp_path, b"\n".join(lines))
    assert [(row.line, row.fact.subject) for row in found.rows] == [(2, "Rome"), (15, "Bern")]
    said = bad(found)
    assert list(said) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]
    for line, part in {
        3: "subject is empty",
        4: "prompt is empty",
        5: "2 places",
        6: "exactly once",
        7: "exactly once",
        8: "5 fields for 4 columns",
        9: "UTF-8",
        10: "cannot be taken apart",
        11: "cannot be taken apart",
        14: "2 fields for 4 columns",
        12: "the same fact as line 2",
    }.items():
        assert part in said[line], line


def test_a_filled_prompt_gets_its_place_back(tmp_path):
    content = (
        "subject,template,prompt,object\n"
        "Rome,,The capital Rome is in,Italy\n"
        "Paris,{} is the city of,Paris is the city of Paris,Hilton\n"
        "Oslo,{} lies in,,Norway\n"
        "Bern,{} lies on,The city Bern is in,Switzerland\n"
    )
    prompts = [row.fact.prompt for row in table(tmp_path, content).rows]
    assert prompts == ["The capital {} is in", "{} is the city of Paris", "{} lies in", "The city {} is in"]


KNOWN = {
    "known_id": 175,
    "subject": "Rome",
    "attribute": "Italy",
    "template": "{} is in",
    "prediction": " the heart of Italy",
    "prompt": "Rome is in the heart of",
    "relation_id": "P17",
}


def test_known_facts(tmp_path):
    wrong = [
        {**KNOWN, "subject": None},
        {**KNOWN, "subject": 1984},
        {**KNOWN, "attribute": ["Italy"]},
        {**KNOWN, "relation_id": "\ud800"},
        ["Rome"],
        KNOWN,
    ]
    row = FactRow(1, Fact("Rome", "{} is in the heart of", "Italy"), "P17", "175")
    found = table(tmp_path, json.dumps([KNOWN, *wrong]), ".json")
    assert found.rows == (row,)
    assert found.unit == "entry"
    parts = ["subject is empty", "subject is text, not int", "attribute is text, not list", "lone surrogate"]
    parts += ["no JSON object", "the same fact as entry 1"]
    for each, line, part in zip(found.bad, range(2, 8), parts, strict=True):
        assert each.line == line
        assert part in each.reason


def test_known_facts_of_the_published_code():
    path = sample("known_facts")
    found = read_facts(path)
    assert len(found.rows) == 200
    assert not found.bad
    for row, entry in zip(found.rows, json.loads(path.read_text(encoding="utf-8")), strict=True):
        assert row.fact.text == entry["prompt"]
        assert row.fact.prompt.startswith(entry["template"])
        assert (row.fact.object, row.relation) == (entry["attribute"], entry["relation_id"])
        assert row.name == str(entry["known_id"])


def test_json_lines(tmp_path):
    good = json.dumps({"subject": "Rome", "prompt": "The capital {} is in", "object": "Italy"})
    deep = "[" * 100_000
    content = f"\ufeff{good}\r\n\r\n{{broken\n[1]\n{deep}\n".encode() + good.encode().replace(b"Rome", b"R\xf4me")
    found = table(tmp_path, content, ".jsonl")
    assert found.rows == (FactRow(1, ROME, "", "1"),)
    said = bad(found)
    assert list(said) == [3, 4, 5, 6]
    assert said[3].startswith("no JSON: ")
    assert said[4] == "no JSON object"
    assert "UTF-8" in said[6]


@pytest.mark.parametrize(
    ("content", "ending", "message"),
    [
        (b"", ".csv", "is empty"),
        (b" \n\n", ".tsv", "is empty"),
        (b"", ".jsonl", "is empty"),
        (b"", ".json", "is empty"),
        (b"[]", ".json", "is empty"),
        (b"subject,prompt\n", ".csv", "is empty"),
        (b"subject,prompt\nRome,is\n", ".csv", "line 2: the prompt 'is'"),
        (b"[1]", ".json", "entry 1: no JSON object"),
        (b"{}", ".json", "not a list of facts"),
        (b"[{]", ".json", "is not JSON"),
        (b"a,b\nc,d\n", ".csv", r"names no columns of facts \(.*'a', 'b'.*needs subject and prompt"),
        (b"subject,prompt\nRome,{} is in\n", ".tsv", "with a tab between"),
        (b'"subject,prompt\n', ".csv", "names no columns of facts"),
        ("subject,prompt\nRome,{} is in\n".encode("utf-16"), ".csv", "UTF-16"),
        (b"\0\0\0", ".csv", "names no columns"),
    ],
)
def test_files_without_facts(tmp_path, content, ending, message):
    with pytest.raises(ResultFileError, match=message):
        table(tmp_path, content, ending)


def test_wrong_places(tmp_path):
    with pytest.raises(ResultFileError, match="there is no file"):
        read_facts(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"\.csv, \.tsv, \.jsonl, \.json"):
        read_facts(tmp_path / "facts.xlsx")
    with pytest.raises(ConfigError, match=r"\.csv, \.tsv, \.jsonl$"):
        write_facts(tmp_path / "facts.json", [])
    with pytest.raises(OutputError):
        write_facts("/proc/none/facts.csv", [])


# Any characters but halves of one; NUL, which csv reads only from Python 3.11 on, is left out.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).map(str.strip)
WORD = TEXT.filter(bool)


@given(
    st.lists(st.tuples(WORD, TEXT, TEXT, TEXT, WORD), min_size=1, max_size=4), st.sampled_from(["csv", "tsv", "jsonl"])
)
def test_what_is_written_is_read_back(tmp_path_factory, values, ending):
    facts = {}
    for subject, rest, object_, relation, name in values:
        if "{}" not in rest:
            facts[Fact(subject, f"{rest} {{}}".strip(), object_)] = (relation, name)
    rows = [FactRow(0, fact, *labels) for fact, labels in facts.items()]
    if not rows:
        return
    path = tmp_path_factory.mktemp("t") / f"t.{ending}"
    write_facts(path, rows)
    found = read_facts(path)
    assert [(r.fact, r.relation, r.name) for r in found.rows] == [(r.fact, r.relation, r.name) for r in rows]
    assert not found.bad


# ---- names of columns ----------------------------------------------------------------------------------

NAMES = [
    ("Subject", "PROMPT", "Answer"),
    (" subject ", "Prompt", "target_true"),
    ("subject", "prompt", "Ground Truth"),
    ("SUBJECT", "prompt", "ground-truth"),
    ("subject", "template", "Target"),
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize("names", NAMES)
def test_names_are_read_alike_in_every_format(tmp_path, names, ending):
    values = ("Rome", "The capital {} is in", "Italy")
    if ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        content = mark.join(names) + "\n" + mark.join(values) + "\n"
    else:
        entry = json.dumps(dict(zip(names, values, strict=True)))
        content = entry if ending == ".jsonl" else f"[{entry}]"
    found = table(tmp_path, content, ending)
    assert [row.fact for row in found.rows] == [ROME]
    assert found.unread == ()


@pytest.mark.parametrize(
    ("wrong", "right"), [("objekt", "object"), ("Attribut", "attribute"), ("seperator", "separator")]
)
@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_a_misspelt_column_is_refused_and_the_right_one_named(tmp_path, wrong, right, ending):
    content = f"subject,prompt,{wrong}\nRome,{{}} is in,Italy\n"
    if ending == ".json":
        content = json.dumps([{"subject": "Rome", "prompt": "{} is in", wrong: "Italy"}])
    with pytest.raises(ResultFileError, match=f"has no column '{wrong.casefold()}', which is like '{right}'"):
        table(tmp_path, content, ending)


def test_a_column_that_is_not_read_is_named(tmp_path):
    found = table(tmp_path, "subject,prompt,object,Solution,weight\nRome,{} is in,Italy,Lazio,3\n")
    assert found.unread == ("solution", "weight")
    assert "'solution' (the nearest that is: 'relation'), 'weight'" in unread_message(found.unread, FACTS)
    assert "'objects'" in unread_message(("objects",), FACTS)
    assert "(the nearest that is: 'object')" in unread_message(("objects",), FACTS)


def test_two_columns_of_one_name(tmp_path):
    with pytest.raises(ResultFileError, match="two columns 'object'"):
        table(tmp_path, "subject,prompt,object,Object\nRome,{} is in,Italy,Lazio\n")
    twice = [{"subject": "Rome", "prompt": "{} is in", "object": "Italy", "Object": "Lazio"}]
    with pytest.raises(ResultFileError, match="two of its fields are called 'object'"):
        table(tmp_path, json.dumps(twice), ".json")


def test_facts_prepared_for_tracing(tmp_path):
    entry = {
        "relation": "The mother tongue of {} is",
        "relation_prefix": "The mother tongue of",
        "relation_suffix": " is",
        "prompt": "The mother tongue of Danielle Darrieux is",
        "relation_id": "P103",
        "target_false_id": "Q1860",
        "target_true_id": "Q150",
        "target_true": " French",
        "target_false": " English",
        "subject": " Danielle Darrieux",
    }
    found = table(tmp_path, json.dumps([entry]), ".json")
    assert found.rows[0].fact == Fact("Danielle Darrieux", "The mother tongue of {} is", "French")
    assert (found.rows[0].relation, found.unread) == ("The mother tongue of {} is", ())


# ---- separators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "separator"), [("none", ""), ("space", " "), ("", None), ('" "', " "), ('"\n"', "\n"), ("None", "")]
)
def test_a_separator_in_columns(tmp_path, cell, separator):
    (row,) = table(tmp_path, f"subject,prompt,object,separator\nRome,{{}} is in,Italy,{cell}\n").rows
    assert row.fact == Fact("Rome", "{} is in", "Italy", separator)


def test_a_separator_in_json(tmp_path):
    entries = [{"subject": name, "prompt": "{} is in", "separator": separator} for name, separator in
               (("Rome", ""), ("Oslo", " "), ("Bern", None), ("Bonn", "and"), ("Nice", 3))]  # fmt: skip
    found = table(tmp_path, json.dumps(entries), ".json")
    assert [row.fact.separator for row in found.rows] == ["", " ", None]
    assert [each.line for each in found.bad] == [4, 5]
    assert "its separator is 'and': it is white space, or one of none, space" in found.bad[0].reason


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_separators_and_white_space_before_objects_are_written_and_read_back(tmp_path, ending):
    facts = [
        Fact("Rome", "{} is in", "Italy", ""),
        Fact("Rome", "{} is in", "Italy", " "),
        Fact("Rome", "{} is in", "Italy", "\n"),
        Fact("Rome", "{} is in", "Italy"),
        Fact("法国", "{}的首都是", " 巴黎"),
        Fact("Rome", "Where is {}?\nAnswer:\n", "Italy"),
    ]
    path = tmp_path / f"t.{ending}"
    write_facts(path, [FactRow(0, fact, "", str(number)) for number, fact in enumerate(facts)])
    assert [row.fact for row in read_facts(path).rows] == facts
