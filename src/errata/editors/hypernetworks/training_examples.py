"""Training examples of a trained editor: edits, with prompts that should change and prompts that should not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from errata.base.errors import FactError
from errata.base.facts import Fact, Rewrite, as_plain, fact_key
from errata.base.seeds import derive
from errata.models.generation import generate
from errata.models.model import Model


@dataclass(frozen=True)
class TrainingExample:
    """One edit, with the prompts and texts that judge it.

    Attributes:
        rewrite: the edit.
        equivalents: prompts after which the edited model should say the new object; at least one.
        others: prompts and targets of which what the model says should stay as it is.
        relation: the relation's name, if it has one, by which a fact is known again in other words.
    """

    rewrite: Rewrite
    equivalents: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()
    relation: str = ""

    def __post_init__(self) -> None:
        if not self.equivalents:
            raise FactError(
                f"the training example on {self.rewrite.text!r} has no prompt to be judged by: give the prompt itself"
            )


def keys(examples: Sequence[TrainingExample]) -> list[str]:
    """`fact_key` of each edited fact, sorted: one by its relation's name, if it has one, and one by its prompt."""
    names = [(each.rewrite.subject, name) for each in examples for name in (each.relation, each.rewrite.prompt) if name]
    return sorted({fact_key(*each) for each in names})


def sha256(examples: Sequence[TrainingExample]) -> str:
    """sha256 of training examples, in hex."""
    return hashlib.sha256(json.dumps([as_plain(each) for each in examples], sort_keys=True).encode()).hexdigest()


def _parted(model: Model, text: str, prompt_tokens: int, target_tokens: int) -> tuple[str, str] | None:
    """A text's first tokens, up to the end of a word, and its continuation; None if it is too short."""
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = encoded["offset_mapping"]
    for i in range(prompt_tokens, len(places) - target_tokens + 1):
        begin = places[i][0]
        if text[begin - 1 : begin + 1].strip() != text[begin - 1 : begin + 1]:
            return text[:begin].rstrip(), text[begin : places[i + target_tokens - 1][1]].lstrip()
    return None


def text_examples(
    model: Model, texts: Sequence[str], seed: int = 0, prompt_tokens: int = 16, target_tokens: int = 10
) -> list[TrainingExample]:
    """Training examples from plain text, like MEND's from Wikitext: new continuations of ten tokens.

    The prompt is the beginning of a text up to the end of a word, the target what the model samples after the beginning
    of another. The continuation of a third text should stay. Texts that are too short are skipped.

    Raises:
        FactError: if fewer than three texts are long enough.
    """
    long = [
        parts
        for text in texts
        if "{}" not in text and (parts := _parted(model, " ".join(text.split()), prompt_tokens, target_tokens))
    ]
    if len(long) < 3:
        raise FactError(
            f"{len(long)} of {len(texts)} texts have {prompt_tokens + target_tokens} tokens, and a training example "
            "takes three: give more or longer ones"
        )
    prompts = [prompt for prompt, _ in long]
    seeds = [derive(seed, "lesson", i) for i in range(len(long))]
    sampled = generate(model, prompts, target_tokens, top_k=5, seed=seeds)
    written = [text[len(prompt) :].strip() for text, prompt in zip(sampled, prompts, strict=True)]
    found = []
    for i, (prompt, true) in enumerate(long):
        new, other = written[(i + 1) % len(long)], long[(i + 2) % len(long)]
        if new and prompt.strip() and other[1].strip():
            subject = prompt.split()[0]
            fact = Fact(subject, prompt.replace(subject, "{}", 1), true, separator=" ")
            found.append(TrainingExample(fact.rewrite(new), (prompt,), (other,)))
    return found
