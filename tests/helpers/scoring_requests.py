"""Scoring requests to edited models, one by one."""

from __future__ import annotations

import pytest
import torch

from errata.edits.delta import Dense, LowRank, RankOne
from errata.edits.edit import Edit
from errata.metrics.requests import Request
from errata.models.model import Model
from errata.models.scoring import score
from errata.models.weights import down_weight_name

REQUESTS = [
    Request("The Space Needle is located in the city of", ("Seattle", "Paris")),
    Request("Rome", ("is the capital of Italy",)),
    Request("Where is the Louvre? It is in", ("Paris", "P", "Pa")),
    Request("He", ("東京", "went")),
    Request("The Space Needle is located in the city of", ("S", "Rome")),
]


def edit_of(model: Model, kind: str, seed: int, layer: int = 1) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    name = down_weight_name(model, layer)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.promote_types(model.dtype, torch.float32))

    d_out, d_in = model.d_model, model.d_mlp
    delta = {
        "rank_one": lambda: [RankOne(name, drawn(d_out), drawn(d_in) / 4)],
        "low_rank": lambda: [
            LowRank(name, drawn(d_out, 3), drawn(3, d_in) / 8),
            RankOne(name, drawn(d_out), drawn(d_in) / 8),
            RankOne(down_weight_name(model, layer + 1), drawn(d_out), drawn(d_in) / 8),
        ],
        "dense": lambda: [Dense(name, drawn(d_out, d_in) / 8)],
    }[kind]()
    return Edit.of(model, delta, "made up")


def one_by_one(model: Model, edits: list[Edit | None]) -> list[tuple]:
    found = []
    for request, edit in zip(REQUESTS, edits, strict=True):
        prompts = [request.prompt] * len(request.targets)
        if edit is None:
            found.append(tuple(score(model, prompts, request.targets)))
            continue
        with edit.applied(model):
            found.append(tuple(score(model, prompts, request.targets)))
    return found


def same(got: list[tuple], wanted: list[tuple], rel: float) -> None:
    for some, others in zip(got, wanted, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.total == pytest.approx(other.total, rel=rel)
            assert (one.n_tokens, one.hits) == (other.n_tokens, other.hits)


def variants_of(model: Model) -> list[list[Edit | None]]:
    first, second = edit_of(model, "rank_one", 0), edit_of(model, "low_rank", 1)
    dense, other = edit_of(model, "dense", 2), edit_of(model, "dense", 3, layer=0)
    return [
        [None] * 5,
        [first, second, first, None, second],
        [dense, dense, None, other, dense],
        [dense, first, second, None, other],
    ]
