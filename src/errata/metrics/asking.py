"""Many questions to many edited models at once: how probable each finds the targets after a prompt.

The weights are not touched where an edit is of low rank: each row of a batch has its own (`passes.rowwise`). Another
edit is on the model while its rows are run. What lies below the lowest edited layer is run once for all, and a prompt
once for all its targets. `models.scoring.score` is the plain way, and gives the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.scoring import Score, target_ids
from errata.passes.rowwise import Factors, RowChanges, can_be_rowwise, row_changes
from errata.passes.strands import Flow, Passes, Strand, StrandBatch

# Predictions that are made at once take at most so many numbers (at float32, a quarter of a GiB).
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Question:
    """A prompt, and the targets that may follow it, at least one."""

    prompt: str
    targets: tuple[str, ...]


Answers = tuple[Score, ...]  # of a question's targets, in order


def ask_together(
    model: Model, questions: Sequence[Question], variants: Sequence[Sequence[Edit | None]]
) -> list[list[Answers]]:
    """For each variant the answers to all questions, in order.

    Args:
        model: as it stands; left as it was.
        questions: prompts with their targets.
        variants: for each, the edit that is on the model for each question; None: the model as it stands.

    The numbers of one variant are the same, bit for bit, whichever others are asked for.

    Raises:
        FactError: if a target is blank, or a text is too long for the model.
        UnsupportedModel: if the model's blocks cannot be resumed.
        EditMismatch: if an edit that is put on was made for other weights.
    """
    if not questions:
        return [[] for _ in variants]
    strands: list[Strand] = []
    places: list[_Place] = []
    for number, question in enumerate(questions):
        here, needed = _placed(model, number, question, len(strands))
        places += here
        strands += needed
    of_strand: list[list[_Place]] = [[] for _ in strands]
    for place in places:
        of_strand[place.strand].append(place)
    passes = Passes(model, strands)
    plans = [_Plan.of(model, [edits[some[0].question] for some in of_strand]) for edits in variants]
    found: list[dict[tuple[int, int], Score]] = [{} for _ in plans]
    # All that are run row by row share what lies below them. Edits that are put on the model go by themselves, the
    # rows of each together.
    sweeps = [
        [i for i, plan in enumerate(plans) if not plan.whole],
        *([i] for i, plan in enumerate(plans) if plan.whole),
    ]
    for sweep in sweeps:
        chosen = [plans[i] for i in sweep]
        together = [id(edit) for edit in chosen[0].edits] if chosen and chosen[0].whole else None
        for batch in passes.batches(together) if chosen else ():
            for i, part, flow in _runs(passes, batch, chosen):
                wanted = [place for row in part.rows for place in of_strand[row]]
                found[sweep[i]].update(_scores(model, part, flow, wanted))
    return [
        [
            tuple(said[number, target] for target in range(len(question.targets)))
            for number, question in enumerate(questions)
        ]
        for said in found
    ]


@dataclass(frozen=True)
class _Place:
    """Where a target of a question stands among the strands.

    Attributes:
        strand: which of them; branch: which of its branches, None for the trunk.
        at: where the branch begins.
        ids: of the whole text; n_prompt: how many are the prompt's.
    """

    question: int
    target: int
    strand: int
    branch: int | None
    at: int
    ids: tuple[int, ...]
    n_prompt: int

    def predictions(self) -> Iterator[tuple[int | None, int, int]]:
        """(branch or trunk, position there, token that is to be predicted) of each of the target's tokens."""
        for position in range(self.n_prompt - 1, len(self.ids) - 1):
            on_branch = self.branch is not None and position >= self.at
            place = (self.branch, position - self.at) if on_branch else (None, position)
            yield (*place, self.ids[position + 1])


def _placed(model: Model, number: int, question: Question, next_strand: int) -> tuple[list[_Place], list[Strand]]:
    """Where a question's targets stand, and the strands that they need: one, unless their first tokens differ."""
    if not question.targets:
        raise ValueError(f"the question {question.prompt!r} has no target")
    rows = [target_ids(model.tokenizer, question.prompt, target) for target in question.targets]
    places: list[_Place] = []
    trunks: list[tuple[int, ...]] = []
    branches: list[list[tuple[int, tuple[int, ...]]]] = []
    for target in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):  # the longest is the trunk
        ids, n_prompt = rows[target]
        read = tuple(ids[:-1])
        strand = next((i for i, trunk in enumerate(trunks) if trunk[0] == read[0]), None)
        if strand is None:
            strand = len(trunks)
            trunks.append(read)
            branches.append([])
        pairs = zip(read, trunks[strand], strict=False)
        at = next((i for i, (own, other) in enumerate(pairs) if own != other), len(read))
        branch = None
        if at < len(read):
            branch = len(branches[strand])
            branches[strand].append((at, read[at:]))
        places.append(_Place(number, target, next_strand + strand, branch, at, tuple(ids), n_prompt))
    return places, [Strand(trunk, tuple(some)) for trunk, some in zip(trunks, branches, strict=True)]


@dataclass(frozen=True)
class _Plan:
    """How the rows of a variant are run.

    Attributes:
        edits: for each strand, the edit that is on.
        first: the lowest block that differs from the unedited model's; the number of blocks if none does, -1 if what
            enters the first block does.
        changes: the edits as changes of rows; None if they must be put on the model.
    """

    edits: tuple[Edit | None, ...]
    first: int
    changes: RowChanges | None

    @property
    def whole(self) -> bool:
        """Whether edits are put on the model."""
        return self.changes is None

    @classmethod
    def of(cls, model: Model, edits: Sequence[Edit | None]) -> _Plan:
        distinct = {id(edit): edit for edit in edits if edit is not None}
        deltas = [delta for edit in distinct.values() for delta in edit.deltas]
        names = {delta.weight for delta in deltas}
        first = min((_layer_of(model, name) for name in names), default=model.n_layers)
        rowwise = all(hasattr(delta, "factors") for delta in deltas)
        if not rowwise or first < 0 or not all(can_be_rowwise(model, name) for name in names):
            return cls(tuple(edits), first, None)
        factors = {key: _factors(edit) for key, edit in distinct.items()}
        nothing: Mapping[str, Factors] = {}
        changes = row_changes(model, [nothing if edit is None else factors[id(edit)] for edit in edits])
        return cls(tuple(edits), first, changes)


def _layer_of(model: Model, name: str) -> int:
    """The block that a weight belongs to; -1 if none, for then it may act on what enters the first."""
    head = f"{model.anatomy.blocks}."
    return int(name.removeprefix(head).split(".")[0]) if name.startswith(head) else -1


def _factors(edit: Edit) -> dict[str, Factors]:
    """Write and read by weight; of several changes of one weight, side by side."""
    found: dict[str, Factors] = {}
    for delta in edit.deltas:
        write, read = delta.factors()  # type: ignore[union-attr]  # no dense one comes here
        if delta.weight in found:
            write, read = (
                torch.cat([found[delta.weight][0], write], 1),
                torch.cat([found[delta.weight][1], read]),
            )
        found[delta.weight] = write, read
    return found


def _runs(passes: Passes, batch: StrandBatch, plans: Sequence[_Plan]) -> Iterator[tuple[int, StrandBatch, Flow]]:
    """(which plan, rows, states behind the last block): of all rows, or of those of one edit after the other, which is
    on the model until the next is asked for."""
    model = passes.model
    firsts = {max(plan.first, 0) for plan in plans}
    entering: dict[int, Flow] = {}
    flow = passes.enter(batch)
    for layer in range(max(firsts) + 1):
        if layer in firsts:
            entering[layer] = flow
        if layer < max(firsts):
            flow = passes.step(batch, layer, flow)

    def above(part: StrandBatch, flow: Flow, first: int, changes: RowChanges | None = None) -> Flow:
        for layer in range(first, model.n_layers):
            flow = passes.step(part, layer, flow, changes)
        return flow

    for number, plan in enumerate(plans):
        first = max(plan.first, 0)
        if plan.changes is not None:
            changes = plan.changes.of(torch.tensor(batch.rows))
            yield number, batch, above(batch, entering[first], first, changes)
            continue
        for rows in _alike([plan.edits[i] for i in batch.rows]):
            edit = plan.edits[batch.rows[rows[0]]]
            with contextlib.nullcontext() if edit is None else edit.applied(model):
                flow, part = entering[first].of(batch, rows)
                if plan.first < 0:
                    flow = passes.enter(part)
                yield number, part, above(part, flow, first)


def _alike(edits: Sequence[Edit | None]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(i)
    return list(groups.values())


@torch.no_grad()
def _scores(model: Model, batch: StrandBatch, flow: Flow, places: Sequence[_Place]) -> dict[tuple[int, int], Score]:
    """Scores by question and target, with the head run once for a state that several targets are read off."""
    row_of = {strand: row for row, strand in enumerate(batch.rows)}
    index: dict[tuple[int, int | None, int], int] = {}
    wanted: list[list[tuple[int, int]]] = []  # of each place: which state, which token
    for place in places:
        row = row_of[place.strand]
        wanted.append(
            [(index.setdefault((row, branch, at), len(index)), token) for branch, at, token in place.predictions()]
        )
    states = torch.stack([batch.states(flow, row, branch)[at] for row, branch, at in index])
    tokens: list[list[int]] = [[] for _ in index]
    for each in wanted:
        for state, token in each:
            tokens[state].append(token)
    said: list[dict[int, tuple[float, bool]]] = []
    share = max(1, _LOGITS_AT_ONCE // model.vocab_size)
    for begin in range(0, len(states), share):
        said += _said(model.unembed(states[begin : begin + share]), tokens[begin : begin + share])
    scores = {}
    for place, each in zip(places, wanted, strict=True):
        found = [said[state][token] for state, token in each]
        total, hits = sum(log for log, _ in found), sum(hit for _, hit in found)
        scores[place.question, place.target] = Score(total, len(each), hits)
    return scores


def _said(logits: Tensor, tokens: Sequence[Sequence[int]]) -> list[dict[int, tuple[float, bool]]]:
    """Of each row of logits, for some tokens, the log-probability, and whether it is the most probable."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    whole, best = wide.logsumexp(-1).tolist(), wide.argmax(-1).tolist()
    rows = torch.tensor([row for row, some in enumerate(tokens) for _ in some], device=wide.device)
    picked = iter(wide[rows, torch.tensor([t for some in tokens for t in some], device=wide.device)].tolist())
    return [
        {token: (next(picked) - whole[row], token == best[row]) for token in some} for row, some in enumerate(tokens)
    ]
