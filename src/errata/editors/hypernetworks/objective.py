"""Loss of a trained editor: whether other prompts give the new object, and how far unrelated predictions move.

    c_edit · −log P_edited(new object | equivalent prompt)  +  c_loc · KL(P ‖ P_edited) of other texts

(Mitchell et al., 2022, section 3.1), in nats, means over tokens, then over edits. The edited model is run by what its
changes add to the maps' outputs, an edit a row (`passes.rowwise`); below the lowest edited block nothing is run twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.hypernetworks.factors import Factors, edited_maps, gradient_factors, padded
from errata.editors.hypernetworks.network import Network, Shapes, condition
from errata.editors.hypernetworks.training_examples import TrainingExample
from errata.editors.texts import Predictions, Text, kept, predictions, recorded_together, text_of
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.models.weights import matrix
from errata.passes.rowwise import RowChanges, rowwise
from errata.passes.suffixes import SuffixBatch, Suffixes

Padded = Mapping[str, tuple[Tensor, Tensor]]  # by map, write [edits, d_out, k], read [edits, k, d_in]


@dataclass(frozen=True)
class EncodedExample:
    """A training example as tokens, with one of its equivalent prompts and one of its other texts.

    Attributes:
        edit: the rewrite's own text.
        words: token ids of the edit in words.
        equivalent: a prompt with the new object.
        other: a text that should not move, if there is one.
    """

    edit: Text
    words: tuple[int, ...]
    equivalent: Text
    other: Text | None

    @classmethod
    def of(cls, model: Model, example: TrainingExample, equivalent: int = 0, other: int = 0) -> EncodedExample:
        """The examples at these positions, counted from 0 and cyclically.

        Raises:
            FactError: if a text is too long for the model, or nothing is left of a target.
        """
        new, between = example.rewrite.new_object, example.rewrite.separator
        unrelated = example.others[other % len(example.others)] if example.others else None
        return cls(
            text_of(model, example.rewrite.text, new, between),
            words_of(model, condition(example.rewrite)),
            text_of(model, example.equivalents[equivalent % len(example.equivalents)], new, between),
            text_of(model, *unrelated, between) if unrelated else None,
        )


def words_of(model: Model, text: str) -> tuple[int, ...]:
    """Token ids of a text for the network."""
    return tuple(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Losses:
    """Losses of edits, one number for each edit.

    Attributes:
        edit: −log P of the new object after the equivalent prompt, nats a token.
        locality: KL of the other text, nats a token; 0 where there is none.
        success: whether the new object's tokens are the most probable ones after the equivalent prompt.
    """

    edit: Tensor
    locality: Tensor
    success: Tensor


@dataclass(frozen=True)
class Place:
    """The maps that a network edits in a model, and the lowest block that contains one."""

    maps: tuple[str, ...]
    first: int

    @classmethod
    def of(cls, model: Model, blocks: int) -> Place:
        """The MLPs of the highest blocks.

        Raises:
            ConfigError: if the model has fewer blocks.
        """
        return cls(edited_maps(model, blocks), model.n_layers - blocks)

    def shapes(self, model: Model) -> Shapes:
        """(d_out, d_in) of each map."""
        weights = {name: matrix(model, f"{name}.weight") for name in self.maps}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


def changes_of(
    model: Model,
    network: Network,
    place: Place,
    texts: Sequence[Text],
    words: Sequence[tuple[int, ...]],
    suffixes: Suffixes | None = None,
) -> dict[str, Factors]:
    """The network's changes for edits, whose texts may already be recorded."""
    factors = gradient_factors(model, texts, place.maps, place.first, suffixes)
    like = next(network.parameters())  # its device and dtype; the model's may be others
    given = {n: Factors(f.entering.to(like), f.leaving.to(like), f.owner.to(like.device)) for n, f in factors.items()}
    embeddings = model.weight(f"{model.path(('embedding', 0))}.weight").detach()
    read = [embeddings[torch.tensor(ids, device=embeddings.device)].to(like) for ids in words]
    changed: dict[str, Factors] = network(given, read)
    return changed


def losses(model: Model, network: Network, place: Place, examples: Sequence[EncodedExample]) -> Losses:
    """Losses of the network's edits, each on its own example, without gradients."""
    with torch.no_grad(), frozen(model):
        trial = _Trial(model, place, examples)
        return trial.losses(padded(trial.changes(network), len(examples)))


def backward(
    model: Model,
    network: Network,
    place: Place,
    examples: Sequence[EncodedExample],
    c_edit: float,
    c_loc: float,
) -> Losses:
    """Accumulate the gradient of the examples' mean objective in the network's weights.

    Texts go through the edited model batch by batch, each backward pass ending at the changes; from there the sum goes
    through the network once.
    """
    with torch.enable_grad():
        trial = _Trial(model, place, examples)
        whole = padded(trial.changes(network), len(examples))
        ends = {name: (w.detach().requires_grad_(), r.detach().requires_grad_()) for name, (w, r) in whole.items()}
        with frozen(model):
            found = trial.losses(ends, c_edit / len(examples), c_loc / len(examples))
        inner = [(value, end.grad) for n in whole for value, end in zip(whole[n], ends[n], strict=True)]
        there = [(value, gradient) for value, gradient in inner if gradient is not None]
        torch.autograd.backward([value for value, _ in there], [gradient for _, gradient in there])
    return found


class _Trial:
    """The texts of some examples, recorded to be run from the lowest edited block on."""

    def __init__(self, model: Model, place: Place, examples: Sequence[EncodedExample]):
        self.model, self.place, self.examples, self.count = model, place, examples, len(examples)
        self.edits = [example.edit for example in examples]
        self.equivalents = [example.equivalent for example in examples]
        self.owners = [i for i, example in enumerate(examples) if example.other is not None]
        self.others = [example.other for example in examples if example.other is not None]
        self.suffixes = recorded_together(model, place.first, [self.edits, self.equivalents, self.others])

    def changes(self, network: Network) -> dict[str, Factors]:
        """Changes that the network makes for the edits."""
        words = [example.words for example in self.examples]
        return changes_of(self.model, network, self.place, self.edits, words, self.suffixes[0])

    def losses(self, changes: Padded, edit: float = 0.0, locality: float = 0.0) -> Losses:
        """Losses of these changes; with factors, gradients of the weighted sums are left on the changes."""
        edited, moved = torch.zeros(self.count), torch.zeros(self.count)
        success = torch.zeros(self.count, dtype=torch.bool)
        for batch in self.suffixes[1].micro_batches(range(self.count)):
            said = self._said(batch, self.equivalents, [*batch.labels], changes)
            each = said.losses()
            if edit:
                (edit * each.sum()).backward()
            hits = (said.logits.argmax(-1) == said.targets).to(each.dtype)
            rows = torch.tensor(batch.labels)
            edited[rows], success[rows] = each.detach().float().cpu(), (said.mean(hits) == 1).cpu()
        for batch in self.suffixes[2].micro_batches(range(len(self.others))):
            own = [self.owners[label] for label in batch.labels]
            with torch.no_grad():
                before = self._said(batch, self.others, own, None).logits.log_softmax(-1)
            after = self._said(batch, self.others, own, changes)
            divergence = (before.exp() * (before - after.logits.log_softmax(-1))).sum(-1)
            each = after.mean(divergence)
            if locality:
                (locality * each.sum()).backward()
            moved[torch.tensor(own)] = each.detach().float().cpu()
        return Losses(edited, moved, success)

    def _said(
        self, batch: SuffixBatch, texts: Sequence[Text], owners: Sequence[int], changes: Padded | None
    ) -> Predictions:
        """Predictions for a batch's texts, each under the change of its owner."""
        some = [texts[label] for label in batch.labels]
        here = {}
        for name, (write, read) in (changes or {}).items():
            device = self.model.weight(f"{name}.weight").device
            here[f"{name}.weight"] = write.to(device), read.to(device)
        with rowwise(self.model, RowChanges(here, torch.tensor(owners))):
            states = batch.resume(self.place.first, batch.states, self.model.n_layers, keep=kept(some))
        return predictions(self.model, some, states)
