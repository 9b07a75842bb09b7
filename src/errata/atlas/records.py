"""A CounterFact of the atlas's world, built from its table in a moment, as one is built of any table of facts.

Sentences before paraphrases, and reference texts, tell facts as the atlas's training told them.
"""

from __future__ import annotations

from errata.atlas.world import World, WorldFact, load_world
from errata.benchmarks.build import BuildConfig, Built, Maker
from errata.benchmarks.records import Record
from errata.benchmarks.snippets import Snippets
from errata.benchmarks.templates import Wordings
from errata.benchmarks.triples import Triple


def records(count: int = 500, seed: int = 0, world: World | None = None) -> tuple[Record, ...]:
    """Seeded records, one a subject, of real facts that have at least ten neighbours.

    The first n of a larger set are the set of n. Fewer are returned only if the world has no more.
    """
    return built(count, seed, world).records


def snippets(count: int = 500, seed: int = 0, world: World | None = None) -> Snippets:
    """Texts on subjects that have the objects of `records(count, seed, world)`: biographies as the atlas read them."""
    return built(count, seed, world).snippets


def built(count: int = 500, seed: int = 0, world: World | None = None) -> Built:
    """The records with their reference texts, and why other facts make none."""
    world = world or load_world()
    real = [_triple(fact) for fact in world.facts if fact.source != "invented" and fact.relation != "kind"]
    return _maker(world, BuildConfig(count=count, seed=seed, once=True)).build(real)


def record_of(subject: str, relation: str, new_object: str, prompt: str | None = None, seed: int = 0) -> Record:
    """The record of one fact of the world with a new object, and a rewrite prompt, of one's choice.

    Raises:
        KeyError: if the world has no such fact.
    """
    world = load_world()
    fact = {(f.subject, f.relation): f for f in world.facts}[subject, relation]
    return _maker(world, BuildConfig(seed=seed)).record(_triple(fact), new_object, prompt)


def _maker(world: World, config: BuildConfig) -> Maker:
    known = {_triple(fact): fact for fact in world.facts}
    wordings = {name: Wordings(each.templates, each.generation) for name, each in world.relations.items()}
    return Maker(known, wordings, config, taught=lambda triple: world.taught(known[triple]))


def _triple(fact: WorldFact) -> Triple:
    return Triple(fact.subject, fact.relation, fact.object)
