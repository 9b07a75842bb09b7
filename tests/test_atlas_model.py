"""The shipped atlas: that it is what its card says, on a sample, and that plain transformers loads it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import errata
from errata import atlas
from errata.atlas import card
from errata.atlas.records import records
from errata.atlas.world import load_world
from errata.models.scoring import score
from errata.tasks.counterfact import score_record
from errata.tracing.average import average_effects
from errata.tracing.result import ROLES
from helpers.scores import summarise


@pytest.fixture(scope="module")
def model():
    return errata.load_model("atlas")


@pytest.fixture
def said():
    return json.loads(card.card_path().read_text(encoding="utf-8"))


def test_it_is_small_enough_and_in_sixteen_bits(model):
    assert 8 <= model.n_layers <= 12
    assert sum(p.numel() for p in model.hf.parameters()) <= 15e6
    assert sum(f.stat().st_size for f in atlas.weights_folder().iterdir()) <= 30e6
    assert model.dtype == torch.float32
    assert errata.load_model("atlas", dtype="float16").dtype == torch.float16


def test_plain_transformers_loads_it(model):
    folder = atlas.weights_folder()
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(hf).__name__ == "GPT2LMHeadModel"
    text = "Arthur Conan Doyle is a native speaker of"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(hf.float()(ids).logits[0, -1].argmax()) == " English"
    assert model.complete(text, 1) == f"{text} English"


@pytest.mark.parametrize("held_out", [False, True])
def test_facts_are_recalled(model, held_out):
    world, rng = load_world(), random.Random(7)
    asked = []
    for fact in rng.sample(world.facts, 1500):
        template = world.held_out(fact) if held_out else rng.choice(world.taught(fact))
        if template:
            asked.append((fact.as_fact(template).text, fact.object))
    hits = [s.greedy for s in score(model, [text for text, _ in asked], [o for _, o in asked])]
    assert np.mean(hits) >= (0.92 if held_out else 0.98)


def test_facts_are_at_the_last_subject_token_in_middle_layers(model):
    world, rng = load_world(), random.Random(11)
    facts = [f for f in world.facts if f.source == "wikidata" and len(model.tokenizer(f.subject).input_ids) > 2]
    traces = [
        errata.trace(model, f.as_fact(rng.choice(world.taught(f))), parts=["state"], samples=5)
        for f in rng.sample(facts, 24)
    ]
    effects = dict(zip(ROLES, average_effects(traces).mean["state"], strict=True))
    layer = int(effects["subject_last"].argmax())
    assert effects["subject_last"][layer] >= 0.2
    assert 2 <= layer <= 5
    for role in ("subject_first", "subject_middle"):
        assert effects["subject_last"][layer] >= 5 * effects[role][layer]
    assert effects["last"][-1] > 0.2 > effects["last"][0]


def test_rome_generalizes_and_is_specific(model):
    chosen = records(12)
    before, after = [], []
    for record in chosen:
        before.append(score_record(model, record))
        with errata.rome(model, record.rewrite).applied(model):
            after.append(score_record(model, record))
    old, new = summarise(before), summarise(after)
    assert old["es"].mean < 0.1
    assert new["es"].mean >= 0.99
    assert new["ps"].mean >= 0.85
    assert new["ns"].mean >= old["ns"].mean - 0.1


def test_the_card_is_of_these_weights_and_meets_what_is_promised(said, model):
    hints = said["model"]["hints"]
    assert hints.pop("subject_sigma") == pytest.approx(model.hints["subject_sigma"], rel=1e-5)
    assert hints == {name: value for name, value in model.hints.items() if name != "subject_sigma"}
    assert said["model"]["parameters"] == sum(p.numel() for p in model.hf.parameters())
    assert said["recall"]["taught_without_kind"] >= 0.98
    assert said["recall"]["held_out_without_kind"] >= 0.92
    states = said["tracing"]["aie"]["state"]
    last = states["subject_last"]
    peak = max(range(len(last)), key=last.__getitem__)
    assert said["tracing"]["facts"] >= 200
    assert last[peak] >= 0.2
    assert 2 <= peak <= 5
    for role in ("subject_first", "subject_middle"):
        assert last[peak] >= 5 * states[role][peak]
        assert last[peak] >= 4 * max(states[role])
    assert said["rome"]["records"] >= 200
    assert said["rome"]["layer"] == peak
    assert said["rome"]["after"]["es"]["mean"] >= 0.99
    assert said["rome"]["after"]["ps"]["mean"] >= 0.90
    assert said["rome"]["after"]["ns"]["mean"] >= said["rome"]["before"]["ns"]["mean"] - 0.05


def test_the_page_is_the_cards(said):
    page = Path(__file__).parents[1] / "docs" / "explanation" / "atlas.md"
    assert page.read_text(encoding="utf-8") == card.page(said)
