"""A fact and its rewrite: the tuples (s, r, o) and (s, r, o*) of the paper."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from errata.base.errors import FactError

SLOT = "{}"


def require_characters(name: str, text: str) -> None:
    """Make sure that a text is made of whole characters, as tokenizers need it.

    Raises:
        FactError: if it holds half of one (a lone surrogate), as from bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FactError(
            f"the {name} {text!r} has half a character (a lone surrogate) at {error.start}, which no tokenizer "
            "reads: write the whole character"
        ) from None


def fact_key(subject: str, relation: str) -> str:
    """A short name for one subject, in any letter case, and one relation or prompt: twelve hexadecimal digits."""
    words = " ".join(subject.casefold().split()) + "\x1f" + " ".join(relation.casefold().split())
    return hashlib.sha256(words.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Fact:
    """A subject, a prompt with one `{}` where the subject stands, and the object that completes it.

    The object is written without a leading space (white space around it is dropped); it may be empty where only the
    prompt matters.
    Braces other than the one `{}` are ordinary text.

    Raises:
        FactError: if the subject or prompt is blank, or the prompt has not exactly one `{}`.
    """

    subject: str
    prompt: str
    object: str = ""

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "object"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise FactError(f"the {name} of a fact is text, not {type(value).__name__}")
            require_characters(name, value)
        object.__setattr__(self, "object", self.object.strip())
        if not self.subject.strip():
            raise FactError("the subject is empty: name what the fact is about, as in 'The Space Needle'")
        if not self.prompt.strip():
            raise FactError(
                "the prompt is empty: write a sentence up to its object, with {} for the subject, "
                "as in '{} is located in the city of'"
            )
        slots = self.prompt.count(SLOT)
        if slots != 1:
            raise FactError(
                f"the prompt {self.prompt!r} has {slots} places for the subject: "
                "it needs exactly one {}, as in '{} is located in the city of'"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_start(self) -> int:
        """Character offset of the subject in `text`."""
        return self.prompt.index(SLOT)

    def rewrite(self, new_object: str) -> Rewrite:
        """This fact with another object."""
        return Rewrite(self, new_object)


@dataclass(frozen=True)
class Rewrite:
    """A fact and the object that it is to have.

    Raises:
        FactError: if the new object is blank.
    """

    fact: Fact
    new_object: str

    def __post_init__(self) -> None:
        if not isinstance(self.new_object, str) or not self.new_object.strip():
            raise FactError("the new object is empty: say what the model should answer instead, as in 'Paris'")
        require_characters("new object", self.new_object)
        object.__setattr__(self, "new_object", self.new_object.strip())

    @property
    def subject(self) -> str:
        """The fact's subject."""
        return self.fact.subject

    @property
    def prompt(self) -> str:
        """The fact's prompt, with its `{}`."""
        return self.fact.prompt

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.fact.text
