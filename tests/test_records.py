"""Sets of records: three schemas, each way in which an entry can be no record, and each in which a file can be none."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import goldens
from errata.base.errors import ConfigError, ErrataError, OutputError, ResultFileError
from errata.base.facts import Fact
from errata.data import entries
from errata.data.counterfact import write_records
from errata.data.fact_table import read_facts
from errata.data.records import Record, WikiBigEditRecord, ZsreRecord
from errata.data.snippets import Snippet, Snippets, read_snippets, write_snippets
from errata.tasks.describe import describe
from errata.tasks.records import RecordSet, read_records, what_is_in
from helpers.budget import examples
from helpers.entries import FLAT, NESTED, ZSRE, changed, numbered, write
from samples import sample

NEEDLE = Record(
    7,
    "P131",
    Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite("Paris"),
    ("Where is it? The Space Needle stands in",),
    ("Pike Place Market is in", "The Gum Wall is in"),
    ("The Louvre is in",),
    (),
    ("Q5083", "Q90"),
)


# ---- the schemas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "R.JSON"])
def test_nested(tmp_path, name):
    found = read_records(write(tmp_path, [NESTED], name))
    assert found.task.name == "counterfact"
    assert found.records == (NEEDLE,)
    assert found.bad == ()
    assert found.snippets is None
    assert len(found.digest) == 64


def test_flat(tmp_path):
    several = changed(
        FLAT, case_id=8, rephrase_prompt=["a", "b"], locality_prompt="c", locality_ground_truth=["Seattle"]
    )
    bare = changed(
        FLAT, case_id=9, locality_ground_truth=..., prompt="{} is located in the city of", relation_id="P131"
    )
    found = read_records(write(tmp_path, [FLAT, several, bare]))
    first = Record(7, "", NEEDLE.rewrite, NEEDLE.paraphrase, NEEDLE.neighborhood, (), ())
    assert found.records[0] == first
    assert (found.records[1].paraphrase, found.records[1].neighborhood) == (("a", "b"), ("c",))
    assert (found.records[2].relation, found.records[2].rewrite) == ("P131", NEEDLE.rewrite)


def test_zsre(tmp_path):
    found = read_records(write(tmp_path, [ZSRE]))
    assert found.task.name == "zsre"
    rewrite = Fact("Watts Humphrey", "What university did {} take part in?").rewrite("Illinois Institute of Technology")
    loc = ("nq question: who played desmond doss father in hacksaw ridge?", "Hugo Weaving")
    assert found.records == (ZsreRecord(0, rewrite, ("What university did Watts Humphrey study at?",), (loc,)),)


def test_zsre_as_the_published_code_makes_it(tmp_path):
    golden = goldens.info("zsre")
    found = read_records(write(tmp_path, golden["raw"]))
    assert len(found.records) == len(golden["records"]) == 2
    for record, theirs in zip(found.records, golden["records"], strict=True):
        asked = theirs["requested_rewrite"]
        assert record.case_id == theirs["case_id"]
        assert (record.rewrite.prompt, record.rewrite.subject) == (asked["prompt"], asked["subject"])
        assert record.rewrite.new_object == asked["target_new"]["str"]
        assert list(record.paraphrase) == theirs["paraphrase_prompts"]
        assert record.locality[0][0] == theirs["neighborhood_prompts"][0]["prompt"]
        assert f" {record.locality[0][1]}" == "".join(each["target"] for each in theirs["neighborhood_prompts"])


def test_counterfact_as_the_published_code_has_it(tmp_path):
    golden = goldens.info("counterfact")
    (tmp_path / "attribute_snippets.json").write_text(json.dumps(golden["snips"]))
    found = read_records(write(tmp_path, golden["records"]))
    assert len(found.records) == 2
    for record, theirs in zip(found.records, golden["records"], strict=True):
        assert record.generation == tuple(theirs["generation_prompts"])
        rid, tid = record.relation, theirs["requested_rewrite"]["target_new"]["id"]
        ours = [{"name": each.name, "text": each.text} for each in found.snippets.of(record)]
        assert ours == golden["snips"].get(rid, {}).get(tid, [])
    assert [each.name for each in found.snippets.about(found.records[0])] == ["The Space Needle"]


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("counterfact_nested", "counterfact", 150), ("counterfact_flat", "counterfact", 200), ("zsre", "zsre", 100)],
)
def test_samples_load_whole(name, kind, count):
    found = read_records(sample(name))
    assert (found.task.name, len(found.records), found.bad) == (kind, count, ())
    cases = [record.case_id for record in found.records]
    assert cases == sorted(set(cases))


def test_records_are_written_and_read_back(tmp_path):
    records = read_records(sample("counterfact_nested")).records
    for name in ("a.json", "deep/b.jsonl"):
        write_records(tmp_path / name, records)
        assert read_records(tmp_path / name).records == records
    with pytest.raises(ConfigError, match=r"\.json or \.jsonl"):
        write_records(tmp_path / "a.csv", records)
    with pytest.raises(OutputError):
        write_records(tmp_path / "a.json" / "b.json", records)


# ---- bad entries ------------------------------------------------------------------------------------------

RR = "requested_rewrite"
BAD = [
    (changed(NESTED, case_id=...), "it has no case_id"),
    (
        changed(NESTED, paraphrase_prompts=..., generation_prompts=None),
        "it has no paraphrase_prompts, generation_prompts",
    ),
    (changed(NESTED, requested_rewrite=...), "it has no requested_rewrite"),
    (changed(NESTED, requested_rewrite=[1]), "requested_rewrite is an object"),
    (changed(NESTED, requested_rewrite__subject=...), "it has no subject"),
    (changed(NESTED, requested_rewrite__target_true=..., requested_rewrite__prompt=...), "no prompt, target_true"),
    (changed(NESTED, requested_rewrite__target_new={"id": "Q90"}), "it has no str"),
    (changed(NESTED, requested_rewrite__target_new={"str": "  "}), "str is empty"),
    (changed(NESTED, requested_rewrite__target_new=5), "target_new is text, not int"),
    (changed(NESTED, requested_rewrite__target_new={"str": "Seattle "}), "its new object is its old one"),
    (changed(NESTED, requested_rewrite__target_true={"str": ""}), "str is empty"),
    (changed(NESTED, requested_rewrite__prompt="{} and {} are in"), "2 places"),
    (changed(NESTED, requested_rewrite__prompt="It is in"), "does not stand in it exactly once"),
    (changed(NESTED, requested_rewrite__prompt=" "), "prompt is empty"),
    (changed(NESTED, requested_rewrite__subject=""), "subject is empty"),
    (changed(NESTED, requested_rewrite__relation_id=131), "relation_id is text"),
    (changed(NESTED, case_id="7"), "case_id is a whole number"),
    (changed(NESTED, case_id=True), "case_id is a whole number"),
    (changed(NESTED, case_id=-1), "count from 0"),
    (changed(NESTED, paraphrase_prompts={"a": "b"}), "paraphrase_prompts is a list of texts"),
    (changed(NESTED, paraphrase_prompts=["a", 5]), r"paraphrase_prompts\[1\] is text, not int"),
    (changed(NESTED, neighborhood_prompts=["a", " "]), r"neighborhood_prompts\[1\] is empty"),
    (changed(NESTED, generation_prompts=["a\ud800"]), "lone surrogate"),
    (changed(NESTED, case_id=0), "the same case_id, 0, as entry 1"),
    (5, "it must be an object, not int"),
    (None, "it must be an object"),
]
BAD_FLAT = [
    (changed(FLAT, target_new=..., subject=...), "it has no subject, target_new"),
    (changed(FLAT, prompt="It is in"), "exactly once"),
    (changed(FLAT, prompt="The Space Needle, The Space Needle is in"), "exactly once"),
    (changed(FLAT, target_new="Seattle "), "its new object is its old one"),
    (changed(FLAT, rephrase_prompt=5), "rephrase_prompt is a list of texts"),
    (changed(FLAT, locality_ground_truth=["Seattle", "Tacoma"]), "'Tacoma' is not its ground_truth 'Seattle'"),
    (changed(FLAT, locality_ground_truth=5), "locality_ground_truth is a list of texts"),
]
BAD_ZSRE = [
    (changed(ZSRE, subject="watts humphrey"), "does not stand in src"),
    (changed(ZSRE, src="Watts Humphrey or Watts Humphrey?"), "does not stand in src"),
    (changed(ZSRE, src="Is Watts Humphrey {}?"), "2 places"),
    (changed(ZSRE, answers=[]), "answers are an empty list"),
    (changed(ZSRE, answers=["", "IIT"]), r"answers\[0\] is empty"),
    (changed(ZSRE, answers=...), "it has no answers"),
    (changed(ZSRE, loc=None, loc_ans=...), "it has no loc, loc_ans"),
    (changed(ZSRE, loc_ans=1937), "loc_ans is text"),
]


@pytest.mark.parametrize(
    ("good", "bad"),
    [(changed(NESTED, case_id=0), BAD), (changed(FLAT, case_id=0), BAD_FLAT), (ZSRE, BAD_ZSRE)],
    ids=["nested", "flat", "zsre"],
)
@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_each_bad_entry_is_told_and_the_others_are_read(tmp_path, good, bad, name):
    last = changed(good, case_id=99) if "case_id" in good else good
    found = read_records(write(tmp_path, [good, *(entry for entry, _ in bad), last], name))
    assert len(found.records) == 2
    assert [each.line for each in found.bad] == list(range(2, len(bad) + 2))
    for told, (_, reason) in zip(found.bad, bad, strict=True):
        assert re.search(reason, told.reason), (told.reason, reason)
    if found.task.name == "zsre":
        assert found.records[1].case_id == len(bad) + 1


def test_a_line_that_is_no_json_or_too_long_or_no_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_LINE", 2000)
    lines = [
        json.dumps(changed(NESTED, case_id=0)).encode(),
        b'{"case_id": 1',
        json.dumps(changed(NESTED, case_id=2, generation_prompts=["x" * 3000])).encode(),
        json.dumps(changed(NESTED, case_id=3)).replace("Louvre", "Louvre\\u00e9").encode(),
        json.dumps(changed(NESTED, case_id=4)).encode().replace(b"Louvre", b"Louvr\xe9"),
        b"[" * 1900,
    ]
    found = read_records(write(tmp_path, b"\r\n\n".join(lines), "r.jsonl"))
    assert [record.case_id for record in found.records] == [0, 3]
    said = {each.line: each.reason for each in found.bad}
    assert list(said) == [2, 3, 5, 6]
    assert "no JSON" in said[2]
    assert "up to 2,000" in said[3]
    assert "no UTF-8" in said[5]


# ---- bad files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "r.json", "empty"),
        (b" \n", "r.jsonl", "empty"),
        (b"[]", "r.json", "empty list"),
        (b"[{", "r.json", "not JSON"),
        (b"[" * 200_000, "r.json", "not JSON"),
        (json.dumps([NESTED]).encode("utf-16"), "r.json", "UTF-16"),
        (b"\x89PNG\r\n\xff", "r.json", "not JSON"),
        (b'{"a": 1}\n{"a": 2}', "r.json", "name it .jsonl"),
        (b"5", "r.json", r"another kind \(int\)"),
        (b'[1, "a", null]', "r.json", "no records of a known task.*zsRE: loc or loc_ans or src"),
        (b'[{"a": 1}]', "r.json", "no records of a known task.*it looks like a vocabulary"),
        (b"no\njson", "r.jsonl", "no records of a known task: no JSON"),
        (json.dumps(NESTED).encode(), "r.json", "one record"),
        (
            json.dumps([changed(NESTED, case_id=None)]).encode(),
            "r.json",
            "no good record in .*entry 1: it has no case_id",
        ),
        (b'{"P1": {"Q1": [{"name": "a", "text": "b"}]}}', "r.json", "looks like attribute snippets"),
        (b'[{"relation_id": "P1", "target_id": "Q1", "samples": []}]', "r.json", "looks like attribute snippets"),
        (b'[{"known_id": 1, "subject": "a", "prompt": "a is"}]', "r.json", "looks like known facts"),
        (b'[{"subject": "a", "prompt": "a is"}]', "r.json", "looks like a table of facts"),
        (b'[{"subject": "a", "prompt": "a is", "target_new": "b"}]', "r.json", "looks like rewrite requests"),
        (b'{"kind": "traces", "version": 1}\n{"subject": "a", "src": "b"}', "r.jsonl", "looks like a result of errata"),
        (b'{"the": 1, "of": 0}', "r.json", "looks like a vocabulary"),
        (b"subject,prompt", "r.csv", "by its ending"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, name, reason):
    with pytest.raises(ResultFileError, match=reason) as raised:
        read_records(write(tmp_path, content, name))
    assert name in str(raised.value)


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(ResultFileError, match="there is no file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(ResultFileError, match=r"cannot read|no file"):
        read_records(tmp_path / ("n" * 5000 + ".json"))
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as file:
        file.truncate(3 * 2**30)  # a hole: no disk is taken, and reading it would take seconds
    before = time.perf_counter()
    with pytest.raises(ResultFileError, match=r"3,221 MB.* up to 537 MB"):
        read_records(huge)
    assert time.perf_counter() - before < 0.5


def test_a_folder(tmp_path):
    with pytest.raises(ResultFileError, match=r"none of counterfact\.json"):
        read_records(tmp_path)
    write(tmp_path, [NESTED], "counterfact.json")
    snippets = Snippets({("P131", "Q90"): (Snippet("The Louvre", "It is in Paris."),)})
    write_snippets(tmp_path / "attribute_snippets.json", snippets)
    found = read_records(tmp_path)
    assert found.records == (NEEDLE,)
    assert found.snippets == snippets
    assert read_records(tmp_path / "counterfact.json").snippets == snippets
    assert read_records(tmp_path, with_snippets=False).snippets is None
    write(tmp_path, [ZSRE], "zsre.json")
    assert read_records(tmp_path / "zsre.json").snippets is None
    with pytest.raises(ResultFileError, match=r"several .*counterfact\.json, zsre\.json"):
        read_records(tmp_path)


def capitals(value):
    """A JSON value whose keys are written in capitals, with spaces and hyphens for underscores."""
    if isinstance(value, dict):
        return {key.upper().replace("_", " -"[i % 2]): capitals(inner) for i, (key, inner) in enumerate(value.items())}
    return [capitals(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("entry", [NESTED, FLAT, ZSRE])
@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_names_may_be_written_in_capitals(tmp_path, entry, name):
    plain = read_records(write(tmp_path, [entry], name)).records
    assert read_records(write(tmp_path, [capitals(entry)], name)).records == plain


def test_names_of_snippets_may_be_written_in_capitals(tmp_path):
    entry = {"relation_id": "P131", "target_id": "Q90", "samples": [{"name": "The Louvre", "text": "It is in Paris."}]}
    (tmp_path / "plain.json").write_text(json.dumps([entry]))
    (tmp_path / "capitals.json").write_text(json.dumps([capitals(entry)]))
    assert read_snippets(tmp_path / "plain.json") == read_snippets(tmp_path / "capitals.json")


def test_a_key_that_is_missing_is_told_with_the_nearest_that_is_there(tmp_path):
    wrong = changed(NESTED, paraphrase_prompts=..., paraphrased_prompts=["x"])
    with pytest.raises(
        ResultFileError, match=r"no paraphrase_prompts \(the nearest that it has: 'paraphrased_prompts'\)"
    ):
        read_records(write(tmp_path, [wrong]))


def test_flat_records_without_numbers_go_by_their_place(tmp_path):
    entries = [changed(FLAT, case_id=...), changed(FLAT, case_id=..., subject="Needle"), changed(FLAT, case_id=9)]
    found = read_records(write(tmp_path, entries))
    assert [record.case_id for record in found.records] == [0, 1, 9]
    assert not found.bad


def test_flat_questions_have_answers_of_their_own(tmp_path):
    question = changed(FLAT, case_id=..., ground_truth=..., locality_ground_truth=["Boston", "Bern"])
    several = changed(question, subject="Needle", locality_ground_truth="Boston")
    found = read_records(write(tmp_path, [question, several, changed(question, locality_prompt=...)]))
    assert found.task.name == "wikibigedit"
    assert found.records == (
        WikiBigEditRecord(
            0,
            Fact("The Space Needle", "{} is located in the city of").rewrite("Paris"),
            ("Where is it? The Space Needle stands in",),
            (("Pike Place Market is in", "Boston"), ("The Gum Wall is in", "Bern")),
        ),
    )
    assert [each.reason.partition(":")[0] for each in found.bad] == [
        "it has 2 locality_prompt and 1 locality_ground_truth",
        "it has no locality_prompt",
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("counterfact_flat2", "counterfact"), ("wikibigedit", "wikibigedit"), ("zsre2", "zsre")]
)
def test_more_samples(name, kind):
    found = read_records(sample(name))
    assert (found.task.name, len(found.records) + len(found.bad)) == (kind, 200)
    assert len(found.bad) <= 5, found.bad


def test_a_folder_of_multi_counterfact(tmp_path):
    write(tmp_path, [NESTED], "multi_counterfact.json")
    assert read_records(tmp_path).records == (NEEDLE,)
    write(tmp_path, [NESTED], "counterfact.json")
    with pytest.raises(ResultFileError, match=r"several .*counterfact\.json, multi_counterfact\.json"):
        read_records(tmp_path)


def test_separators_of_records(tmp_path):
    request = {**NESTED["requested_rewrite"], "separator": ""}
    for entry in (changed(NESTED, requested_rewrite=request), changed(FLAT, separator=""), changed(ZSRE, separator="")):
        (record,) = read_records(write(tmp_path, [entry])).records
        assert record.rewrite.separator == ""
    nested = read_records(write(tmp_path, [changed(NESTED, requested_rewrite=request)])).records
    write_records(tmp_path / "again.json", nested)
    assert read_records(tmp_path / "again.json").records == nested


@pytest.mark.parametrize(
    ("entry", "looks"),
    [
        ({"requested_rewrite": [{}], "questions": []}, "rewrite requests"),
        ({"edit": {}, "example_type": "popular"}, "edits of RippleEdits"),
        ({"subject": "x", "prompt": "y", "target": "z"}, "rewrite requests"),
    ],
)
def test_sets_of_requests_are_told_from_records(tmp_path, entry, looks):
    with pytest.raises(ResultFileError, match=looks):
        read_records(write(tmp_path, [entry]))


# ---- which of them ----------------------------------------------------------------------------------------


def cases(found):
    return [record.case_id for record in found.records]


def test_limit_and_sample(tmp_path):
    path = write(tmp_path, numbered(NESTED, 50)[::-1])
    assert cases(read_records(path)) == list(range(50))
    assert cases(read_records(path, limit=3)) == [0, 1, 2]
    assert cases(read_records(path, limit=500)) == list(range(50))
    some = cases(read_records(path, sample=(10, 1)))
    assert len(set(some)) == 10
    assert some == sorted(some)
    assert some == cases(read_records(path, sample=(10, 1)))
    assert some != cases(read_records(path, sample=(10, 2)))
    assert set(cases(read_records(path, sample=(5, 1)))) < set(some)
    assert set(cases(read_records(path, limit=20, sample=(10, 1)))) < set(range(20))
    assert cases(read_records(path, sample=(51, 0))) == list(range(50))
    assert cases(read_records(write(tmp_path, [ZSRE] * 9), limit=2)) == [0, 1]


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": True}, {"sample": (0, 1)}, {"sample": (1, "a")}])
def test_limits_that_are_none(tmp_path, wrong):
    with pytest.raises(ConfigError):
        read_records(write(tmp_path, [NESTED]), **wrong)


# ---- what they are made of --------------------------------------------------------------------------------


def test_composition(tmp_path):
    other = changed(
        NESTED,
        case_id=8,
        requested_rewrite__relation_id="P17",
        requested_rewrite__prompt="{} is in the country of",
        neighborhood_prompts=["Pike Place Market is in"] * 4,
    )
    made_of = describe(read_records(write(tmp_path, [NESTED, other, changed(NESTED, case_id=9), 5])))
    assert (made_of.kind, made_of.records, made_of.bad, made_of.relations) == ("counterfact", 3, 1, 2)
    items = {each.name: (each.all, each.total, each.per_relation, each.per_record) for each in made_of.items}
    assert items["records"] == (3, 3, 1.5, 1)
    assert items["subjects"] == (3, 1, 1, 1)
    assert items["counterfactual statements"] == (3, 2, 1, 1)
    assert items["neighborhood prompts"] == (8, 2, 1.5, 5 / 3)
    assert items["generation prompts"] == (0, 0, 0, 0)


def test_composition_of_the_others(tmp_path):
    made_of = describe(read_records(write(tmp_path, [ZSRE, ZSRE])))
    assert {each.name: each.total for each in made_of.items}["questions"] == 1
    assert made_of.items[0].per_relation is None
    facts = tmp_path / "facts.csv"
    facts.write_text("subject,prompt,object,relation\na,{} is,x,r\nb,{} is,,r\nb,{} is,,r\n")
    made_of = describe(read_facts(facts))
    assert (made_of.kind, made_of.records, made_of.bad, made_of.relations) == ("facts", 2, 1, 1)
    items = {each.name: (each.all, each.total) for each in made_of.items}
    assert items == {"facts": (2, 2), "subjects": (2, 2), "objects": (1, 1), "templates": (2, 1), "prompts": (2, 2)}


def test_the_whole_of_counterfact_takes_seconds(tmp_path):
    entry = changed(NESTED, neighborhood_prompts=[f"{i} is in" for i in range(10)])
    path = write(tmp_path, numbered(entry, 21_919))
    before = time.perf_counter()
    found = read_records(path)
    made_of = describe(found)
    assert time.perf_counter() - before < 10
    assert made_of.records == 21_919


# ---- any JSON ---------------------------------------------------------------------------------------------

KEYS = sorted({*NESTED, *NESTED[RR], *FLAT, *ZSRE, "samples", "target_id", "kind", "version", "str", "id"})
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800")
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
damage = st.tuples(st.sampled_from([NESTED, FLAT, ZSRE]), st.dictionaries(st.sampled_from(KEYS), values, max_size=2))
damaged = damage.map(lambda pair: {**pair[0], **pair[1]})


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(values | damaged, max_size=4) | values, st.sampled_from([".json", ".jsonl"]))
@example([changed(NESTED, case_id=10**400)], ".json")
@example([changed(NESTED, case_id=[[[[1]]]])], ".json")
def test_any_json_is_read_or_refused(tmp_path_factory, value, ending):
    folder = tmp_path_factory.mktemp("any")
    path = folder / f"counterfact{ending}"
    path.write_text(
        json.dumps(value) if ending == ".json" or not isinstance(value, list) else "\n".join(map(json.dumps, value))
    )
    (folder / "attribute_snippets.json").write_text(json.dumps(value))
    for read in (read_records, what_is_in, lambda path: read_records(path, with_snippets=False)):
        try:
            found = read(path)
        except ErrataError as error:
            str(error).encode()  # can be printed
        else:
            if isinstance(found, RecordSet):
                describe(found)
                "".join(each.reason for each in found.bad).encode()
                if found.task.name == "counterfact":
                    write_records(folder / "again.json", found.records)
                    assert read_records(folder / "again.json", with_snippets=False).records == found.records


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("any") / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(ErrataError):
        read_records(path)
