"""Scoring requests: log-probabilities of targets after prompts, for many edited models in one run.

A prompt runs once for all its targets, and the head once for everything that is read from one state.
`models.scoring.score` gives the same results without this sharing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base import budgets
from errata.base.autocast import without_autocast
from errata.edits.edit import Edit
from errata.metrics.edited import run_edited
from errata.models.model import Model
from errata.models.scoring import Score, target_ids
from errata.passes.packing import PackedBatch, PackedSequence


@dataclass(frozen=True)
class Request:
    """A prompt and its possible targets, at least one, joined by `separator` as in `target_ids`."""

    prompt: str
    targets: tuple[str, ...]
    separator: str | None = None

    def rows(self, model: Model) -> list[tuple[list[int], int]]:
        """For each target, the token ids of the whole text, and how many are the prompt's."""
        return [target_ids(model.tokenizer, self.prompt, target, self.separator) for target in self.targets]


@dataclass(frozen=True)
class PassageRequest:
    """A text of two tokens or more, cut to `max_tokens`: its one target is all of it behind its first token."""

    text: str
    max_tokens: int

    def rows(self, model: Model) -> list[tuple[list[int], int]]:
        """Its token ids, and 1."""
        return [(model.ids(self.text)[: self.max_tokens], 1)]


Scores = tuple[Score, ...]  # of a request's targets, in order


@without_autocast
def score_requests(
    model: Model, requests: Sequence[Request | PassageRequest], variants: Sequence[Sequence[Edit | None]]
) -> list[list[Scores]]:
    """Scores of all requests for each variant, in order.

    Args:
        model: the model in its current state; left unchanged.
        requests: prompts with their targets.
        variants: for each variant, the edit applied for each request; None: the model in its current state.

    The numbers of one variant are the same, bit for bit, whatever else is scored.

    Raises:
        FactError: if a target is blank, or a text is too long for the model.
        UnsupportedModel: if the model's blocks cannot be called one by one.
        EditMismatch: if an edit that is put on was made for other weights.
    """
    if not requests:
        return [[] for _ in variants]
    sequences: list[PackedSequence] = []
    places: list[_Target] = []
    counts: list[int] = []
    for number, request in enumerate(requests):
        here, needed = _positions(model, number, request, len(sequences))
        counts.append(len(here))
        places += here
        sequences += needed
    of_sequence: list[list[_Target]] = [[] for _ in sequences]
    for place in places:
        of_sequence[place.sequence].append(place)
    edits = [[of[some[0].request] for some in of_sequence] for of in variants]
    found: list[dict[tuple[int, int], Score]] = [{} for _ in variants]
    with closing(run_edited(model, sequences, edits)) as parts:
        for variant, batch, hidden in parts:
            wanted = [place for row in batch.members for place in of_sequence[row]]
            found[variant].update(_scores(model, batch, hidden, wanted))
    return [
        [tuple(scores[number, target] for target in range(count)) for number, count in enumerate(counts)]
        for scores in found
    ]


@dataclass(frozen=True)
class _Target:
    """Position of a request's target among the sequences.

    Attributes:
        sequence: which of them; continuation: which of its continuations, None for the prefix.
        at: where the continuation begins.
        ids: of the whole text; n_prompt: how many are the prompt's.
    """

    request: int
    target: int
    sequence: int
    continuation: int | None
    at: int
    ids: tuple[int, ...]
    n_prompt: int

    def predictions(self) -> Iterator[tuple[int | None, int, int]]:
        """(continuation or prefix, position there, token that is to be predicted) of each of the target's tokens."""
        for position in range(self.n_prompt - 1, len(self.ids) - 1):
            on_continuation = self.continuation is not None and position >= self.at
            place = (self.continuation, position - self.at) if on_continuation else (None, position)
            yield (*place, self.ids[position + 1])


def _positions(
    model: Model, number: int, request: Request | PassageRequest, next_sequence: int
) -> tuple[list[_Target], list[PackedSequence]]:
    """Positions of a request's targets, and the sequences that they need: one, unless their first tokens differ."""
    rows = request.rows(model)
    places: list[_Target] = []
    prefixes: list[tuple[int, ...]] = []
    continuations: list[list[tuple[int, tuple[int, ...]]]] = []
    for target in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):  # the longest is the prefix
        ids, n_prompt = rows[target]
        read = tuple(ids[:-1])
        sequence = next((i for i, prefix in enumerate(prefixes) if prefix[0] == read[0]), None)
        if sequence is None:
            sequence = len(prefixes)
            prefixes.append(read)
            continuations.append([])
        pairs = zip(read, prefixes[sequence], strict=False)
        at = next((i for i, (own, other) in enumerate(pairs) if own != other), len(read))
        continuation = None
        if at < len(read):
            continuation = len(continuations[sequence])
            continuations[sequence].append((at, read[at:]))
        places.append(_Target(number, target, next_sequence + sequence, continuation, at, tuple(ids), n_prompt))
    wanted = min(n_prompt for _, n_prompt in rows) - 1
    return places, [
        PackedSequence(prefix, tuple(some), wanted) for prefix, some in zip(prefixes, continuations, strict=True)
    ]


@torch.no_grad()
def _scores(
    model: Model, batch: PackedBatch, hidden: Tensor, places: Sequence[_Target]
) -> dict[tuple[int, int], Score]:
    """Scores by request and target, with the head run once for a state that several targets are read off."""
    row_of = {sequence: row for row, sequence in enumerate(batch.members)}
    index: dict[tuple[int, int | None, int], int] = {}
    wanted: list[list[tuple[int, int]]] = []  # of each place: which state, which token
    for place in places:
        row = row_of[place.sequence]
        wanted.append(
            [(index.setdefault((row, piece, at), len(index)), token) for piece, at, token in place.predictions()]
        )
    states = batch.pick(hidden, list(index))
    tokens: list[list[int]] = [[] for _ in index]
    for each in wanted:
        for state, token in each:
            tokens[state].append(token)
    token_scores: list[dict[int, tuple[float, bool]]] = []
    for group in budgets.groups([1] * len(states), budgets.predictions(model.vocab_size)):
        some = slice(group.start, group.stop)
        token_scores += _token_scores(model.unembed(states[some]), tokens[some])
    scores = {}
    for place, each in zip(places, wanted, strict=True):
        found = [token_scores[state][token] for state, token in each]
        total, hits = sum(log for log, _ in found), sum(hit for _, hit in found)
        scores[place.request, place.target] = Score(total, len(each), hits)
    return scores


def _token_scores(logits: Tensor, tokens: Sequence[Sequence[int]]) -> list[dict[int, tuple[float, bool]]]:
    """For each row of logits, some tokens with their log-probability and whether it is the most probable token."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    whole, best = wide.logsumexp(-1).tolist(), wide.argmax(-1).tolist()
    rows = torch.tensor([row for row, some in enumerate(tokens) for _ in some], device=wide.device)
    picked = iter(wide[rows, torch.tensor([t for some in tokens for t in some], device=wide.device)].tolist())
    return [
        {token: (next(picked) - whole[row], token == best[row]) for token in some} for row, some in enumerate(tokens)
    ]
