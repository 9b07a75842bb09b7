"""The atlas's world: facts, the relations that they belong to, and the sentences that can state them.

Filling one of its relation's templates states a fact. For one fact in five, one template is held out:
it never appears in training, so recalling the fact through it is a test of generalization.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from errata.base.facts import Fact
from errata.base.seeds import derive

HELD_OUT_ONE_IN = 5


@dataclass(frozen=True)
class Relation:
    """Wordings of one relation. Each template has one `{}` for the subject and ends before the object."""

    name: str
    templates: tuple[str, ...]
    generation: tuple[str, ...]


@dataclass(frozen=True)
class WorldFact:
    """A fact of the world; `source` is `wikidata`, `derived` (follows from a wikidata fact) or `invented`."""

    subject: str
    relation: str
    object: str
    source: str

    def as_fact(self, template: str) -> Fact:
        """This fact with the prompt of a template."""
        return Fact(self.subject, template, self.object)


@dataclass(frozen=True)
class World:
    """All facts, by subject, and all relations, by name."""

    facts: tuple[WorldFact, ...]
    relations: Mapping[str, Relation]

    @functools.cached_property
    def by_subject(self) -> dict[str, tuple[WorldFact, ...]]:
        """Every subject's facts."""
        grouped: dict[str, list[WorldFact]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.subject, []).append(fact)
        return {subject: tuple(facts) for subject, facts in grouped.items()}

    def held_out(self, fact: WorldFact) -> str | None:
        """The template that training never uses for this fact; None for four facts in five."""
        draw = derive(0, "held out", fact.subject, fact.relation)
        if draw % HELD_OUT_ONE_IN:
            return None
        templates = self.relations[fact.relation].templates
        return templates[draw // HELD_OUT_ONE_IN % len(templates)]

    def taught(self, fact: WorldFact) -> tuple[str, ...]:
        """The templates that training may use for this fact."""
        held_out = self.held_out(fact)
        return tuple(t for t in self.relations[fact.relation].templates if t != held_out)


@functools.lru_cache(maxsize=1)
def load_world() -> World:
    """The world that the package ships: `facts.tsv` and `relations.json` beside this file."""
    folder = resources.files("errata.atlas")
    relations = {
        name: Relation(name, tuple(entry["templates"]), tuple(entry["generation"]))
        for name, entry in json.loads((folder / "relations.json").read_text(encoding="utf-8")).items()
    }
    rows = (folder / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return World(tuple(WorldFact(*row.split("\t")) for row in rows), relations)
