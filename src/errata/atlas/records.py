"""CounterFact and zsRE records of the atlas's world, built on the fly from its table of facts.

Sentences before paraphrases, and reference texts, state facts in the way of the training texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from errata.atlas.world import World, WorldFact, load_world
from errata.base.facts import SLOT, Fact
from errata.base.seeds import derive
from errata.data.build import BuildConfig, Built, Maker
from errata.data.records import Record, ZsreRecord
from errata.data.snippets import Snippets
from errata.data.templates import Wordings
from errata.data.triples import Triple
from errata.tasks.task import Case


def records(count: int = 500, seed: int = 0, world: World | None = None) -> tuple[Record, ...]:
    """Seeded records, one a subject, of real facts that have at least ten neighbours.

    The first n of a larger set are the set of n. Fewer are returned only if the world has no more.
    """
    return built(count, seed, world).records


def snippets(count: int = 500, seed: int = 0, world: World | None = None) -> Snippets:
    """Texts on subjects with the objects of `records(count, seed, world)`: biographies like those in training."""
    return built(count, seed, world).snippets


def built(count: int = 500, seed: int = 0, world: World | None = None) -> Built:
    """The records, their reference texts, and the reasons why other facts make no record."""
    world = world or load_world()
    real = [_triple(fact) for fact in _real(world)]
    return _maker(world, BuildConfig(count=count, seed=seed, once=True)).build(real)


def zsre_records(count: int = 500, seed: int = 0, world: World | None = None) -> tuple[ZsreRecord, ...]:
    """The rewrites of `records(count, seed, world)` as zsRE records.

    The rephrasing has no sentence before it; the fact that must stay is of another subject and another relation.

    The answers to be are false, for the atlas knows the true ones.
    """
    made = records(count, seed, world)
    world = world or load_world()
    real = _real(world)
    return tuple(_as_zsre(record, world, real, seed) for record in made)


def _counterfact(count: int, seed: int) -> tuple[Sequence[Case], Snippets | None]:
    # Reference texts are of all records, so that those of a run do not change when others are added to it.
    made = built(max(count, _REFERENCES), seed)
    return made.records[:count], made.snippets


_REFERENCES = 500
BY_TASK: Mapping[str, Callable[[int, int], tuple[Sequence[Case], Snippets | None]]] = {
    "counterfact": _counterfact,
    "zsre": lambda count, seed: (zsre_records(count, seed), None),
}
"""By name of a task: makes so many records with a seed, and reference texts for them."""


def _as_zsre(record: Record, world: World, real: Sequence[WorldFact], seed: int) -> ZsreRecord:
    fact, new = record.rewrite.fact, record.rewrite.new_object

    def drawn(what: str, count: int) -> int:
        return derive(seed, what, fact.subject, record.relation) % count

    wordings = [each for each in world.relations[record.relation].templates if each != fact.prompt]
    start = drawn("zsre other", len(real))
    other = next(
        each
        for each in (*real[start:], *real[:start])
        if each.subject != fact.subject and each.relation != record.relation
    )
    taught = world.taught(other)
    return ZsreRecord(
        record.case_id,
        Fact(fact.subject, fact.prompt).rewrite(new),
        (wordings[drawn("zsre paraphrase", len(wordings))].replace(SLOT, fact.subject),),
        ((other.as_fact(taught[drawn("zsre wording", len(taught))]).text, other.object),),
    )


def _real(world: World) -> list[WorldFact]:
    """The facts that records are made of."""
    return [fact for fact in world.facts if fact.source != "invented" and fact.relation != "kind"]


def record_of(subject: str, relation: str, new_object: str, prompt: str | None = None, seed: int = 0) -> Record:
    """The record of one fact of the world with a given new object and, optionally, a given rewrite prompt.

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
