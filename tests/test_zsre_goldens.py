"""zsRE's records and numbers against the published code's.

The published records hold a question of something else as one prompt for each token of its answer: the question, and
of the answer what stands before. Ours hold the question and the whole answer, which is read once. The two are the same
tokens wherever an answer's tokens, decoded one by one and tokenized again behind the question, stay what they are. With
GPT-2's tokenizer that holds but where a character is several tokens: the first of them is decoded as U+FFFD, so the
published prompt has other tokens than the text.
"""

from __future__ import annotations

import functools

import pytest
import torch

import goldens
from errata.base.facts import SLOT
from errata.data.records import ZsreRecord
from errata.data.zsre import zsre_record
from errata.metrics.requests import score_requests
from errata.metrics.summary import estimate
from errata.models.model import Model
from errata.models.scoring import score, target_ids
from errata.tasks.task import Scored
from errata.tasks.zsre import ZSRE
from helpers.scores import numbers_of

PUBLISHED = {"rewrite": "rewrite", "paraphrase": "paraphrase", "locality": "neighborhood"}  # kinds of prompts


@functools.cache
def golden() -> dict:
    return goldens.info("zsre")


def records() -> list[ZsreRecord]:
    return [zsre_record(entry, number) for number, entry in enumerate(golden()["raw"])]


def answers_of(model: Model) -> list[Scored]:
    found = []
    for record in records():
        asked = ZSRE.requests(record)
        [said] = score_requests(model, asked, [[None] * len(asked)])
        found.append(ZSRE.scored(record, said))
    return found


def per_token(tokenizer, prompt: str, target: str) -> list[tuple[list[int], int]]:
    """(tokens before, next token) of each token of a target, from texts as the published code joins them."""
    ids = tokenizer(f" {target}")["input_ids"]
    texts = [prompt + tokenizer.decode(ids[:i]) for i in range(len(ids))]
    return [(tokenizer(text)["input_ids"], token) for text, token in zip(texts, ids, strict=True)]


def ours_per_token(tokenizer, prompt: str, target: str) -> list[tuple[list[int], int]]:
    ids, n_prompt = target_ids(tokenizer, prompt, target)
    return [(ids[:i], ids[i]) for i in range(n_prompt, len(ids))]


# ---- records ------------------------------------------------------------------------------------------------


def test_records_are_the_published_ones():
    tokenizer = goldens.gpt2_tokenizer()
    for record, wanted in zip(records(), golden()["records"], strict=True):
        asked = wanted["requested_rewrite"]
        assert record.case_id == wanted["case_id"]
        assert record.rewrite.subject == asked["subject"]
        assert record.rewrite.prompt == asked["prompt"]
        assert SLOT in record.rewrite.prompt
        assert record.rewrite.new_object == asked["target_new"]["str"]
        assert list(record.paraphrase) == wanted["paraphrase_prompts"]
        [(question, answer)] = record.locality
        theirs = [
            (tokenizer(each["prompt"])["input_ids"], *tokenizer(each["target"])["input_ids"])
            for each in wanted["neighborhood_prompts"]
        ]
        assert ours_per_token(tokenizer, question, answer) == theirs
        assert question.endswith("?")


@pytest.mark.parametrize(
    ("answer", "same"),
    [("Soviet Soviet and more", True), ("Énergie d'Été", True), ("the 2nd (1907)", True), ("東京", False)],
)
def test_answers_read_whole_are_the_published_prompts_one_token_longer_each(answer, same):
    tokenizer, prompt = goldens.gpt2_tokenizer(), "nq question: where is it?"
    ours, theirs = (of(tokenizer, prompt, answer) for of in (ours_per_token, per_token))
    assert [token for _, token in ours] == [token for _, token in theirs]
    assert (ours == theirs) is same
    assert len(ours) > 1


# ---- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hits_are_the_published_ones(dtype):
    for said, wanted in zip(answers_of(goldens.tiny_np(dtype)), golden()["results"], strict=True):
        for kind, theirs in PUBLISHED.items():
            hits = wanted[f"{theirs}_prompts_correct"]
            scores = [each for one in said[kind] for each in one]
            assert sum(each.n_tokens for each in scores) == len(hits)
            assert sum(each.hits for each in scores) == sum(hits)


def test_which_token_is_hit_is_the_published_one_s():
    """Token by token, of the texts that are read once here: the most probable one after what stands before it."""
    model = goldens.tiny_np()
    for record, wanted in zip(records(), golden()["results"], strict=True):
        new = record.rewrite.new_object
        pairs = {
            "rewrite": [(record.rewrite.text, new)],
            "paraphrase": [(prompt, new) for prompt in record.paraphrase],
            "neighborhood": list(record.locality),
        }
        for kind, some in pairs.items():
            found = []
            for prompt, target in some:
                ids, n_prompt = target_ids(model.tokenizer, prompt, target)
                with torch.no_grad():
                    best = model.hf(torch.tensor([ids])).logits[0].argmax(-1).tolist()
                found += [best[i - 1] == ids[i] for i in range(n_prompt, len(ids))]
            assert found == wanted[f"{kind}_prompts_correct"]


def test_scores_are_the_means_of_the_published_hits():
    scores = [numbers_of(said, ZSRE) for said in answers_of(goldens.tiny_np())]
    for mine, wanted in zip(scores, golden()["results"], strict=True):
        shares = [
            sum(wanted[f"{kind}_prompts_correct"]) / len(wanted[f"{kind}_prompts_correct"])
            for kind in PUBLISHED.values()
        ]
        assert list(mine.values()) == shares
    assert [mine["efficacy"] for mine in scores] == [0, 1]
    assert [mine["specificity"] for mine in scores] == [0.5, 1]
    assert estimate([mine["specificity"] for mine in scores]).mean == 0.75


def test_what_the_model_says_greedily_is_hit_whole():
    """Targets that were read off the model's own continuations; another question's is not hit."""
    told, model = golden()["greedy_hits"], goldens.tiny_np()
    pairs = [(f"{question}?", answer) for question, answer in told["loc"]] + [tuple(pair) for pair in told["src"]]
    found = score(model, [prompt for prompt, _ in pairs], [target for _, target in pairs])
    assert [each.greedy for each in found] == [True] * len(pairs)
    assert not score(model, [pairs[0][0]], [pairs[1][1]])[0].greedy
