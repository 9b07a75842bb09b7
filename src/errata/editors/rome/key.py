"""Computed once for each edit: the key k*, the value there, and recorded runs for the search of the new value.

Equation 3 of the paper: k* = 1/N Σ_j k(x_j + s), the key at the last token of the subject s behind a prefix x_j,
averaged over N prefixes; a key is what the edited MLP's down-projection reads. This is key_context="subject". The
published code has 1/N Σ_j k(x_j + p), with p the prompt up to the fact's token, which differs if the prompt has words
before the subject. This is key_context="prompt", the default.

Each text is recorded once. The recording keeps keys and values, and whatever is needed to run the text from the fact's
token on: below the edited layer and before that token nothing changes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base import budgets
from errata.editors.rome.texts import Text
from errata.models.model import Model
from errata.passes.replay import record
from errata.passes.suffixes import Slice, Suffixes, collate, slice_recording


@dataclass(frozen=True)
class Keys:
    """Inputs and outputs of one layer's down-projection at the fact's token of some texts.

    Attributes:
        keys: `[n, d_mlp]`, as the model computed them.
        values: `[n, d_model]`, bias included.
    """

    keys: Tensor
    values: Tensor

    @property
    def mean_key(self) -> Tensor:
        """k̄ `[d_mlp]`, float64 on the CPU."""
        return self.keys.cpu().double().mean(0)

    @property
    def mean_value(self) -> Tensor:
        """W k̄ + b `[d_model]`, float64 on the CPU: an affine map's mean output is its output at the mean."""
        return self.values.cpu().double().mean(0)

    def of(self, rows: Sequence[int]) -> Keys:
        """The keys and values of selected texts."""
        return Keys(self.keys[list(rows)], self.values[list(rows)])


@dataclass(frozen=True)
class Recorded:
    """The recorded run of some texts.

    Attributes:
        texts: all of them.
        keys: theirs, in this order.
        after: of every context and KL prompt, labelled by its index, the fact's token and those after it, to be run
            in the blocks above the edited one.
        loss_layer: the last of these blocks, whose state predictions are read from.
    """

    texts: tuple[Text, ...]
    keys: Keys
    after: Suffixes
    loss_layer: int


@torch.no_grad()
def record_texts(model: Model, layer: int, texts: Sequence[Text], loss_layer: int) -> Recorded:
    """Run texts of any lengths once, those of one length together.

    Raises:
        UnsupportedModel: if the model cannot be run on from the middle of a text.
    """
    keys = torch.empty(len(texts), model.d_mlp, dtype=model.dtype, device=model.device)
    values = torch.empty(len(texts), model.d_model, dtype=model.dtype, device=model.device)
    after: list[Slice] = []
    hosts = _hosts(texts)
    for group in _by_length(sorted(set(hosts), key=lambda i: (len(texts[i].ids), i)), texts, model):
        rows = {host: row for row, host in enumerate(group)}
        batch = model.batch([texts[i].ids for i in group])
        recording = record(model, batch, keep=[("key", layer), ("value", layer)], first=layer + 1, check=False)
        guests = [i for i, host in enumerate(hosts) if host in rows]
        places = [rows[hosts[i]] for i in guests], [texts[i].lookup for i in guests]
        keys[guests] = recording.kept["key", layer][places]
        values[guests] = recording.kept["value", layer][places]
        alike: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        for i in guests:
            if texts[i].kind in ("context", "kl"):
                alike[texts[i].lookup, len(texts[i].ids)][i] = rows[hosts[i]]
        for (token, end), some in sorted(alike.items()):
            after.append(slice_recording(recording, some, (token, end), (layer + 1, loss_layer + 1)))
    return Recorded(tuple(texts), Keys(keys, values), collate(model, after), loss_layer)


def _hosts(texts: Sequence[Text]) -> list[int]:
    """For each text one that begins with it, itself perhaps: running that runs both."""
    longest: dict[tuple[int, ...], int] = {}
    for index in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        ids = texts[index].ids
        longest.update((ids[:count], index) for count in range(1, len(ids) + 1))
    return [longest[text.ids] for text in texts]


def _by_length(chosen: Sequence[int], texts: Sequence[Text], model: Model) -> Iterator[list[int]]:
    """Indexes of texts, those of one length together, about as many tokens at a time as suits the device."""
    for length, members in itertools.groupby(chosen, key=lambda i: len(texts[i].ids)):
        alike = list(members)
        for group in budgets.groups([length] * len(alike), budgets.tokens(model.device, "record")):
            yield [alike[i] for i in group]
