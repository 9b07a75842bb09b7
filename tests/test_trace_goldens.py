"""Causal tracing against what the published code computed (goldens), to 1e-4 of each table's spread."""

from __future__ import annotations

import numpy as np
import pytest

import goldens
from errata.base.facts import Fact
from errata.tracing.trace import trace

NAMES = ("space_needle_n0.1", "space_needle_s3")
TABLES = [
    ("state", 1, "states"),
    *((p, w, f"{s}_w{w}") for p, s in (("mlp", "mlp"), ("attention", "attn")) for w in (3, 4, 10)),
]


@pytest.fixture(scope="module")
def model():
    return goldens.tiny_np()


def golden_fact(name: str) -> tuple[Fact, dict]:
    info = goldens.info("trace_info")["prompts"][name]
    return Fact(info["subject"], info["prompt"].replace(info["subject"], "{}")), info


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_the_published_ones(model, name):
    fact, info = golden_fact(name)
    want = goldens.arrays(f"trace_{name}")
    for part, width, table in TABLES:
        got = trace(
            model, fact, parts=[part], noise=info["noise_level"], window=width, window_edges="reference", seed=1
        )
        assert got.subject == (info["subject_range"][0], info["subject_range"][1] - 1)
        assert got.answer == info["answer"]
        assert got.clean == pytest.approx(info["high"], rel=1e-5)
        assert got.corrupted == pytest.approx(info["low"], rel=1e-5)
        truth = want[f"scores_{table}_f64"]
        spread = truth.max() - truth.min()
        np.testing.assert_allclose(got.restored[part], truth, rtol=0, atol=1e-4 * spread)


def test_sigma_is_the_published_one(model):
    from errata.tracing.noise import subject_sigma

    info = goldens.info("trace_info")
    sigma = subject_sigma(model, info["embedding_std_subjects"])
    assert sigma == pytest.approx(info["embedding_std_3subjects"], rel=1e-6)
