"""Continuations: greedy against a plain loop, sampling by seed, and nothing outside changed."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from transformers.cache_utils import Cache

from errata.base import budgets
from errata.base.errors import ConfigError, Diverged, FactError
from errata.models import generation
from errata.models.generation import generate
from errata.models.loading import load_pretrained
from errata.models.model import Model
from tiny import ALL_FAMILIES, byte_tokenizer, llama_tokenizer, tiny

PROMPTS = ["The Space Needle is located in the city of", "Rome", "Where is the Louvre?"]


@functools.cache
def model_of(family: str, end: int | None = None) -> Model:
    """A tiny model that never ends a text, unless at token `end`."""
    hf = tiny(family, eos_token_id=end, bos_token_id=None)
    tokenizer = byte_tokenizer()
    if end is None:
        tokenizer.eos_token = None
    return load_pretrained((hf, tokenizer), name=family)


def greedy_by_hand(model: Model, prompt: str, count: int) -> list[int]:
    ids = list(model.tokenizer(prompt)["input_ids"])
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_greedy_texts_are_those_of_a_plain_loop(family):
    model = model_of(family)
    texts = generate(model, PROMPTS, 6, greedy=True)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert text == model.tokenizer.decode(greedy_by_hand(model, prompt, 6), skip_special_tokens=True)
        assert model.complete(prompt, 6) == text


def test_the_same_seed_draws_the_same_texts():
    model = model_of("gpt2")
    draw = functools.partial(generate, model, PROMPTS, 10, top_k=5)
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert model.complete("Rome", 10, top_k=5, seed=3) == generate(model, ["Rome"], 10, top_k=5, seed=3)[0]


def test_randomness_outside_is_left_alone():
    model = model_of("gpt2")
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    generate(model, PROMPTS, 4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_text_depends_on_its_own_seed_alone():
    model = model_of("gpt2")
    together = generate(model, PROMPTS, 12, top_k=5, seed=[7, 8, 9])
    assert together[::-1] == generate(model, PROMPTS[::-1], 12, top_k=5, seed=[9, 8, 7])
    assert together[1] == generate(model, PROMPTS[1:2], 12, top_k=5, seed=[8])[0]
    with pytest.raises(ConfigError, match="3 prompts and 2 seeds"):
        generate(model, PROMPTS, 12, seed=[1, 2])


def test_small_batches_and_large_ones_give_the_same(monkeypatch):
    model = model_of("gpt2")
    texts = generate(model, PROMPTS, 12, top_k=5)
    monkeypatch.setitem(budgets.CACHE, "cpu", 1)
    assert generate(model, PROMPTS, 12, top_k=5) == texts


def test_keys_and_values_take_no_more_memory_than_their_tokens(monkeypatch):
    model, made = model_of("gpt2"), []
    monkeypatch.setattr(generation, "Cache", lambda layers: made.append(Cache(layers)) or made[-1])
    generate(model, PROMPTS, 7, greedy=True)
    tokens = max(len(model.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS) + 7
    (cache,) = made
    sizes = {each.untyped_storage().nbytes() for layer in cache.layers for each in (layer.keys, layer.values)}
    assert len(cache.layers) == model.n_layers
    assert sizes == {len(PROMPTS) * tokens * model.d_model * 4}


def test_a_length_counts_the_prompt():
    model = model_of("gpt2")
    lengths = [len(model.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    long = generate(model, PROMPTS, 60, greedy=True)
    for limit in (min(lengths), max(lengths) - 1, max(lengths) + 7):
        texts = generate(model, PROMPTS, 60, length=limit, greedy=True)
        for text, prompt, whole, length in zip(texts, PROMPTS, long, lengths, strict=True):
            ids = greedy_by_hand(model, prompt, max(0, limit - length))
            assert text == (model.tokenizer.decode(ids) if limit > length else prompt)
            assert whole.startswith(text)
    with pytest.raises(ConfigError, match="length is 0"):
        generate(model, PROMPTS, 6, length=0)


def test_what_is_around_a_batch_is_told_its_rows():
    model = model_of("gpt2")
    seen = []

    @contextlib.contextmanager
    def around(rows):
        seen.append(list(rows))
        yield
        seen.append("done")

    generate(model, PROMPTS, 2, greedy=True, around=around)
    assert seen == [[0, 1, 2], "done"]


def test_sampling_takes_tokens_as_often_as_they_are_probable():
    model = model_of("gpt2")
    logits = model.forward(model.encode(["Rome"]))[0, -1] / 3.0
    top = logits.topk(4)
    wanted = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    prefix = model.tokenizer("Rome")["input_ids"]
    named = {model.tokenizer.decode([*prefix, token]): p for token, p in wanted.items()}
    assert len(named) == 4
    count = 3000
    drawn = generate(model, ["Rome"] * count, 1, top_k=4, temperature=3.0)
    for text, p in named.items():
        assert abs(drawn.count(text) / count - p) < 4 * (p * (1 - p) / count) ** 0.5
    assert set(drawn) == set(named)


def test_the_models_own_generation_config_is_neither_obeyed_nor_changed():
    plain, own = (
        model_of("gpt2"),
        Model(tiny("gpt2", eos_token_id=None, bos_token_id=None), model_of("gpt2").tokenizer),
    )
    settings = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 2,
        "top_p": 0.2,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 2,
        "min_length": 30,
        "suppress_tokens": [*range(40, 110)],
        "encoder_repetition_penalty": 3.0,
        "forced_eos_token_id": 20,
        "stop_strings": ["e"],
        "cache_implementation": "static",
    }
    own.hf.generation_config.update(**settings)
    before = copy.deepcopy(own.hf.generation_config.to_dict())
    for how in ({"greedy": True}, {"top_k": 50, "seed": 4}, {"seed": 5, "temperature": 2.0}):
        assert generate(own, PROMPTS, 8, **how) == generate(plain, PROMPTS, 8, **how)
    assert own.hf.generation_config.to_dict() == before


@pytest.mark.parametrize("how", [{"greedy": True}, {"top_k": 5}])
def test_a_model_of_no_numbers_says_nothing(how):
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()))
    with torch.no_grad():
        model.hf.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(Diverged, match="no probabilities"):
        generate(model, PROMPTS, 3, **how)


def test_a_text_ends_at_the_end_token():
    free = model_of("gpt2")
    ids = greedy_by_hand(free, "Rome", 6)
    n_prompt = len(free.tokenizer("Rome")["input_ids"])
    end = next(i for i in range(n_prompt + 1, len(ids)) if ids[i] not in ids[n_prompt:i])
    model = model_of("gpt2", end=ids[end])
    both = generate(model, ["Rome", PROMPTS[0]], 6, greedy=True)
    assert both[0] == model.tokenizer.decode(ids[:end])
    assert generate(model, ["Rome"], 6, greedy=True, stop=False)[0] == model.tokenizer.decode(ids)
    assert len(both[1]) > len(PROMPTS[0])


def test_the_first_space_survives_a_tokenizer_that_drops_it():
    tokenizer = llama_tokenizer()
    model = load_pretrained((tiny("llama"), tokenizer))
    prompt = tokenizer("The Space Needle is in")["input_ids"]
    whole = tokenizer("The Space Needle is in Seattle")["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert generation._text_after(model, prompt, whole[len(prompt) :]) == " Seattle"


def test_length_is_what_fits():
    model = model_of("gpt2")
    assert model.max_length == 96
    long = "a" * 90
    n_long = len(model.tokenizer(long)["input_ids"])
    assert n_long == 90
    texts = generate(model, [long, "Rome"], 10, greedy=True)
    assert texts[0] == model.tokenizer.decode(greedy_by_hand(model, long, 6))
    assert texts[1] == model.tokenizer.decode(greedy_by_hand(model, "Rome", 10))
    with pytest.raises(FactError, match="leaves no room"):
        generate(model, ["Rome", "a" * 96], 3)


def test_nothing_to_do():
    model = model_of("gpt2")
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == PROMPTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"greedy": True, "top_k": 5}, "top_k and temperature have no use"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(model_of("gpt2"), PROMPTS, **{"max_new_tokens": 3, **settings})


def test_prompts_that_cannot_start_are_refused():
    with pytest.raises(FactError, match="has no tokens"):
        generate(model_of("gpt2"), ["Rome", ""], 3)
    with pytest.raises(FactError, match="in brackets"):
        generate(model_of("gpt2"), "Rome", 3)
