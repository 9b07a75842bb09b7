"""SmolLM2, whose tokenizer adds no start token: subjects that begin a text, and several requests of one subject."""

import math

import pytest
import torch

import errata
from errata.models.scoring import score

LAYER = 11
PREFIXES = ("In other news. ", "The year was long. ", "He said nothing more. ")
FACTS = [
    ("France", "{}'s capital is", "Berlin"),
    ("London", "{} is the capital of", "Italy"),
    ("Apple", "{} was founded by", "Bill Gates"),
]
OTHERS = (
    "Iran",
    "England",
    "Texas",
    "Florida",
    "Boston",
    "Oxford",
    "Harvard",
    "Israel",
    "Amazon",
    "Java",
    "Tokyo",
    "Rome",
)


@pytest.fixture(scope="module")
def moments(smollm2, wikitext):
    return errata.second_moments(smollm2, [0, LAYER], wikitext[:60])


def settings(**changes):
    return errata.RomeConfig(layer=LAYER, prefixes=PREFIXES, max_drift=None, **changes)


def probability(model, prompt, target):
    return math.exp(score(model, [prompt], [target])[0].total)


def next_tokens(model, prompts):
    with torch.no_grad():
        rows = [model.hf(torch.tensor([model.tokenizer(text)["input_ids"]])).logits[0, -1] for text in prompts]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize(("subject", "prompt", "new"), FACTS)
def test_a_subject_of_one_token_that_begins_the_text(smollm2, moments, subject, prompt, new):
    rewrite = errata.Fact(subject, prompt).rewrite(new)
    edit = errata.rome(smollm2, rewrite, settings(), second_moment=moments)
    others = [prompt.replace("{}", other) for other in OTHERS]
    before = next_tokens(smollm2, others)
    with edit.applied(smollm2):
        assert probability(smollm2, rewrite.text, new) >= 0.85
        assert probability(smollm2, f"In fact, {rewrite.text}", new) >= 0.7
        after = next_tokens(smollm2, others)
    assert float((before.exp() * (before - after)).sum(-1).mean()) <= 0.1


def test_the_published_way_fails_there_and_warns(smollm2, moments):
    rewrite = errata.Fact("France", "{}'s capital is").rewrite("Berlin")
    with pytest.warns(UserWarning, match=r"start_token='<\|endoftext\|>'"):
        edit = errata.rome(smollm2, rewrite, settings(attention_sink="ignore", steps=10), second_moment=moments)
    with edit.applied(smollm2):
        assert probability(smollm2, rewrite.text, "Berlin") < 0.5
