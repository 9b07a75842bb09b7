"""Prompts and targets as tokens, and the part of a model that runs them again and again.

Editors that optimise a change of high blocks run the same texts many times. Everything below those blocks is recorded
once; from there on, texts of all lengths run in few batches, with predictions only where a target needs one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.base.text import joined
from errata.models.model import Model
from errata.models.scoring import target_ids
from errata.passes.replay import record
from errata.passes.suffixes import Slice, Suffixes, collate, slice_recording


@dataclass(frozen=True)
class Text:
    """A prompt and the part of its target that the model reads.

    Attributes:
        ids: its tokens.
        targets: the target's tokens.
        from_end: for each of them the token after which it is predicted, counted from the text's end: 1 is the last.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    from_end: tuple[int, ...]


def text_of(model: Model, prompt: str, target: str, separator: str | None = None, forced: bool = True) -> Text:
    """The text of a prompt and its target.

    Args:
        model: any decoder.
        prompt, target, separator: as of `target_ids`.
        forced: teacher forcing: each token of the target is predicted after those before it; or else all of them
            after the prompt alone.

    Raises:
        FactError: if it is too long for the model, or nothing is left of the target.
    """
    whole, n_prompt = target_ids(model.tokenizer, prompt, target, separator)
    targets = tuple(whole[n_prompt:])
    count = len(targets)
    ids = tuple(whole[:-1] if forced else whole[:n_prompt])
    model.require_room(ids, joined(prompt, target, separator))
    return Text(ids, targets, tuple(range(count, 0, -1)) if forced else (1,) * count)


def recorded(model: Model, layer: int, texts: Sequence[Text]) -> Suffixes:
    """All tokens of the texts, labelled by their index, to be run from block `layer` on.

    Raises:
        UnsupportedModel: if the model's blocks cannot be resumed.
    """
    return recorded_together(model, layer, [texts])[0]


def recorded_together(model: Model, layer: int, kinds: Sequence[Sequence[Text]]) -> list[Suffixes]:
    """`recorded` for several kinds of texts that run separately: texts of one length share a forward pass."""
    places = [(kind, label) for kind, texts in enumerate(kinds) for label in range(len(texts))]

    def length(place: tuple[int, int]) -> int:
        return len(kinds[place[0]][place[1]].ids)

    slices: list[list[Slice]] = [[] for _ in kinds]
    for count, group in itertools.groupby(sorted(places, key=length), key=length):
        alike = list(group)
        recording = record(model, model.batch([kinds[kind][i].ids for kind, i in alike]), first=layer, check=False)
        for kind, own in enumerate(slices):
            rows = {label: row for row, (its, label) in enumerate(alike) if its == kind}
            if rows:
                own.append(slice_recording(recording, rows, (0, count), (layer, model.n_layers)))
    return [collate(model, own) for own in slices]


@dataclass(frozen=True)
class Predictions:
    """Predictions at the positions where targets are predicted, p in all.

    Attributes:
        logits: `[p, v]`, in float32 at least.
        rows: the row of each, `[p]`.
        targets: the target tokens, `[p]`.
        count: number of rows.
    """

    logits: Tensor
    rows: Tensor
    targets: Tensor
    count: int

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each row's positions, `[count]`, of one number a position, `[p]`."""
        places = torch.bincount(self.rows, minlength=self.count)
        return values.new_zeros(self.count).index_add(0, self.rows, values) / places

    def losses(self) -> Tensor:
        """−log P of the targets in nats, mean over each row's tokens, `[count]`."""
        return self.mean(functional.cross_entropy(self.logits, self.targets, reduction="none"))


def kept(texts: Sequence[Text]) -> int:
    """Number of tokens at the end of the last block's output that the predictions need."""
    return max(max(text.from_end) for text in texts)


def predictions(model: Model, texts: Sequence[Text], states: Tensor) -> Predictions:
    """Predictions for texts, one in each row of the last block's states `[r, n, d_model]`."""
    device = states.device
    rows = torch.tensor([row for row, text in enumerate(texts) for _ in text.targets], device=device)
    from_end = torch.tensor([place for text in texts for place in text.from_end], device=device)
    targets = torch.tensor([target for text in texts for target in text.targets], device=device)
    logits = model.unembed(states[rows, states.shape[1] - from_end])
    return Predictions(logits.to(torch.promote_types(model.dtype, torch.float32)), rows, targets, len(texts))
