"""What a fact is trained on, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from errata.base.facts import Rewrite
from errata.models.model import Model
from errata.models.scoring import target_ids


@dataclass(frozen=True)
class Text:
    """The prompt, with as much of the target as is read.

    Attributes:
        ids: its tokens.
        targets: the target's tokens.
        from_end: for each of them the token after which it is predicted, counted from the text's end: 1 is the last.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    from_end: tuple[int, ...]


def text_of(model: Model, rewrite: Rewrite, loss: Literal["teacher_forcing", "reference"]) -> Text:
    """The text of a rewrite.

    Raises:
        FactError: if it is too long for the model, or nothing is left of the target.
    """
    whole, n_prompt = target_ids(model.tokenizer, rewrite.text, rewrite.new_object)
    targets = tuple(whole[n_prompt:])
    count = len(targets)
    forced = loss == "teacher_forcing"
    ids = tuple(whole[:-1] if forced else whole[:n_prompt])
    model.require_room(ids, f"{rewrite.text} {rewrite.new_object}")
    return Text(ids, targets, tuple(range(count, 0, -1)) if forced else (1,) * count)
