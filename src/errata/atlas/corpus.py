"""Short biographies: the only text that the atlas ever reads.

A biography says several facts of one subject, in random order, each in a random template that is not held out.
A document strings biographies of different subjects together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from errata.atlas.world import World
from errata.base.seeds import derive

END = "<|endoftext|>"
SEPARATORS = (" ", " ", "\n", END)


@dataclass(frozen=True)
class Document:
    """A text and where subjects are mentioned in it, as `(start, end)` characters."""

    text: str
    mentions: tuple[tuple[int, int], ...]


def documents(world: World, seed: int, characters: int) -> Iterator[Document]:
    """Endless documents of at least `characters` characters. Every subject comes once before any comes again."""
    rng = random.Random(derive(seed, "documents"))
    queue: list[str] = []
    while True:
        text, mentions = "", []
        while len(text) < characters:
            if not queue:
                queue = list(world.by_subject)
                rng.shuffle(queue)
            # What kind of thing a subject is says itself in most other facts: one biography in four states it.
            facts = [f for f in world.by_subject[queue.pop()] if f.relation != "kind" or rng.random() < 0.25]
            rng.shuffle(facts)
            if text:
                text += rng.choice(SEPARATORS)
            # Half of the biographies are whole; the others break off, so that any fact may come first and alone.
            for fact in facts[: rng.choice((1, 2, len(facts), len(facts)))]:
                if text and not text.endswith(("\n", END, " ")):
                    text += " "
                prompt = rng.choice(world.taught(fact))
                start = len(text) + prompt.index("{}")
                mentions.append((start, start + len(fact.subject)))
                text += f"{prompt.replace('{}', fact.subject)} {fact.object}."
        yield Document(text, tuple(mentions))


def texts(world: World, seed: int = 0, characters: int = 600) -> Iterator[str]:
    """The corpus as plain text, for tokenizers and second moments."""
    return (document.text for document in documents(world, seed, characters))
