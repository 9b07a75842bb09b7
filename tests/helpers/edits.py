"""Edits made up of random numbers."""

from __future__ import annotations

import torch

from errata.base.facts import Fact
from errata.edits import Dense, Edit, RankOne
from errata.models import weights

REWRITE = Fact("The Space Needle", "{} is located in", "Seattle").rewrite("Paris")


def down(model, layer=1):
    return weights.down_weight_name(model, layer)


def random_edit(model, seed=0, layer=1, scale=0.1, dense=False, rewrite=REWRITE):
    name, generator = down(model, layer), torch.Generator().manual_seed(seed)
    d_out, d_in = weights.matrix(model, name).shape
    if dense:
        delta = Dense(name, scale * torch.randn(d_out, d_in, generator=generator))
    else:
        delta = RankOne(name, scale * torch.randn(d_out, generator=generator), torch.randn(d_in, generator=generator))
    return Edit.of(model, [delta], "test", [rewrite], config={"steps": 3, "names": ["a"]}, seed=seed)
