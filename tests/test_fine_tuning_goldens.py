"""The reference way of training against what the published code computed, step by step."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import errata
import goldens
from errata.base.facts import Fact
from errata.models.scoring import score

CASES = ("unconstr_layer1", "constr_layer0", "constr_layer0_multitok")
# In float32 Adam makes of a gradient that is next to nothing a step of full length in a direction that rounding decides
# (one entry of 65,536 here): changes are judged as a whole there, entry by entry in float64.
TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-9}
DISTANCE = {
    torch.float32: lambda ours, theirs: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs),
    torch.float64: lambda ours, theirs: goldens.difference(ours, theirs)[1],
}


@functools.cache
def recomputed(case: str, dtype: torch.dtype, **changes):
    model, told = goldens.tiny_np(dtype), goldens.info("ft_info")[case]
    request, settings = told["request"], told["hparams"]
    rewrite = Fact(request["subject"], request["prompt"]).rewrite(request["target_new"]["str"])
    own = {
        "layer": settings["layers"][0],
        "learning_rate": settings["lr"],
        "steps": settings["num_steps"],
        "epsilon": settings["norm_constraint"] or None,
        "weight_decay": settings["weight_decay"],
    }
    method = errata.ft_l if own["epsilon"] else errata.ft
    return method(model, rewrite, preset="reference", **{**own, "max_drift": None, **changes})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_quantity_of_the_published_code(case, dtype):
    edit, golden = recomputed(case, dtype), goldens.arrays(f"ft_{case}")
    suffix = "_f64" if dtype == torch.float64 else ""
    assert edit.weights == tuple(goldens.info("ft_info")[case]["params"])
    np.testing.assert_allclose(edit.notes["losses"], golden[f"losses{suffix}"], rtol=1e-5 if not suffix else 1e-9)
    compared = {}
    for delta in edit.deltas:
        theirs = golden[f"delta:{delta.weight}{suffix}"]
        theirs = theirs[:, None] if theirs.ndim == 1 else theirs.T  # a bias is a column; Conv1D stores [d_in, d_out]
        compared[delta.weight] = DISTANCE[dtype](delta.matrix().numpy().astype(float), theirs)
    assert {name: value for name, value in compared.items() if value > TOLERANCE[dtype]} == {}


def test_a_bias_is_trained_where_the_published_code_does_alone():
    with_bias = recomputed("unconstr_layer1", torch.float64)
    without = recomputed("unconstr_layer1", torch.float64, bias=False)
    assert (len(with_bias.deltas), len(without.deltas)) == (2, 1)
    assert with_bias.notes["losses"][0] == without.notes["losses"][0]
    assert with_bias.notes["losses"][1] < without.notes["losses"][1]  # it takes part in what is said


def test_with_the_bias_on_the_model_says_what_the_published_codes_did():
    edit = recomputed("unconstr_layer1", torch.float64, steps=24)
    model, (rewrite,) = goldens.tiny_np(torch.float64), edit.rewrites
    with edit.applied(model):
        said = score(model, [rewrite.text], [rewrite.new_object])[0].total
    assert -said == pytest.approx(goldens.arrays("ft_unconstr_layer1")["losses_f64"][24], rel=1e-9)
