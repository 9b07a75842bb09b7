"""Subjects that are the first token of a text, in a model that keeps an attention sink there."""

import math

import pytest
import torch

import errata
from errata.editors.rome.first_token import FirstTokens
from errata.models.scoring import score
from errata.passes.sinks import AttentionSink, advised_start_token, first_token_cosines
from sink import with_sink

LAYER = 5
WORDS = ("Toyota", "William", "Nokia", "Ferrari", "Microsoft", "David", "Paul", "Nissan", "Fiat", "Michael")
PROMPTS = ("{} works in the city of", "{} is known for playing the", "{} has as country of birth")
OBJECTS = ("Paris", "violin", "Japan")


def requests():
    return [errata.Fact(word, PROMPTS[i % 3]).rewrite(OBJECTS[i % 3]) for i, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def edits():
    model = with_sink()
    config = errata.RomeConfig(layer=LAYER, prefixes=PREFIXES, steps=40, max_drift=None)
    return errata.rome(model, requests(), config, second_moment=moment(model))


PREFIXES = ("Yesterday. ", "In other news, ", "The year was long. ", "He said that ")


def moment(model):
    return errata.second_moments(model, [LAYER], TEXTS)[LAYER].with_ridge(1e-3)


TEXTS = [f"{a} was born in the city of {b}. {b} is the home of {a}." for a in WORDS for b in ("Paris", "Rome", "Lyon")]


def next_tokens(model, prompts):
    """Log-probabilities by plain calls of the Hugging Face model."""
    with torch.no_grad():
        rows = [model.hf(torch.tensor([model.tokenizer(text)["input_ids"]])).logits[0, -1] for text in prompts]
    return torch.stack(rows).log_softmax(-1)


def probability(model, prompt, target):
    return math.exp(score(model, [prompt], [target])[0].total)


def test_a_sink_is_measured():
    assert first_token_cosines(with_sink(), LAYER).sink
    assert not first_token_cosines(with_sink(), 0).sink
    assert not any(first_token_cosines(errata.load_model("atlas"), layer).sink for layer in range(8))


def test_the_read_vector_hears_its_own_token_and_hardly_another():
    model = with_sink()
    keys = []
    hook = model.module(("key", 0)).register_forward_pre_hook(lambda module, inputs: keys.append(inputs[0][:, 0]))
    with torch.no_grad():
        model.hf(torch.arange(len(model.tokenizer))[:, None])
    hook.remove()
    keys = keys[0].double()
    (token,) = model.tokenizer("Toyota")["input_ids"]
    found = FirstTokens(model).read_vector(token)
    heard = keys @ found.vector
    assert float(heard[token]) == pytest.approx(1, abs=1e-4)
    others = torch.cat([heard[:token], heard[token + 1 :]]).abs()
    assert float(others.max()) == pytest.approx(found.leak, abs=1e-4)
    plain = torch.linalg.solve(keys.T @ keys + 1e-6 * torch.eye(keys.shape[1]), keys[token])
    plain = (keys @ plain / (plain @ keys[token])).abs()
    plain[token] = 0
    assert found.leak < 0.8 * float(plain.max())


def test_an_edit_holds_where_the_subject_begins_the_text_and_where_it_does_not(edits):
    model = with_sink()
    bare, later, first_part = [], [], []
    for edit, rewrite in zip(edits, requests(), strict=True):
        assert [part["layer"] for part in edit.notes["parts"]] == [LAYER, 0]
        before = {name: value.clone() for name, value in model.hf.state_dict().items()}
        with edit.applied(model):
            bare.append(probability(model, rewrite.text, rewrite.new_object))
            later.append(probability(model, f"In the end, {rewrite.text}", rewrite.new_object))
        with edit.restricted([LAYER], model).applied(model):
            first_part.append(probability(model, f"In the end, {rewrite.text}", rewrite.new_object))
        assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    assert sum(p >= 0.9 for p in bare) >= 0.8 * len(bare), bare
    # In the middle of a text the part for its beginning takes little away.
    assert sum(later) >= sum(first_part) - 0.1 * len(later), (later, first_part)


def test_other_first_tokens_say_what_they_said(edits):
    model = with_sink()
    vocabulary = [model.tokenizer.decode([token]) for token in range(len(model.tokenizer))]
    names = [word for word in vocabulary if word.isalpha() and len(word) > 3 and word[0].isupper()]
    moved = []
    for edit, rewrite in zip(edits, requests(), strict=True):
        prompts = [rewrite.prompt.replace("{}", name) for name in names if name != rewrite.subject][:50]
        before = next_tokens(model, prompts)
        with edit.applied(model):
            after = next_tokens(model, prompts)
        moved.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert sum(moved) / len(moved) <= 0.2, moved
    assert min(moved) <= 0.01, moved


def test_ignoring_the_sink_fails_and_says_so():
    model = with_sink()
    rewrite = requests()[0]
    config = errata.RomeConfig(layer=LAYER, prefixes=PREFIXES, steps=40, max_drift=None, attention_sink="ignore")
    with pytest.warns(AttentionSink, match="--start-token"):
        edit = errata.rome(model, rewrite, config, second_moment=moment(model))
    assert "parts" not in edit.notes
    with edit.applied(model):
        assert probability(model, rewrite.text, rewrite.new_object) < 0.5


def test_a_trace_of_such_a_subject_says_so():
    with pytest.warns(AttentionSink, match="Toyota"):
        errata.trace(with_sink(), errata.Fact("Toyota", PROMPTS[0]), samples=1)


def test_the_advised_start_token_is_the_one_that_texts_were_trained_with():
    assert advised_start_token(with_sink()) == "<|endoftext|>"
