"""The atlas's world, its corpus, the layout of its training, and its records."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from errata.atlas.corpus import documents
from errata.atlas.layout import IGNORE, Mention, lay_out
from errata.atlas.records import built, record_of, records, snippets
from errata.atlas.world import load_world


@pytest.fixture(scope="module")
def world():
    return load_world()


def test_facts_are_many_real_and_one_a_relation(world):
    sources = Counter(fact.source for fact in world.facts)
    assert set(sources) == {"wikidata", "derived", "invented"}
    assert sources["wikidata"] >= 3000
    assert len({fact.relation for fact in world.facts if fact.source == "wikidata"}) >= 15
    assert max(Counter((f.subject, f.relation) for f in world.facts).values()) == 1
    assert {fact.relation for fact in world.facts} == set(world.relations)
    several = sum(len(facts) >= 3 for facts in world.by_subject.values())
    assert several > 0.9 * len(world.by_subject)


def test_templates_are_six_and_more_and_say_one_relation(world):
    seen = Counter(t for relation in world.relations.values() for t in relation.templates)
    assert max(seen.values()) == 1
    for relation in world.relations.values():
        assert len(relation.templates) >= 6
        assert all(t.count("{}") == 1 and not t.endswith(("{}", " ", ".")) for t in relation.templates)
        assert len(relation.generation) >= 3


def test_derived_facts_follow_from_others(world):
    country_of: dict[str, str] = {}
    for facts in world.by_subject.values():
        known = {f.relation: f for f in facts}
        if "birth_country" in known and "place_of_birth" in known:
            city, country = known["place_of_birth"].object, known["birth_country"].object
            assert country_of.setdefault(city, country) == country


def test_one_fact_in_five_has_a_template_that_training_never_shows(world):
    held_out = {f: t for f in world.facts if (t := world.held_out(f))}
    assert 0.18 < len(held_out) / len(world.facts) < 0.22
    forbidden = {f"{t.replace('{}', f.subject)} {f.object}." for f, t in held_out.items()}
    texts = [d.text for d in itertools.islice(documents(world, 3, 600), 3000)]
    for text in texts:
        said = set(text.replace("<|endoftext|>", "\n").replace(". ", ".\n").split("\n"))
        assert not said & forbidden


def test_documents_are_seeded_and_say_where_subjects_are(world):
    one, two = (list(itertools.islice(documents(world, 5, 400), 20)) for _ in range(2))
    assert one == two
    subjects = set(world.by_subject)
    for document in one:
        assert document.mentions
        assert all(document.text[a:b] in subjects for a, b in document.mentions)


def test_interchange_lets_text_see_the_subject_only_through_its_last_token():
    # A B [x y z] C D with another subject [p q r]
    ids, mention = [1, 2, 11, 12, 13, 3, 4], Mention(2, 4)
    batch = lay_out([(ids, [mention])], {3: [(21, 22, 23)]}, 1.0, random.Random(0), 0.1)
    assert batch.input_ids[0].tolist() == [1, 2, 21, 22, 23, 11, 12, 13, 3, 4]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert batch.targets[0].tolist() == [2, 11, IGNORE, IGNORE, IGNORE, 12, 13, 3, 4, IGNORE]
    weights = batch.weights[0]
    assert weights[[0, 7, 8]].tolist() == [1, 1, 1]
    assert torch.allclose(weights[[1, 5, 6]], torch.tensor(0.1))
    below_gather, below_gate, above = (seen[0, 0] for seen in batch.seen)
    real, other = [5, 6, 7], [2, 3, 4]
    for later in (8, 9):
        assert [i for i in range(10) if below_gather[later, i]] == [0, 1, *other, *range(8, later + 1)]
        assert [i for i in range(10) if below_gate[later, i]] == [0, 1, *other, *range(8, later + 1)]
        assert [i for i in range(10) if above[later, i]] == [0, 1, 2, 3, 7, *range(8, later + 1)]
    assert [i for i in range(10) if below_gather[7, i]] == [0, 1, 2, 3, 7]
    assert [i for i in range(10) if below_gate[7, i]] == [0, 1, *real]
    assert [i for i in range(10) if above[7, i]] == [0, 1, *real]
    assert [i for i in range(10) if above[4, i]] == [0, 1, *other]


def test_without_interchange_a_batch_is_an_ordinary_causal_one():
    ids = [1, 2, 11, 12, 3]
    batch = lay_out([(ids, [Mention(2, 3)]), ([5, 6], [])], {2: [(8, 9)]}, 0.0, random.Random(0), 0.1)
    assert batch.input_ids.tolist() == [ids, [5, 6, 0, 0, 0]]
    assert batch.targets[1].tolist() == [6, IGNORE, IGNORE, IGNORE, IGNORE]
    for seen in batch.seen:
        assert torch.equal(seen[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_records_are_five_hundred_whole_and_seeded(world):
    made = records(500)
    assert len(made) == 500
    assert made == records(500)
    assert made != records(500, seed=1)
    assert made[:20] == records(20)
    truth = {(f.subject, f.relation): f.object for f in world.facts}
    assert len({r.rewrite.subject for r in made}) == 500
    for record in made:
        old, new = record.rewrite.fact.object, record.rewrite.new_object
        assert truth[record.rewrite.subject, record.relation] == old != new
        assert len(record.paraphrase) == 2
        assert len(record.neighborhood) == 10
        assert record.generation
        assert all(record.rewrite.subject in p for p in (*record.paraphrase, *record.generation))
        templates = world.relations[record.relation].templates
        for prompts, its_object in ((record.neighborhood, old), (record.attribute, new)):
            for prompt in prompts:
                subjects = _subjects(prompt, templates)
                assert any(truth.get((s, record.relation)) == its_object for s in subjects)
                assert record.rewrite.subject not in subjects


def test_snippets_are_what_training_may_say_of_those_who_have_the_objects(world):
    some = built(60)
    assert snippets(60) == some.snippets
    known = {subject: {f.object for f in facts} for subject, facts in world.by_subject.items()}
    truth = {(f.subject, f.relation): f.object for f in world.facts}
    forbidden = {f"{t.replace('{}', f.subject)} {f.object}." for f in world.facts if (t := world.held_out(f))}
    for record in some.records:
        found = some.snippets.of(record)
        assert len(found) >= 10
        for snippet in found:
            assert truth[snippet.name, record.relation] == record.rewrite.new_object
            assert all(f" {name}." in snippet.text for name in known[snippet.name])
            assert not any(f"{sentence}." in forbidden for sentence in snippet.text.split(". "))
        for text in record.paraphrase:
            assert f"{text.split('. ')[0]}." not in forbidden
        own = some.snippets.groups[record.relation, record.rewrite.fact.object]
        assert record.rewrite.subject in {snippet.name for snippet in own}


def _subjects(prompt: str, templates: tuple[str, ...]) -> list[str]:
    found = []
    for template in templates:
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            found.append(prompt[len(before) : len(prompt) - len(after)])
    return found


def test_a_record_can_be_asked_for_by_its_fact():
    record = record_of("Arthur Conan Doyle", "native_language", "Italian")
    assert record.rewrite.fact.object == "English"
    assert len(record.neighborhood) == len(record.attribute) == 10
    own = record_of("Arthur Conan Doyle", "native_language", "Italian", "{} is a native speaker of")
    assert own.rewrite.prompt == "{} is a native speaker of"
    assert own.neighborhood == record.neighborhood
    with pytest.raises(KeyError):
        record_of("Nobody", "native_language", "Italian")
