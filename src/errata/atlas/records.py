"""A CounterFact of the atlas's world, built from its table in a moment.

As in CounterFact: the new object is drawn by frequency among the relation's other objects; paraphrases are other
templates, each behind an unrelated sentence; neighbours share the old object, attribute prompts the new one.
"""

from __future__ import annotations

import random
from collections import defaultdict

from errata.atlas.world import World, WorldFact, load_world
from errata.base.seeds import derive
from errata.benchmarks.records import Record

NEIGHBORS = 10
PARAPHRASES = 2


def records(count: int = 500, seed: int = 0, world: World | None = None) -> tuple[Record, ...]:
    """Seeded records, one a subject, of real facts that have at least ten neighbours.

    The first n of a larger set are not the set of n: the draw is over the whole world. Fewer are returned only if
    the world has no more.
    """
    world = world or load_world()
    having: dict[tuple[str, str], list[WorldFact]] = defaultdict(list)
    for fact in world.facts:
        having[fact.relation, fact.object].append(fact)
    rng = random.Random(derive(seed, "records"))
    candidates = [
        fact
        for fact in world.facts
        if fact.source != "invented" and fact.relation != "kind" and len(having[fact.relation, fact.object]) > NEIGHBORS
    ]
    rng.shuffle(candidates)
    made: list[Record] = []
    used: set[str] = set()
    for fact in candidates:
        if len(made) == count:
            break
        if fact.subject in used:
            continue
        used.add(fact.subject)
        made.append(_record(len(made), fact, world, having, rng))
    return tuple(made)


def record_of(subject: str, relation: str, new_object: str, prompt: str | None = None, seed: int = 0) -> Record:
    """The record of one fact of the world with a new object, and a rewrite prompt, of one's choice.

    Raises:
        KeyError: if the world has no such fact.
    """
    world = load_world()
    fact = {(f.subject, f.relation): f for f in world.facts}[subject, relation]
    having: dict[tuple[str, str], list[WorldFact]] = defaultdict(list)
    for other in world.facts:
        having[other.relation, other.object].append(other)
    return _record(0, fact, world, having, random.Random(derive(seed, subject, relation)), new_object, prompt)


def _record(
    case_id: int,
    fact: WorldFact,
    world: World,
    having: dict[tuple[str, str], list[WorldFact]],
    rng: random.Random,
    new_object: str | None = None,
    prompt: str | None = None,
) -> Record:
    relation = world.relations[fact.relation]
    if prompt is None:
        prompt = rng.choice(relation.templates)
    others = [template for template in relation.templates if template != prompt]
    if new_object is None:
        new_object = rng.choice(
            [f.object for f in world.facts if f.relation == fact.relation and f.object != fact.object]
        )

    def about_others(of: str) -> tuple[str, ...]:
        pool = [f for f in having[fact.relation, of] if f.subject != fact.subject]
        chosen = rng.sample(pool, min(NEIGHBORS, len(pool)))
        return tuple(rng.choice(relation.templates).replace("{}", f.subject) for f in chosen)

    return Record(
        case_id=case_id,
        relation=fact.relation,
        rewrite=fact.as_fact(prompt).rewrite(new_object),
        paraphrase=tuple(
            f"{_unrelated(fact, world, rng)} {template.replace('{}', fact.subject)}"
            for template in rng.sample(others, PARAPHRASES)
        ),
        neighborhood=about_others(fact.object),
        attribute=about_others(new_object),
        generation=tuple(opening.replace("{}", fact.subject) for opening in relation.generation),
    )


def _unrelated(fact: WorldFact, world: World, rng: random.Random) -> str:
    """A true sentence of the world about another subject and relation."""
    while True:
        other = rng.choice(world.facts)
        if other.subject != fact.subject and other.relation != fact.relation:
            return f"{rng.choice(world.taught(other)).replace('{}', other.subject)} {other.object}."
