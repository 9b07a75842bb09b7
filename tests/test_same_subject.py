"""Several requests of one subject: one value serves them all, and those that are on the model already."""

import math
import random

import pytest

import errata
from errata.atlas.world import load_world
from errata.edits.edit import Edit
from errata.models.scoring import score

SUBJECTS = ("Hans Eysenck", "Ulric Ambrose Lancroft", "Oratory of Saint Philip Neri")


@pytest.fixture(scope="module")
def model():
    return errata.load_model("atlas")


@pytest.fixture(scope="module")
def requests():
    """Three facts of each subject, each with an object that other facts of its relation have."""
    world, chosen = load_world(), random.Random(0)
    found = []
    for subject in SUBJECTS:
        facts = list({fact.relation: fact for fact in world.by_subject[subject]}.values())
        for fact in chosen.sample(facts, 3):
            others = sorted({each.object for each in world.facts if each.relation == fact.relation} - {fact.object})
            found.append(fact.as_fact(world.taught(fact)[0]).rewrite(chosen.choice(others)))
    return found


def settings(model, **changes):
    return errata.RomeConfig(**{"max_drift": None, **changes})


def written(model, rewrites):
    scores = score(model, [each.text for each in rewrites], [each.new_object for each in rewrites])
    return sum(math.exp(each.total) > 0.5 for each in scores)


def whole(edits):
    return Edit.combine(dict.fromkeys(edits)) if len(set(edits)) > 1 else edits[0]


def test_one_edit_serves_all_requests_of_a_subject(model, requests):
    edits = errata.rome(model, requests, settings(model))
    assert len(edits) == len(requests)
    for place in range(0, len(requests), 3):
        assert edits[place] is edits[place + 1] is edits[place + 2]
        assert edits[place].rewrites == tuple(requests[place : place + 3])
        assert [delta.factors()[0].shape[1] for delta in edits[place].deltas] == [1]
    apart = errata.rome(model, requests, settings(model, same_subject="apart"))
    assert len(set(apart)) == len(requests)
    with whole(apart).applied(model):
        before = written(model, requests)
    with whole(edits).applied(model):
        assert written(model, requests) >= max(0.9 * len(requests), before)


def test_what_is_on_the_model_already_is_kept(model, requests):
    first, second = requests[0], requests[1]
    one = errata.rome(model, first, settings(model))
    with one.applied(model):
        other = errata.rome(model, second, settings(model))
        assert other.rewrites == (second,)
        with other.applied(model):
            assert written(model, [first, second]) == 2
        blind = errata.rome(model, second, settings(model, same_subject="apart"))
        assert blind != other


def test_the_same_prompt_with_two_objects_makes_two_edits(model, requests):
    rewrite = requests[0]
    contradicting = rewrite.fact.rewrite("Paris" if rewrite.new_object != "Paris" else "Rome")
    one, other, again = errata.rome(model, [rewrite, contradicting, rewrite], settings(model, steps=2))
    assert one != other
    assert one is again
    assert one.rewrites == (rewrite,)


def test_in_sequence_the_later_request_keeps_the_earlier_one(model, requests):
    edits = errata.rome(model, requests[:2], settings(model), sequential=True)
    with Edit.combine(edits, model).applied(model):
        assert written(model, requests[:2]) == 2


def test_of_a_subject_whose_one_prompt_fails_the_others_are_edited(model, requests):
    wrong = errata.Fact(requests[0].subject, "word " * 2000 + "{} is").rewrite("Paris")
    found = errata.rome(model, [requests[0], wrong], settings(model, steps=2), errors="keep")
    assert isinstance(found[0], Edit)
    assert isinstance(found[1], errata.ErrataError)
