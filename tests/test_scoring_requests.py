"""Scoring requests to many edited models at once, against each edit put on the model and the plain way to score."""

from __future__ import annotations

import math

import pytest
import torch

from errata.base import budgets
from errata.base.errors import FactError
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.metrics.requests import Request, score_requests
from errata.models.loading import load_pretrained
from helpers.models import shared_model
from helpers.scoring_requests import REQUESTS, edit_of, one_by_one, same, variants_of
from tiny import ALL_FAMILIES, llama_tokenizer, tiny


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_edit_gives_what_it_gives_on_the_model_alone(family):
    model = shared_model(family)
    variants = variants_of(model)
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    for got, edits in zip(score_requests(model, REQUESTS, variants), variants, strict=True):
        same(got, one_by_one(model, edits), 2e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())


def test_it_is_exact_in_float64():
    model = shared_model("gpt2", torch.float64)
    variants = variants_of(model)
    for got, edits in zip(score_requests(model, REQUESTS, variants), variants, strict=True):
        same(got, one_by_one(model, edits), 1e-9)


def test_targets_that_change_the_first_tokens_of_a_text():
    hf = tiny("llama")
    model = load_pretrained((hf, llama_tokenizer()), name="llama")
    variants = [[None] * 5, [edit_of(model, "rank_one", 0)] * 5]
    for got, edits in zip(score_requests(model, REQUESTS, variants), variants, strict=True):
        same(got, one_by_one(model, edits), 2e-5)


def test_small_batches_and_large_ones_agree(monkeypatch):
    model = shared_model("gpt2")
    variants = variants_of(model)
    at_once = score_requests(model, REQUESTS, variants)
    monkeypatch.setitem(budgets.TOKENS["forward"], "cpu", 1)
    monkeypatch.setattr(budgets, "LOGITS", 1)
    for got, wanted in zip(score_requests(model, REQUESTS, variants), at_once, strict=True):
        same(got, wanted, 1e-5)


def test_no_variant_depends_on_the_others_by_a_single_bit():
    model = shared_model("gpt_neox")
    variants = variants_of(model)
    assert score_requests(model, REQUESTS, variants) == [score_requests(model, REQUESTS, [one])[0] for one in variants]


@pytest.mark.parametrize("kind", ["rank_one", "dense"])
def test_an_edit_that_breaks_the_model_leaves_texts_beside_its_own_alone(kind):
    model = shared_model("gpt2")
    broken = edit_of(model, kind, 0)
    factor = broken.deltas[0].write if kind == "rank_one" else broken.deltas[0].change
    factor.fill_(3e38)
    fine = edit_of(model, "rank_one", 1)
    edits = [broken, fine, None, broken, fine]
    found, alone = score_requests(model, REQUESTS, [edits])[0], one_by_one(model, edits)
    for i in (1, 2, 4):
        same(found[i : i + 1], alone[i : i + 1], 2e-5)
    assert all(math.isnan(score.total) for i in (0, 3) for score in found[i])


def test_an_edit_outside_the_blocks_is_put_on():
    model = shared_model("llama")
    head = Edit.of(
        model, [RankOne("lm_head.weight", torch.ones(model.vocab_size), torch.ones(model.d_model))], "made up"
    )
    edits = [head, None, head, edit_of(model, "rank_one", 0), head]
    same(score_requests(model, REQUESTS, [edits])[0], one_by_one(model, edits), 2e-5)


def test_no_questions_have_no_answers():
    model = shared_model("gpt2")
    assert score_requests(model, [], [[], []]) == [[], []]


def test_a_blank_target_is_told():
    with pytest.raises(FactError, match="empty"):
        score_requests(shared_model("gpt2"), [Request("He", ("a", " "))], [[None]])
