"""Builds a CounterFact from a table of facts as in section 3.3 of the paper: each fact (s, r, oᶜ) becomes a record.

| part | is |
|---|---|
| rewrite prompt | a template of r |
| o* | another object of r, drawn by frequency, never one that s also has |
| paraphrases | other templates of r, each after a sentence about something else |
| neighborhood | other subjects that have oᶜ, and not o*, each through any template of r |
| attribute | other subjects that have o*, and not oᶜ, each through any template of r |
| generation | r's openings in random order, again from the first one on until there are enough |
| snippets | reference texts about subjects that have o*, and about those that have oᶜ, s included |

Every draw orders its candidates by digests of the seed, the fact and the candidate, and takes the first. So a record
depends on no other record nor on the order of the table, and adding a fact changes few records.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from errata.base.config import Config
from errata.base.errors import ConfigError
from errata.base.facts import SLOT, Fact, Rewrite
from errata.base.seeds import derive
from errata.base.text import after_sentence, ended
from errata.data.records import Record
from errata.data.snippets import Snippet, Snippets
from errata.data.templates import Wordings
from errata.data.triples import Triple, folded, uniform

LessLikely = Callable[[Sequence[Rewrite]], Sequence[bool]]

_MOST_ASKED = 64  # rewrites that `less_likely` gets together
_TRIED = 50  # sentences of which the least related are taken


class BuildConfig(Config):
    """Settings of a build; the defaults of `neighbors` to `generation` are those of the published set."""

    count: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of records; None: all that can be made. A smaller count gives the first records "
        "of a larger one.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of every random choice.")
    neighbors: int = Field(
        default=10,
        ge=1,
        description="Number of neighborhood prompts, and of attribute prompts, of each record. A fact with fewer "
        "makes no record.",
    )
    paraphrases: int = Field(
        default=2, ge=1, description="Number of paraphrases of each record; its relation needs one template more."
    )
    generation: int = Field(
        default=10,
        ge=0,
        description="Number of generation prompts of each record; a relation without generation templates gives none.",
    )
    once: bool = Field(default=False, description="Make at most one record for each subject.")


@dataclass(frozen=True)
class Built:
    """Result of a build.

    Attributes:
        records: numbered from 0.
        snippets: a text about every subject that has the new or the old object of a record, the record's own subject
            included.
        missed: facts that make no record, by reason. Facts that were not reached, because there were enough records,
            are not listed.
    """

    records: tuple[Record, ...]
    snippets: Snippets
    missed: Mapping[str, tuple[Triple, ...]]


def build(
    facts: Iterable[Triple],
    templates: Mapping[str, Wordings],
    config: BuildConfig | None = None,
    *,
    sentences: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
    chosen: Collection[Triple] | None = None,
    less_likely: LessLikely | None = None,
    progress: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> Built:
    """Make records from facts.

    Args:
        facts: all that is true, in any order. A name may be written in several ways (`triples.folded`): it becomes
            the one that is most frequent.
        templates: wordings by relation.
        config: the settings; or give them by name, as in `build(facts, templates, neighbors=3)`.
        sentences: what may stand before paraphrases; if none are given, the facts themselves.
        texts: texts about subjects, for reference; a subject without one is told of by its facts.
        chosen: the facts that are made into records; the others are neighbours all the same, and true. None: all.
        less_likely: asked whether the new object of each rewrite is less probable than the old one; where it is not,
            another one is drawn.
        progress: called with facts looked at and facts in all.
        **settings: of `BuildConfig`.

    Raises:
        ConfigError: if a setting is unknown or out of range, given twice, or two names of templates are one relation.
    """
    if config is not None and settings:
        raise ConfigError(f"settings are given twice, as config and by name ({', '.join(settings)}): give them one way")
    maker = Maker(facts, templates, config or BuildConfig(**settings), sentences=sentences, texts=texts)
    return maker.build(chosen, less_likely, progress)


class Maker:
    """Facts and their wordings, ready to be drawn from.

    Attributes:
        facts: every fact once, with uniform names, in an order of their own.
        wordings: the templates of each relation.
        unused: relations that have templates and no fact.
        config: the settings.
    """

    def __init__(
        self,
        facts: Iterable[Triple],
        templates: Mapping[str, Wordings],
        config: BuildConfig,
        *,
        sentences: Sequence[str] = (),
        texts: Mapping[str, str] | None = None,
        taught: Callable[[Triple], Sequence[str]] | None = None,
    ) -> None:
        """See `build`.

        Args:
            facts: see there, as for the others.
            templates: see there.
            config: the settings.
            sentences: see there.
            texts: see there.
            taught: the templates by which a sentence may tell a fact; None: all of its relation.
        """
        self.config = config
        self.facts = uniform(facts, templates)
        names = {folded(name): name for name in templates}
        if len(names) < len(templates):
            (one, other), *_ = ((names[folded(name)], name) for name in templates if names[folded(name)] != name)
            raise ConfigError(f"there are templates for {one!r} and for {other!r}, which are one relation: join them")
        self.wordings = {" ".join(name.split()): wordings for name, wordings in templates.items()}
        self.unused = tuple(sorted(self.wordings.keys() - {fact.relation for fact in self.facts}))
        self._having: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._objects: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        for fact in self.facts:
            self._having[fact.relation, fact.object].add(fact.subject)
            self._objects[fact.subject, fact.relation].add(fact.object)
            self._counts[fact.relation][fact.object] += 1
        self._told: dict[str, list[_Sentence]] = defaultdict(list)
        for fact in self.facts:
            if fact.relation in self.wordings:
                options = taught(fact) if taught else self.wordings[fact.relation].templates
                template = self._pick(options, "told", *fact.names)
                sentence = ended(Fact(fact.subject, template, fact.object).statement).rstrip()
                self._told[fact.subject].append(_Sentence(sentence, folded(sentence), fact.relation))
        self._texts = {folded(subject): text for subject, text in (texts or {}).items()}
        given = [_Sentence(text, folded(text)) for text in dict.fromkeys(" ".join(each.split()) for each in sentences)]
        told = itertools.chain.from_iterable(self._told.values())
        # On a ring, from which each record takes some from a place of its own on.
        self._ring = sorted((self._place("sentence", each.text), each) for each in given or told)

    def build(
        self,
        chosen: Collection[Triple] | None = None,
        less_likely: LessLikely | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Built:
        """All records, or `config.count`; arguments as of the function `build`."""
        wanted = None if chosen is None else {fact.identity for fact in chosen}
        facts = [fact for fact in self.facts if wanted is None or fact.identity in wanted]
        facts.sort(key=lambda fact: self._place("record", *fact.names))
        made: list[Record] = []
        missed: dict[str, list[Triple]] = defaultdict(list)
        subjects: set[str] = set()
        begin = 0
        while begin < len(facts) and len(made) != self.config.count:
            some = facts[begin : begin + _MOST_ASKED]
            new_objects, reasons = self._new_objects(some, less_likely)
            for fact in some:
                if fact in new_objects and self.config.once and fact.subject in subjects:
                    reasons[fact] = "another record is about its subject"
                if fact in reasons:
                    missed[reasons[fact]].append(fact)
                    continue
                subjects.add(fact.subject)
                made.append(self.record(fact, new_objects[fact], case_id=len(made)))
                if len(made) == self.config.count:
                    break
            begin += len(some)
            if progress:
                progress(begin, len(facts))
        return Built(
            tuple(made),
            self._snippets(made),
            {reason: tuple(sorted(its, key=lambda fact: fact.identity)) for reason, its in sorted(missed.items())},
        )

    def record(self, fact: Triple, new_object: str, prompt: str | None = None, case_id: int = 0) -> Record:
        """The record of one fact with this new object, and with as many prompts as there are.

        Args:
            fact: one of `facts`.
            new_object: o*.
            prompt: the template of the rewrite; None: as it is drawn.
            case_id: its number.
        """
        wordings = self.wordings[fact.relation]
        asked = self.asked(fact) if prompt is None else Fact(fact.subject, prompt, fact.object)
        others = self._drawn([each for each in wordings.templates if each != asked.prompt], "paraphrase", *fact.names)
        openings = self._drawn(wordings.generation, "generation", *fact.names)
        before = itertools.cycle(self._unrelated(fact, new_object))
        return Record(
            case_id=case_id,
            relation=fact.relation,
            rewrite=asked.rewrite(new_object),
            paraphrase=tuple(
                after_sentence(sentence, template.replace(SLOT, fact.subject))
                for sentence, template in zip(before, others[: self.config.paraphrases], strict=False)
            ),
            neighborhood=self._others("neighborhood", fact, fact.object, new_object),
            attribute=self._others("attribute", fact, new_object, fact.object),
            generation=tuple(
                opening.replace(SLOT, fact.subject)
                for opening in itertools.islice(itertools.cycle(openings), self.config.generation)
            ),
            object_ids=(fact.object, new_object),
        )

    def asked(self, fact: Triple) -> Fact:
        """A fact with the template of its rewrite.

        Raises:
            KeyError: if its relation has no templates.
        """
        wordings = self.wordings[fact.relation]
        prompt = wordings.prompt or self._drawn(wordings.templates, "prompt", *fact.names)[0]
        return Fact(fact.subject, prompt, fact.object)

    def unfit(self, fact: Triple) -> str | None:
        """Why a fact can make no record, whatever its new object; None if it can."""
        wordings, wanted = self.wordings.get(fact.relation), self.config.neighbors
        if wordings is None:
            return "its relation has no templates"
        if len(wordings.templates) <= self.config.paraphrases:
            return f"its relation has fewer than {self.config.paraphrases + 1} templates"
        if len(self._having[fact.relation, fact.object]) <= wanted:
            return f"its object has fewer than {wanted} other subjects"
        if not self._others_than(fact):
            return "its relation has no other object"
        if next(self._not_naming(fact.subject), None) is None:
            return "no sentence for its paraphrases is without its subject"
        return None

    def new_objects(self, fact: Triple) -> Iterator[str]:
        """The possible objects o*, in the order in which they are drawn."""
        count, wanted = self._counts[fact.relation], self.config.neighbors

        def rank(name: str) -> float:  # an exponential race: each comes first as often as it is frequent
            return -math.log((self._place("new object", *fact.names, name) + 1) / 2**63) / count[name]

        for name in sorted((o for o in self._others_than(fact) if count[o] >= wanted), key=rank):
            if min(len(self._only(fact, fact.object, name)), len(self._only(fact, name, fact.object))) >= wanted:
                yield name

    def _new_objects(
        self, facts: Sequence[Triple], less_likely: LessLikely | None
    ) -> tuple[dict[Triple, str], dict[Triple, str]]:
        """o* of each fact that has one, and why the others have none."""
        reasons = {fact: reason for fact in facts if (reason := self.unfit(fact))}
        left = {fact: self.new_objects(fact) for fact in facts if fact not in reasons}
        found: dict[Triple, str] = {}
        refused: set[Triple] = set()
        while left:
            asked: dict[Triple, str] = {}
            for fact, names in left.items():
                if name := next(names, None):
                    asked[fact] = name
                elif fact in refused:
                    reasons[fact] = "no new object is less likely to the model"
                else:
                    reasons[fact] = f"no other object has {self.config.neighbors} subjects of its own"
            rewrites = [self.asked(fact).rewrite(name) for fact, name in asked.items()]
            verdicts = less_likely(rewrites) if less_likely and rewrites else [True] * len(rewrites)
            found |= {fact: name for (fact, name), less in zip(asked.items(), verdicts, strict=True) if less}
            left = {fact: left[fact] for fact in asked if fact not in found}
            refused |= left.keys()
        return found, reasons

    def _others_than(self, fact: Triple) -> list[str]:
        """The relation's objects that are false of the subject, and are not the subject itself."""
        true, itself = self._objects[fact.subject, fact.relation], folded(fact.subject)
        return [name for name in self._counts[fact.relation] if name not in true and folded(name) != itself]

    def _only(self, fact: Triple, wanted: str, unwanted: str) -> set[str]:
        """Other subjects that have one object of the fact's relation and not the other."""
        of = fact.relation
        return self._having.get((of, wanted), set()) - self._having.get((of, unwanted), set()) - {fact.subject}

    def _others(self, what: str, fact: Triple, wanted: str, unwanted: str) -> tuple[str, ...]:
        """Prompts about other subjects that have one object and not the other."""
        subjects = self._drawn(self._only(fact, wanted, unwanted), what, *fact.names)[: self.config.neighbors]
        templates = self.wordings[fact.relation].templates
        return tuple(
            self._pick(templates, f"{what} template", *fact.names, each).replace(SLOT, each) for each in subjects
        )

    def _unrelated(self, fact: Triple, new_object: str) -> list[str]:
        """Sentences that do not name the subject, those first that have least in common with the rewrite."""
        objects = (_naming(fact.object), _naming(new_object))

        def in_common(one: _Sentence) -> int:
            return (one.relation == fact.relation) + sum(bool(its.search(one.plain)) for its in objects)

        start = bisect.bisect(self._ring, (self._place("sentences", *fact.names),))
        tried = itertools.islice(self._not_naming(fact.subject, start), _TRIED)
        return [each.text for each in sorted(tried, key=in_common)[: self.config.paraphrases]]

    def _not_naming(self, subject: str, start: int = 0) -> Iterator[_Sentence]:
        name = _naming(subject)
        for _, sentence in itertools.chain(self._ring[start:], self._ring[:start]):
            if not name.search(sentence.plain):
                yield sentence

    def _snippets(self, records: Iterable[Record]) -> Snippets:
        """Texts on all subjects that have the objects of these records."""
        pairs = {(record.relation, name) for record in records for name in record.object_ids}
        return Snippets(
            {
                pair: tuple(Snippet(subject, self._text(subject)) for subject in sorted(self._having[pair]))
                for pair in sorted(pairs)
            }
        )

    def _text(self, subject: str) -> str:
        """Text about a subject."""
        text = self._texts.get(folded(subject))
        return text or " ".join(sentence.text for sentence in self._told[subject])

    def _drawn(self, candidates: Iterable[str], what: str, *names: str) -> list[str]:
        """All candidates in random order."""
        return sorted(candidates, key=lambda each: self._place(what, *names, each))

    def _pick(self, options: Sequence[str], what: str, *names: str) -> str:
        return options[self._place(what, *names) % len(options)]

    def _place(self, what: str, *names: str) -> int:
        """Position of something in a draw, in [0, 2^63)."""
        return derive(self.config.seed, what, *names)


@dataclass(frozen=True, order=True)
class _Sentence:
    """A sentence, unchanged and in a form for searching, and its relation, if known."""

    text: str
    plain: str = field(compare=False)
    relation: str | None = field(default=None, compare=False)


def _naming(name: str) -> re.Pattern[str]:
    """Finds a name in a folded text: as whole words, except in scripts that may write none."""
    plain = re.escape(folded(name))
    return re.compile(rf"(?<!\w){plain}(?!\w)" if name.isascii() else plain)
