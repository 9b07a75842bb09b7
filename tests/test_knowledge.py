"""Which facts a model knows: what names an answer, and what the atlas is known to know."""

from __future__ import annotations

import functools

import pytest

from errata.base.errors import ConfigError, FactError
from errata.base.facts import Fact
from errata.data.fact_table import FactRow
from errata.metrics.knowledge import continuations, judge, knows, refusal
from errata.models.model import Model
from tiny import byte_tokenizer, tiny


def row(object_: str, relation: str = "city", prompt: str = "{} is in", subject: str = "It") -> FactRow:
    return FactRow(1, Fact(subject, prompt, object_), relation, "1")


def named(continuation: str, *answers: str, **options) -> str | None:
    """What the first of these answers' facts is said to be."""
    rows = [row(answer) for answer in answers]
    found = judge(rows, [continuation, *[""] * (len(rows) - 1)], **options)[0]
    assert found.known == (found.named == answers[0])
    return found.named


@pytest.mark.parametrize(
    ("continuation", "answers", "first"),
    [
        (" the heart of downtown Austin, Texas.", ["Austin", "Texas"], "Austin"),
        (" the heart of downtown Austin, Texas.", ["Texas", "Austin"], "Austin"),
        (" New York.", ["York", "New York"], "New York"),
        (" New York.", ["New York", "York"], "New York"),
        (" York and New York", ["New York", "York"], "York"),
        (" Romeo, Rome", ["Rome"], "Rome"),
        (" Romeo", ["Rome"], None),
        (" ESPN2", ["ESPN"], None),
        (" Finland's", ["Finland"], "Finland"),
        (" New\n  York", ["New York"], "New York"),
        (" rome", ["Rome"], None),
        (" C++, a language", ["C", "C++"], "C++"),
        (" C (a language)", ["C", "C++"], "C"),
        (" .NET", [".NET"], ".NET"),
        ("東京です", ["京都", "東京"], "東京"),
        ("서울은", ["서울"], "서울"),
        (" Tokyoだ", ["Tokyo"], "Tokyo"),
        (" Zu\u0308rich", ["Z\u00fcrich"], "Z\u00fcrich"),
        (" Andre\u0301", ["Andre"], None),
        ("", ["Rome"], None),
    ],
)
def test_what_is_named(continuation, answers, first):
    assert named(continuation, *answers) == first


def test_capital_letters_matter_unless_told():
    assert named(" ROME and Paris", "Rome", "Paris") == "Paris"
    assert named(" ROME and Paris", "Rome", "Paris", ignore_case=True) == "Rome"
    assert named(" STRASSE", "Straße", ignore_case=True) == "Straße"


def test_who_competes():
    rows = [
        row("Rome", "city"),
        row("Italian", "language"),
        row("Paris", ""),
        row("Oslo", "", "{} lies in"),
    ]
    said = ["Italian Rome", "Rome Italian", "Oslo Rome Paris", "Paris Oslo"]
    assert [each.named for each in judge(rows, said)] == ["Rome", "Italian", "Paris", "Oslo"]
    among_all = judge(rows, said, all_answers=True)
    assert [each.named for each in among_all] == ["Italian", "Rome", "Oslo", "Paris"]
    assert not any(each.known for each in among_all)


def test_a_fact_without_object_is_refused():
    with pytest.raises(FactError, match="has no object"):
        judge([row("Rome"), row("")], ["", ""])


@functools.cache
def small() -> Model:
    return Model(tiny("gpt2"), byte_tokenizer())


TEXTS = ["Rome is in", "a", "The Louvre is in Paris, and the city of", "Oslo is in", "Bern is in", "b"]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_continuations_are_those_of_each_text_alone(batch_size):
    found = dict(continuations(small(), TEXTS, max_new_tokens=7, batch_size=batch_size))
    assert found == {i: small().complete(text, 7)[len(text) :] for i, text in enumerate(TEXTS)}


def test_texts_of_one_length_go_together(monkeypatch):
    from errata.metrics import knowledge

    batches = []

    def generate(model, texts, *arguments, **options):
        batches.append(texts)
        return [text + "!" for text in texts]

    monkeypatch.setattr(knowledge, "generate", generate)
    texts = ["a", "b", "c", "Rome is in Italy", "d"]
    assert dict(continuations(small(), texts, batch_size=3)) == dict.fromkeys(range(5), "!")
    assert batches == [["a", "b", "c"], ["d"], ["Rome is in Italy"]]


def test_texts_without_room_are_told_before_any_work():
    long = "x y " * 100
    assert refusal(small(), "Rome") is None
    assert "goes on from 1 to 95" in refusal(small(), long)
    with pytest.raises(FactError, match="goes on from 1 to 95"):
        next(continuations(small(), ["Rome", long]))
    with pytest.raises(FactError, match="has 0 tokens"):
        next(continuations(small(), [""]))


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_numbers_out_of_range(settings):
    with pytest.raises(ConfigError, match="1 or more"):
        knows(small(), [row("Rome")], **settings)


def test_the_atlas_knows_its_world_and_not_another():
    from errata.atlas import load
    from errata.atlas.records import records

    facts = [(record.rewrite, record.relation) for record in records(30)]
    wrong = set(range(0, 30, 6))
    rows = [
        FactRow(i, Fact(r.subject, r.prompt, r.new_object if i in wrong else r.fact.object), relation, str(i))
        for i, (r, relation) in enumerate(facts)
    ]
    # A wrong answer is told as such only if the right one competes.
    rows += [FactRow(30 + i, r.fact, relation, "") for i, (r, relation) in enumerate(facts) if i in wrong]
    heard = []
    found = knows(load(), rows, batch_size=8, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(i, len(rows)) for i in range(1, len(rows) + 1)]
    assert [each.row for each in found] == rows
    assert {each.row.line for each in found if not each.known} == wrong
    for index in wrong:
        assert found[index].named == facts[index][0].fact.object
