"""Attribute snippets: both forms, which ones are whose, and files that hold none."""

from __future__ import annotations

import json

import pytest

from errata.base.errors import ResultFileError
from errata.base.facts import Fact
from errata.data.records import Record
from errata.data.snippets import Snippet, Snippets, read_snippets, write_snippets

LOUVRE, NEEDLE, ROME = Snippet("The Louvre", "It is in Paris."), Snippet("The Space Needle", "Paris!"), Snippet("R", "")
SNIPPETS = Snippets({("P131", "Q90"): (LOUVRE, NEEDLE, LOUVRE), ("P17", "Italy"): (ROME,)})
PUBLISHED = [
    {"relation_id": "P131", "target_id": "Q90", "samples": [vars(LOUVRE), vars(NEEDLE)]},
    {"relation_id": "P17", "target_id": "Italy", "samples": [vars(ROME)]},
    {"relation_id": "P131", "target_id": "Q90", "samples": [vars(LOUVRE)]},
]


def record(relation: str, new: str, ids=("", "")) -> Record:
    rewrite = Fact("The Space Needle", "{} is in", "Seattle").rewrite(new)
    return Record(0, relation, rewrite, (), (), (), (), ids)


def write(tmp_path, value):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(value))
    return path


def test_both_forms_are_read(tmp_path):
    found = read_snippets(write(tmp_path, PUBLISHED))
    assert found == SNIPPETS
    assert len(found.digest) == 64
    nested = {"P131": {"Q90": [vars(each) for each in SNIPPETS.groups["P131", "Q90"]]}, "P17": {"Italy": [vars(ROME)]}}
    assert read_snippets(write(tmp_path, nested)) == SNIPPETS


def test_written_and_read_back(tmp_path):
    write_snippets(tmp_path / "s.json", SNIPPETS)
    assert read_snippets(tmp_path / "s.json") == SNIPPETS
    assert list(json.loads((tmp_path / "s.json").read_text())[0]) == ["relation_id", "target_id", "samples"]


def test_whose_they_are():
    paris = record("P131", "Paris", ("Q5083", "Q90"))
    assert SNIPPETS.of(paris) == (LOUVRE, NEEDLE, LOUVRE)
    assert SNIPPETS.about(paris) == (NEEDLE,)
    assert SNIPPETS.of(record("P17", "Italy")) == (ROME,)
    assert SNIPPETS.of(record("P17", "Italy", ("Q1", "Q2"))) == ()
    assert SNIPPETS.of(record("P131", "Q90", ("Q1", "Q2"))) == ()
    assert SNIPPETS.about(record("P17", "Italy")) == ()
    assert SNIPPETS.texts == (LOUVRE.text, NEEDLE.text, LOUVRE.text, "")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "there are no attribute snippets"),
        ({}, "there are no attribute snippets"),
        (5, "it is a list, not int"),
        ([*PUBLISHED, 5], "entry 4: it is an object, not int"),
        ([{"relation_id": "P1"}], "entry 1: it has no target_id, samples"),
        ([PUBLISHED[0], {**PUBLISHED[1], "samples": {}}], "entry 2: its samples are a list"),
        ([{**PUBLISHED[1], "samples": [{"name": "a"}]}], "entry 1: it has no text"),
        ([{**PUBLISHED[1], "samples": [{"name": "a", "text": 5}]}], "entry 1: its text is text, not int"),
        ([{**PUBLISHED[1], "samples": [{"name": "a", "text": "\ud800"}]}], "entry 1: .*lone surrogate"),
        ([{**PUBLISHED[1], "relation_id": 5}], "entry 1: its relation_id is text"),
        ({"P1": []}, "entry 1: what stands under 'P1'"),
    ],
)
def test_files_that_hold_none(tmp_path, value, reason):
    with pytest.raises(ResultFileError, match=reason):
        read_snippets(write(tmp_path, value))
