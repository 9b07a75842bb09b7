"""The contexts x_j + p over which ROME averages its key and optimises its value: prefixes before the prompt.

Prefixes are samples of the model's own text (section 3.1 of the paper), so that the edit does not depend on the prompt
being at the beginning of the text. Contexts are made by joining strings, never by formatting: braces in a prefix or a
subject are ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.base.facts import Fact
from errata.editors.prefixes import sampled
from errata.models.model import Model
from errata.models.tokens import Role, after_prefix, locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Lengths in tokens of the sampled prefixes, and whether the bare prompt is a context too.
PRESETS: dict[str, tuple[tuple[int, ...], bool]] = {
    "paper": (tuple(2 + i % 9 for i in range(50)), False),
    "reference": ((4,) * 10 + (9,) * 10, True),
    "none": ((), True),
}


@dataclass(frozen=True)
class Context:
    """A prefix and a prompt: the whole text, and where in it the subject starts (in characters)."""

    text: str
    start: int
    subject: str

    @classmethod
    def of(cls, fact: Fact, prefix: str, tokenizer: PreTrainedTokenizerBase) -> Context:
        """The fact's prompt after a prefix, as `after_prefix` joins them."""
        text = after_prefix(tokenizer, prefix, fact.text)
        return cls(text, len(text) - len(fact.text) + fact.subject_start, fact.subject)

    def lookup(self, model: Model, role: Role) -> tuple[tuple[int, ...], int]:
        """Its token ids, and the index of the token in that role.

        Raises:
            FactError: if no token has it.
        """
        span = locate(model.tokenizer, self.text, self.start, self.subject)
        return span.ids, span.role(role)


def prefixes(model: Model, wanted: str | Sequence[str], seed: int) -> tuple[str, ...]:
    """The strings to put before a prompt: given ones, or samples from the model by a preset.

    They depend on the model and the seed, not on the fact: for many edits, sample once and give the strings.

    Raises:
        ConfigError: if the model's tokenizer has no token to start sampling from.
    """
    if not isinstance(wanted, str):
        return tuple(wanted)
    lengths, bare = PRESETS[wanted]
    return (("",) if bare else ()) + sampled(model, lengths, seed, "rome")


def count(wanted: str | Sequence[str]) -> int:
    """Number of prefixes."""
    if not isinstance(wanted, str):
        return len(wanted)
    lengths, bare = PRESETS[wanted]
    return len(lengths) + bare
