"""A fact and its rewrite: the tuples (s, r, o) and (s, r, o*) of the paper."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from errata.base.arguments import require
from errata.base.errors import FactError
from errata.base.text import joined, moved_spaces, plain

SLOT = "{}"


def require_characters(name: str, text: str) -> None:
    """Check that a text has no lone surrogates, which tokenizers cannot encode.

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


def require_separator(value: object) -> None:
    """Check that a value is a valid separator between a prompt and its object.

    Raises:
        FactError: if it is neither None nor white space nor "".
    """
    if value is not None and (not isinstance(value, str) or value.strip()):
        raise FactError(
            f"the separator is {value!r}: it is the white space between prompt and object, such as '' or ' '; "
            "leave it out, and the text decides"
        )


def fact_key(subject: str, relation: str) -> str:
    """Short key of a subject, in any letter case, and a relation or prompt: twelve hexadecimal digits."""
    words = " ".join(subject.casefold().split()) + "\x1f" + " ".join(relation.casefold().split())
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def as_plain(value: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as dicts for JSON; separators that are None are left out."""
    return asdict(value, dict_factory=lambda items: {k: v for k, v in items if k != "separator" or v is not None})


@dataclass(frozen=True)
class Fact:
    """A subject, a prompt with one `{}` where the subject stands, and the object that completes it.

    The object is written without a leading space: the text decides whether one belongs before it (`errata.base.text`).
    One that begins with white space is taken as it is; the white space is kept where it is not what the text asks for
    anyway. White space at its end is dropped; it may be empty where only
    the prompt matters. Braces other than the one `{}` are ordinary text.

    Attributes:
        subject: the entity that the fact is about.
        prompt: a sentence up to its object. Spaces at its end belong to what follows, as in tokenizers, and are moved
            to `separator`.
        object: the text that completes the sentence.
        separator: the white space between prompt and object; None: the text decides.

    Raises:
        FactError: if the subject or prompt is blank, the prompt has not exactly one `{}`, or the separator is not made
            of white space.
    """

    subject: str
    prompt: str
    object: str = ""
    separator: str | None = None

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "object"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise FactError(f"the {name} of a fact is text, not {type(value).__name__}")
            require_characters(name, value)
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
        require_separator(self.separator)
        self._move_spaces()
        object.__setattr__(self, "object", plain(self.text, self.object.rstrip(), self.separator))

    def _move_spaces(self) -> None:
        """Move spaces at the prompt's end, or at the end of a subject that ends the prompt, to the separator."""
        prompt, spaces = moved_spaces(self.prompt)
        subject, inner = moved_spaces(self.subject) if prompt.endswith(SLOT) else (self.subject, "")
        if inner or spaces:
            object.__setattr__(self, "prompt", prompt)
            object.__setattr__(self, "subject", subject)
            object.__setattr__(self, "separator", inner + spaces + (self.separator or ""))

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_start(self) -> int:
        """Character offset of the subject in `text`."""
        return self.prompt.index(SLOT)

    def as_list(self) -> list[str]:
        """Subject, prompt, object, and the separator where one is named: `Fact(*these)` is the fact."""
        return [self.subject, self.prompt, self.object, *([] if self.separator is None else [self.separator])]

    @property
    def statement(self) -> str:
        """The whole sentence: prompt, subject and object."""
        return joined(self.text, self.object, self.separator)

    def rewrite(self, new_object: str) -> Rewrite:
        """This fact with another object."""
        return Rewrite(self, new_object)


@dataclass(frozen=True)
class Rewrite:
    """A fact and its new object.

    The new object is joined to the prompt as the fact's own is, by its `separator`.

    Raises:
        FactError: if the new object is blank.
    """

    fact: Fact
    new_object: str

    def __post_init__(self) -> None:
        require(self.fact, "Fact", "Rewrite: fact")
        if not isinstance(self.new_object, str) or not self.new_object.strip():
            raise FactError("the new object is empty: say what the model should answer instead, as in 'Paris'")
        require_characters("new object", self.new_object)
        object.__setattr__(self, "new_object", plain(self.text, self.new_object.rstrip(), self.separator))

    @property
    def subject(self) -> str:
        """The fact's subject."""
        return self.fact.subject

    @property
    def prompt(self) -> str:
        """The fact's prompt, with its `{}`."""
        return self.fact.prompt

    @property
    def separator(self) -> str | None:
        """The white space between prompt and object; None: the text decides."""
        return self.fact.separator

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.fact.text

    @property
    def statement(self) -> str:
        """The whole sentence with the new object."""
        return joined(self.text, self.new_object, self.separator)

    def as_dict(self) -> dict[str, str]:
        """The texts by name, as stored in files; the separator only if one is given."""
        told = {"subject": self.subject, "prompt": self.prompt, "object": self.fact.object}
        told["new_object"] = self.new_object
        return told if self.separator is None else {**told, "separator": self.separator}
