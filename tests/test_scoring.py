"""Scores against a plain loop, and where a target starts in the tokens of its text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.base import budgets
from errata.base.errors import FactError
from errata.base.text import joined
from errata.models import scoring
from errata.models.model import Model
from errata.models.scoring import Score, score, target_ids
from helpers.budget import examples
from helpers.models import TOKENIZERS, shared_model
from tiny import FAMILIES, byte_tokenizer, llama_tokenizer

PROMPTS = ["The Space Needle is located in the city of", "Rome", "Where is the Louvre? It is in", "He"]
TARGETS = ["Seattle", "is the capital of Italy", "Paris", "東京"]


def by_hand(model: Model, prompt: str, target: str) -> Score:
    """One token after the other: softmax of the last logits of each beginning of the text."""
    ids, n_prompt = target_ids(model.tokenizer, prompt, target)
    total, hits = 0.0, 0
    for position in range(n_prompt, len(ids)):
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids[:position]])).logits[0, -1]
        probabilities = logits.double().softmax(-1)
        total += float(probabilities[ids[position]].log())
        hits += int(probabilities.argmax()) == ids[position]
    return Score(total, len(ids) - n_prompt, hits)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_scores_are_those_of_a_plain_loop(family, tokenizer):
    model = shared_model(family, tokenizer=TOKENIZERS[tokenizer])
    for got, prompt, target in zip(score(model, PROMPTS, TARGETS), PROMPTS, TARGETS, strict=True):
        wanted = by_hand(model, prompt, target)
        assert got.total == pytest.approx(wanted.total, rel=1e-5)
        assert (got.n_tokens, got.hits) == (wanted.n_tokens, wanted.hits)
        assert got.greedy == (wanted.hits == wanted.n_tokens)
        assert got.mean == got.total / got.n_tokens


def test_scores_are_exact_in_float64():
    model = shared_model("gpt2", torch.float64)
    for got, prompt, target in zip(score(model, PROMPTS, TARGETS), PROMPTS, TARGETS, strict=True):
        assert got.total == pytest.approx(by_hand(model, prompt, target).total, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_like_its_texts_one_by_one(family):
    model = shared_model(family)
    together = score(model, PROMPTS, TARGETS)
    alone = [score(model, [p], [t])[0] for p, t in zip(PROMPTS, TARGETS, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-5)


def test_the_size_of_batches_changes_nothing(monkeypatch):
    model = shared_model("gpt2")
    prompts, targets = PROMPTS * 5, TARGETS * 5
    wanted = score(model, prompts, targets)
    shapes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda b, **k: shapes.append(tuple(b.input_ids.shape)) or forward(b, **k))
    monkeypatch.setattr(budgets, "LOGITS", 60 * model.vocab_size)
    got = score(model, prompts, targets)
    assert all(rows * width <= 60 for rows, width in shapes)
    assert len(shapes) > 3
    for one, other in zip(got, wanted, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-5)
        assert dataclasses.replace(one, total=0) == dataclasses.replace(other, total=0)


def test_greedy_says_whether_the_model_would_have_said_so():
    model = shared_model("gpt2")
    prompt = "The Space Needle is in"
    batch = model.encode([prompt])
    best = int(model.forward(batch)[0, -1].argmax())
    ids = [*model.tokenizer(prompt)["input_ids"], best]
    logits = model.forward(model.batch([ids]))[0].detach()
    for last, expected in ((best, True), ((best + 1) % model.vocab_size, False)):
        wanted = torch.tensor([last])
        assert scoring.score_tokens(logits[len(ids) - 2 : len(ids) - 1], wanted).greedy is expected


def test_no_text_no_score():
    assert score(shared_model("gpt2"), [], []) == []


# ---- where the target starts --------------------------------------------------------------------------


def test_the_space_before_a_target_belongs_to_it():
    tokenizer = byte_tokenizer()
    ids, n_prompt = target_ids(tokenizer, "The Space Needle is in", "Paris")
    assert ids == tokenizer("The Space Needle is in Paris")["input_ids"]
    assert tokenizer.decode(ids[:n_prompt]) == "The Space Needle is in"
    assert tokenizer.decode(ids[n_prompt:]) == " Paris"


@pytest.mark.parametrize("prompt", ["in", "in "])
@pytest.mark.parametrize("target", ["Paris", " Paris"])
def test_a_space_that_is_there_is_not_doubled(prompt, target):
    tokenizer = byte_tokenizer()
    ids, _ = target_ids(tokenizer, prompt, target)
    doubled = prompt.endswith(" ") and target.startswith(" ")
    assert tokenizer.decode(ids) == ("in  Paris" if doubled else "in Paris")


def test_a_token_over_both_belongs_to_the_target():
    # with the space at its end, the prompt's last character stands in the target's first token
    tokenizer = byte_tokenizer()
    ids, n_prompt = target_ids(tokenizer, "The Eiffel Tower is in ", "Paris")
    assert tokenizer.decode(ids[n_prompt:]) == " Paris"


def test_a_start_token_belongs_to_the_prompt():
    tokenizer = llama_tokenizer()
    ids, n_prompt = target_ids(tokenizer, "", "Paris")
    assert (ids[0], n_prompt) == (tokenizer.bos_token_id, 1)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<" not in text
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=examples(150), deadline=None)
@given(prompt=TEXTS, target=TEXTS)
def test_prompt_and_target_share_out_all_tokens(tokenizer, prompt, target):
    tokenizer = TOKENIZERS[tokenizer]()
    prompt, target = "x" + prompt.strip(), target.strip()
    ids, n_prompt = target_ids(tokenizer, prompt, target)
    assert ids == tokenizer(joined(prompt, target))["input_ids"]
    assert tokenizer.decode(ids[n_prompt:], skip_special_tokens=True).strip() == target
    assert tokenizer.decode(ids[:n_prompt], skip_special_tokens=True) == prompt


@pytest.mark.parametrize(
    ("prompts", "targets", "message"),
    [
        (["Rome"], ["  "], "target is empty"),
        ([""], ["Rome"], "no token stands before the target"),
        (["Rome", "Paris"], ["x"], "2 prompts and 1 targets"),
        ("Rome", ["x"], "in brackets"),
        (["Rome " * 100], ["x"], "reads at most 96"),
    ],
)
def test_what_cannot_be_scored_is_refused(prompts, targets, message):
    with pytest.raises(FactError, match=message):
        score(shared_model("gpt2"), prompts, targets)
