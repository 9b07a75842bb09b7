"""Whole traces of every family against plain forward passes, one site and one sample of noise at a time."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from errata.base.facts import Fact
from errata.models.model import Model
from errata.tracing.config import TraceConfig
from errata.tracing.noise import measure
from errata.tracing.runs import trace_together
from errata.tracing.tokenized import tokenize_fact
from errata.tracing.trace import trace
from helpers.plain_effects import (
    LAYERS,
    MIDDLE,
    PARTS,
    SAMPLES,
    largest_difference,
    plainly,
    require_something_moved,
    sites,
    some,
)
from plain_trace import PlainTrace
from tiny import ALL_FAMILIES, attentions, byte_tokenizer, llama_tokenizer, short_windows, tiny

KINDS = [(family, attention) for family in ALL_FAMILIES for attention in attentions(family)]

PLACES = {
    "in the middle": (Fact("Apple", "It is {} , is"), (2, 5)),  # It is| A p p le| , is
    "at the start": (Fact("Rome", "{} is the"), (0, 1)),  # R ome| is the
    "at the very end": (Fact("Louvre", "Where is the {}"), (5, 8)),  # W he re is the| L ou v re
    "of one token": (Fact("Paris", "It is {} is"), (2, 2)),
    "of one token, at the very end": (Fact("Paris", "It is in {}"), (3, 3)),
    "all there is": (Fact("Rome", "{}"), (0, 1)),
    "of one token, all there is": (Fact("The", "{}"), (0, 0)),
}


@functools.cache
def model_of(
    family: str, attention: str = "eager", dtype: torch.dtype = torch.float64, layers: int = LAYERS, bos: bool = False
) -> Model:
    changes = short_windows(family, layers) | {"attn_implementation": attention}
    tokenizer = llama_tokenizer() if bos else byte_tokenizer()
    return Model(tiny(family, layers, dtype, **changes), tokenizer, family)


def bound(family: str, dtype: torch.dtype = torch.float64) -> float:
    """Largest relative difference of a probability: GPT-J computes attention in float32 whatever its dtype."""
    return 1e-5 if dtype == torch.float32 or family == "gptj" else 1e-9


# ---- families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_every_family(family, attention, dtype):
    model = model_of(family, attention, dtype)
    found = trace(model, MIDDLE, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert found.subject == (1, 4)
    require_something_moved(found)
    assert np.all(found.indirect_effect("state")[:1] == 0)
    assert largest_difference(found, plainly(model, MIDDLE, (1, 4)), some(found, 5)) <= bound(family, dtype)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_every_site(family):
    model, (fact, subject) = model_of(family), PLACES["in the middle"]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert largest_difference(found, plainly(model, fact, subject), sites(found)) <= bound(family)


# ---- windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", ["paper", "reference"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("family", ["llama", "opt", "gptj"])
def test_windows_of_every_width(family, width, edges):
    model, (fact, subject) = model_of(family), PLACES["at the start"]
    settings = {"parts": ("mlp", "attention"), "samples": SAMPLES, "noise": 0.7}
    found = trace(model, fact, window=width, window_edges=edges, **settings)
    assert found.settings["window"] == width
    require_something_moved(found)
    plain = plainly(model, fact, subject, "0.7")
    places = [place for place in sites(found, found.restored) if place[1] in (0, plain.prompt - 1)]
    assert largest_difference(found, plain, places) <= bound(family)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_other_numbers_of_layers(layers):
    model, (fact, subject) = model_of("qwen3", layers=layers), PLACES["at the start"]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert largest_difference(found, plainly(model, fact, subject), sites(found)) <= bound("qwen3")


# ---- noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ":replace", "+1", ":replace+1"])
@pytest.mark.parametrize(
    ("form", "family"), [("s2", "gpt2"), ("u3", "gemma3"), ("m", "mistral"), ("t4", "phi3"), ("0.3", "olmo2")]
)
def test_every_noise(form, family, ending):
    model, (fact, subject) = model_of(family), PLACES["in the middle"]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise=form + ending, window=3)
    plain = plainly(model, fact, subject, form, replace="replace" in ending, after="+1" in ending)
    require_something_moved(found)
    assert largest_difference(found, plain, some(found, 2)) <= bound(family)


def test_the_token_after_the_subject_may_not_be_there():
    model, (fact, subject) = model_of("gpt2"), PLACES["at the very end"]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2+1")
    assert found.corrupted == pytest.approx(plainly(model, fact, subject, after=1).disturbed, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.* cannot be resumed")
@pytest.mark.parametrize(("family", "memory"), [("gpt2", None), ("gptj", None), ("gemma2", 1), ("qwen3_next", None)])
def test_severed_states_under_noise_of_their_own(family, memory):
    """The published code's second pass goes on drawing; modules are held in all layers, the restored one's too."""
    model, (fact, (first, last)) = model_of(family), PLACES["in the middle"]
    settings = {"parts": PARTS, "samples": SAMPLES, "noise": "0.7", "seed": 3}
    found = trace(model, fact, memory=memory, severed_noise="reference", **settings)
    state = np.random.RandomState(3)
    noise, again = (0.7 * state.randn(SAMPLES, last - first + 1, model.d_model) for _ in range(2))
    ids = model.tokenizer(fact.text)["input_ids"]
    plain = PlainTrace(model.hf, family, ids, range(first, last + 1), noise, again=again)
    places = [place for place in sites(found) if place[1] in (first, last, len(ids) - 2, len(ids) - 1)]
    places += [("severed_mlp", 0, 1), ("severed_attention", 0, 3)]  # before the subject: the second noise alone
    # qwen3_next computes in float32 inside.
    assert largest_difference(found, plain, places) <= (2e-5 if family == "qwen3_next" else bound(family))
    same = trace(model, fact, **settings)
    assert "severed_noise" not in same.settings
    for part in ("state", "mlp", "attention"):
        np.testing.assert_allclose(found.restored[part], same.restored[part], rtol=1e-5)
    for part in ("severed_mlp", "severed_attention"):
        assert np.abs(found.restored[part] - same.restored[part]).max() > 1e-3 * found.clean


def test_kinds_of_noise_differ():
    model, (fact, _) = model_of("gpt2"), PLACES["in the middle"]
    forms = [form + ending for form in ("s2", "u3", "m", "t4", "0.3") for ending in ("", "!", "+1", "!+1")]
    corrupted = {trace(model, fact, parts="state", samples=SAMPLES, noise=form).corrupted for form in forms}
    assert len(corrupted) == len(forms)


# ---- places of the subject ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma3"])
def test_subjects_anywhere(family, place):
    model, (fact, subject) = model_of(family), PLACES[place]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert found.subject == subject
    assert largest_difference(found, plainly(model, fact, subject), some(found, 6)) <= bound(family)


@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_a_long_prompt(family):
    """Its eager attention takes softmaxes in float32, which rounds otherwise over fewer keys than fill a register."""
    model, fact = model_of(family), Fact("Rome", "The {} is in the city of , and the Space is in it , is the Louvre")
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert len(found.tokens) > 32
    assert largest_difference(found, plainly(model, fact, found.subject), some(found, 24)) <= bound(family)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_subject_at_the_start_behind_a_bos(family):
    model, fact, subject = model_of(family, bos=True), Fact("Rome", "{} is"), (2, 5)  # <s> ▁| R o m e| ▁is
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    assert found.subject == subject
    assert np.all(found.indirect_effect("state")[:2] == 0)
    assert largest_difference(found, plainly(model, fact, subject), sites(found)) <= bound(family)


# ---- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", ["first", "whole"])
@pytest.mark.parametrize("place", ["in the middle", "at the start", "at the very end", "of one token, all there is"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "opt"])
def test_objects_of_several_tokens(family, place, scored):
    model, (fact, subject) = model_of(family), PLACES[place]
    fact = Fact(fact.subject, fact.prompt, "Seattle")  # S e a t t le
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", window=2, answer="object", scored=scored)
    plain = plainly(model, fact, subject, object_tokens=1 if scored == "first" else 99)
    assert len(plain.target) == (1 if scored == "first" else 6)
    assert found.restored["state"].shape == (plain.prompt, LAYERS)
    assert found.answer.strip() == ("S" if scored == "first" else "Seattle")
    assert largest_difference(found, plain, some(found, 3)) <= bound(family)
    if scored == "first":  # then the last token's last state is all there is
        assert found.restored["state"][-1, -1] == pytest.approx(found.clean, rel=bound(family))


def test_the_models_own_answer_is_not_the_object():
    model = model_of("gpt2")
    fact = Fact("Apple", "It is {} , is", "Seattle")
    own, given = trace(model, fact, samples=1), trace(model, fact, samples=1, answer="object")
    assert own.clean > given.clean
    assert own.known is given.known is False
    said = Fact(fact.subject, fact.prompt, own.answer)
    if own.answer.strip() and model.tokenizer(f"{fact.text} {said.object}")["input_ids"][-1] == own.answer:
        assert trace(model, said, samples=1).known


# ---- some tokens, some facts together, some samples at a time ------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_some_tokens_alone(family):
    model, (fact, subject) = model_of(family), PLACES["in the middle"]
    whole = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2")
    for roles in (("subject_last",), ("after_subject", "last"), ("subject_middle",)):
        found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2", tokens=roles)
        for part in PARTS:
            for token, role in enumerate(whole.roles):
                line = found.restored[part][token]
                if role in roles:
                    assert line == pytest.approx(whole.restored[part][token], rel=1e-9)
                elif token < subject[0]:
                    assert np.all(line == found.corrupted)
                else:
                    assert np.isnan(line).all()


@pytest.mark.parametrize("answer", ["model", "first", "whole"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "mistral", "gemma3"])
def test_facts_traced_together_are_as_traced_alone(family, answer):
    model = model_of(family)
    prompts = [
        ("Apple", "It is {} , is"),
        ("is Apple", "It , {} is"),
        ("is", "It is Apple , {}"),
        ("It", "{} is Apple , is"),
    ]
    facts = [Fact(subject, prompt, "Seattle") for subject, prompt in prompts]
    config = TraceConfig(
        parts=PARTS,
        samples=SAMPLES,
        noise="s2+1",
        window=3,
        answer="model" if answer == "model" else "object",
        scored="whole" if answer == "whole" else "first",
        tokens=("subject_last", "subject_middle", "last"),
    )
    tokenized = [tokenize_fact(model, fact, config) for fact in facts]
    assert len({(fact.span.first, fact.span.last) for fact in tokenized}) == len(facts)
    noise = [measure(config.corruption, model, own=fact.subject) for fact in facts]
    alone = [trace(model, fact, config) for fact in facts]
    for memory in (2**30, 1) if family == "mistral" else (2**30,):
        together = trace_together(model, tokenized, config, noise, memory, "")
        for one, found in zip(alone, together, strict=True):
            assert (found.fact, found.subject, found.answer) == (one.fact, one.subject, one.answer)
            assert found.clean == pytest.approx(one.clean, rel=bound(family))
            assert found.corrupted == pytest.approx(one.corrupted, rel=bound(family))
            for part in PARTS:
                np.testing.assert_allclose(found.restored[part], one.restored[part], rtol=bound(family))


def test_facts_of_different_lengths_are_not_traced_together():
    model, config = model_of("gpt2"), TraceConfig(noise="s2")
    facts = [fact for fact, _ in PLACES.values()]
    tokenized = [tokenize_fact(model, fact, config) for fact in facts]
    noise = [measure(config.corruption, model, own=fact.subject) for fact in facts]
    with pytest.raises(ValueError, match="one length"):
        trace_together(model, tokenized, config, noise, 2**30, "")


def test_severed_runs_differ_from_plain_ones_where_they_should():
    """At the last layer nothing is left to sever, below it there is."""
    model, (fact, subject) = model_of("gpt2"), PLACES["in the middle"]
    found = trace(model, fact, parts=PARTS, samples=SAMPLES, noise="s2")
    for part in ("severed_mlp", "severed_attention"):
        differences = np.abs(found.restored[part] - found.restored["state"])[subject[0] :]
        assert differences[:, -1].max() <= 1e-12
        assert differences[0, :-1].max() > 1e-6
