"""Position of the subject among the tokens of a prompt.

The paper reads and changes states at token positions: causal tracing corrupts every token of the subject, and ROME
edits at its last one, token i of section 3.1. Those positions are found from character offsets of the whole prompt,
tokenized once and with the tokenizer's own special tokens. Tokenizing pieces and adding up their lengths gives other
tokens wherever a token depends on its neighbours: a quote, a leading space, a start token, an emoji. Such errors would
go unnoticed.

A token belongs to the subject if it stands for at least one of its characters that is not white
space. Hence

* `first` and `last` always hold characters of the subject, and every such character that the
  tokenizer keeps is between them. A token that only begins or ends inside the subject belongs to it;
* spaces at the ends of a subject change nothing, spaces inside it are between `first` and `last`;
* of a character that is split over several tokens (byte-level tokenizers, byte fallback) all belong;
* start and end tokens that the tokenizer adds never belong, nor does a bare space that it puts
  before the text (`▁`, `Ġ`) although its offsets claim the first character.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from errata.base.errors import ConfigError, FactError, UnsupportedModel
from errata.base.facts import Fact, require_characters
from errata.base.text import after_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["subject_first", "subject_last", "after_subject", "last"]


@dataclass(frozen=True)
class Span:
    """A tokenized prompt and the position of the subject in it.

    Attributes:
        ids: token ids of the whole prompt, special tokens included.
        offsets: for every token the characters `[begin, end)` of the prompt that it stands for;
            empty for tokens that the tokenizer added.
        first: index of the subject's first token.
        last: index of the subject's last token, which is still part of it.
        tokens: for every token a string to show: the characters that it stands for, with `[k/n]`
            where n tokens share characters; the names of special tokens. Not for tokenizing again.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    first: int
    last: int
    tokens: tuple[str, ...]

    @property
    def after(self) -> int:
        """Index of the first token after the subject. It is `len(ids)` if the subject ends the prompt."""
        return self.last + 1

    def role(self, name: Role = "subject_last") -> int:
        """Index of the token in that role; `last` is the very last, even if it is an added end token.

        Raises:
            ConfigError: if there is no such role.
            FactError: if the first token after the subject is asked for and the subject ends the prompt.
        """
        if name not in get_args(Role):
            raise ConfigError(f"there is no token role {name!r}: choose one of {', '.join(get_args(Role))}")
        next_offsets = self.offsets[self.after : self.after + 1]
        if name == "after_subject" and next_offsets in ((), ((0, 0),)):  # none, or an end token
            raise FactError(
                "the subject ends the prompt, so no token comes after it: "
                "choose the role subject_last, or a prompt that goes on"
            )
        indexes = {"subject_first": self.first, "subject_last": self.last, "after_subject": self.after}
        return indexes.get(name, len(self.ids) - 1)


def locate(tokenizer: PreTrainedTokenizerBase, text: str, start: int, subject: str) -> Span:
    """Find the tokens of the subject that begins at character `start` of `text`.

    The place is given, not searched for: a subject may occur twice.

    Raises:
        FactError: if the subject is not there, or the tokenizer keeps none of its characters.
        UnsupportedModel: if the tokenizer does not tell character offsets.
    """
    stop = start + len(subject)
    if start < 0 or not subject or text[start:stop] != subject:
        raise FactError(
            f"the subject {subject!r} does not stand at character {start} of {text!r}: "
            "its tokens cannot be told. Give the offset of its first character"
        )
    ids, offsets, added = _encode(tokenizer, text)
    inserted = [_is_inserted_space(tokenizer, ids, offsets, index) for index in range(len(ids))]
    members = [
        index
        for index, (begin, end) in enumerate(offsets)
        if not inserted[index] and text[max(begin, start) : min(end, stop)].strip()
    ]
    if not members:
        raise FactError(
            f"no token stands for the subject {subject!r}: the tokenizer drops all of its characters, so "
            "there is no place to trace or to edit. Write the subject with other characters"
        )
    tokens = _readable(tokenizer, text, ids, offsets, added, inserted)
    return Span(tuple(ids), tuple(offsets), members[0], members[-1], tokens)


def locate_fact(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> Span:
    """Find the tokens of a fact's subject in its prompt; if it occurs twice, the occurrence in place of `{}`.

    Raises:
        FactError, UnsupportedModel: as `locate`.
    """
    return locate(tokenizer, fact.text, fact.subject_start, fact.subject)


def check_length(span: Span, max_length: int) -> None:
    """Check that the prompt is not too long for a model with `max_length` positions.

    Raises:
        FactError: if the prompt has more tokens than that.
    """
    if len(span.ids) > max_length:
        raise FactError(
            f"the prompt has {len(span.ids)} tokens and the model reads at most {max_length}, so it "
            f"cannot be read whole: shorten it by {len(span.ids) - max_length} tokens or more"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> dict[str, list[Any]]:
    """Token ids of one text, with the tokenizer's own special tokens; `options` are passed to the tokenizer.

    A text that begins with the start token written out, as chat templates produce it, gets no second one.
    """
    encoded: dict[str, list[Any]] = dict(tokenizer(text, verbose=False, **options))
    ids = encoded["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1]:
        start = str(tokenizer.convert_ids_to_tokens(ids[0]))
        if text.startswith(start) and text.count(start) < ids.count(ids[0]):
            warnings.warn(
                f"a text begins with the start token {start!r}, which the tokenizer puts there too: one of the two is "
                "left out, since no model was trained on both",
                stacklevel=1,  # of one place: it is told once
            )
            return {name: [values[0], *values[2:]] for name, values in encoded.items()}
    return encoded


def written_start(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The start token that a text begins with, written out, if the tokenizer puts it before every text; else ""."""
    if text[:1].isalnum():
        return ""
    encoded = tokenizer("", return_special_tokens_mask=True, verbose=False)
    ids = [i for i, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True) if added][:1]
    start = str(tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
    return start if start and text.startswith(start) else ""


def after_prefix(tokenizer: PreTrainedTokenizerBase, prefix: str, text: str) -> str:
    """A prefix and a text, joined; a start token that is written out in the text stays in front."""
    start = written_start(tokenizer, text)
    return start + after_sentence(prefix, text.removeprefix(start))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]], list[bool]]:
    """Ids, character offsets, and whether the tokenizer added the token itself, for every token."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"the tokenizer {type(tokenizer).__name__} does not tell which characters its tokens stand for, "
            "so the subject's tokens cannot be found: use a fast one (transformers.PreTrainedTokenizerFast)"
        )
    require_characters("prompt", text)
    encoding = encode(tokenizer, text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = list(encoding["input_ids"])
    offsets = []
    reached = 0
    for token_id, (begin, end) in zip(ids, encoding["offset_mapping"], strict=True):
        if reached < begin == end and _spells(tokenizer, token_id):
            # Offsets trimmed by a space that the text never had: "ĠA" of "A" comes as (1, 1). This happens
            # where a byte-level pre-tokenizer adds a prefix space and the post-processor does not know.
            begin = reached
        offsets.append((begin, end))
        reached = end
    return ids, offsets, [bool(flag) for flag in encoding["special_tokens_mask"]]


def _spells(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether the token shows something; bare spaces and `▁` do not, parts of characters do (as U+FFFD)."""
    return bool(str(tokenizer.decode([token_id])).replace("▁", " ").strip())


def _is_inserted_space(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], offsets: Sequence[tuple[int, int]], index: int
) -> bool:
    """Whether this is a bare space whose offsets claim characters that the next token spells as well."""
    if index + 1 == len(ids):
        return False
    begin, end = offsets[index]
    next_begin, next_end = offsets[index + 1]
    claimed_twice = next_begin <= begin < end <= next_end
    return claimed_twice and not _spells(tokenizer, ids[index])


def _readable(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    added: Sequence[bool],
    inserted: Sequence[bool],
) -> tuple[str, ...]:
    """One string to show per token; see `Span.tokens`."""
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]
    strings = [text[begin:end] for begin, end in offsets]
    groups: list[list[int]] = []  # neighbours whose characters overlap
    for index, (begin, end) in enumerate(offsets):
        if added[index]:
            strings[index] = names[index]
        elif inserted[index]:
            strings[index] = " "
        elif begin == end:  # white space whose offsets were trimmed away
            strings[index] = str(tokenizer.decode([ids[index]])) or names[index]
        elif groups and begin < offsets[groups[-1][-1]][1]:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        if len(group) > 1:
            for part, index in enumerate(group, start=1):
                strings[index] += f"[{part}/{len(group)}]"
    return tuple(strings)
