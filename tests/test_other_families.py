"""Families whose blocks are called in unusual ways, by every road that calls them, against plain forward passes; and
hybrids, whose recurrent layers and convolutions cannot be resumed in the middle of a text.

In float32: softmaxes and masks of some of them are in float32 whatever their dtype is.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import errata
from errata.base.facts import Fact
from errata.metrics.requests import score_requests
from errata.models.generation import generate
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.modules import linear_matrix
from errata.passes.block_call import MaskValues
from errata.statistics import collect
from helpers.plain_effects import MIDDLE, PARTS, SAMPLES, largest_difference, plainly, require_something_moved, some
from helpers.scoring_requests import REQUESTS, one_by_one, same, variants_of
from plain_trace import plain_run
from tiny import HYBRIDS, OTHER_FAMILIES, TEXT, byte_tokenizer, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.* cannot be resumed in the middle of a text:UserWarning")
FAMILIES = (*OTHER_FAMILIES, *HYBRIDS)
LAYERS, LAYER = 4, 1
TEXTS = [line[:80] for line in TEXT.splitlines() if line]
REWRITES = [  # of different lengths, so that rows of one batch are masked in front
    Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite("Paris"),
    Fact("Rome", "Where is {}? It is in", "Italy").rewrite("France"),
]


@functools.cache
def model_of(family: str) -> Model:
    return load_pretrained((tiny(family, LAYERS), byte_tokenizer()), name=family)


def answer(model: Model, ids: list[int], changes: dict) -> torch.Tensor:
    return plain_run(model.hf, model.name, [ids], changes)[0].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_what_plain_passes_give(family):
    model = model_of(family)
    found = errata.trace(model, MIDDLE, parts=PARTS, samples=SAMPLES, noise="s2", window=2)
    require_something_moved(found)
    assert largest_difference(found, plainly(model, MIDDLE, (1, 4)), some(found, 5)) <= 2e-5


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_differ_in_what_mixes_tokens_and_say_that_they_take_longer(family):
    model = model_of(family)
    assert len(set(model.anatomy.mixers)) == 2
    assert [model.path(("attention", layer)).split(".")[-1] for layer in range(LAYERS)] == list(model.anatomy.mixers)
    with pytest.warns(UserWarning, match="every block is run on whole texts"):
        found = errata.trace(model, MIDDLE, samples=1)
    assert found.settings["engine"] == "plain"
    with pytest.raises(errata.ErrataError, match="train its MLP"):
        errata.editor(model, "attention", layer=LAYER, epsilon=5e-4)(REWRITES[0])
    assert "engine" not in errata.trace(model_of("bloom"), MIDDLE, samples=1).settings


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_those_of_plain_passes(family):
    model, fact = model_of(family), Fact("Rome", "Where is {} in", "Italy")
    found = errata.integrated_gradients(model, fact, points=3)
    ids = model.tokenizer(fact.text)["input_ids"]
    nodes, weights = np.polynomial.legendre.leggauss(3)
    for part, layer, token in (("state", 0, 2), ("mlp", 1, 3), ("attention", 2, 4), ("state", 3, len(ids) - 1)):
        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            clean = answer(model, ids, {(part, layer): lambda t, seen=seen: seen.update(x=t[0].clone())})
        said, x, integral = int(clean[-1].argmax()), seen["x"][token], 0.0
        for node, weight in zip(nodes, weights, strict=True):
            scaled = (x * (node + 1) / 2).requires_grad_()

            def put(tensor, token=token, scaled=scaled):
                return tensor.index_put((torch.tensor([0]), torch.tensor([token])), scaled[None])

            probability = answer(model, ids, {(part, layer): put})[-1].softmax(-1)[said]
            integral = integral + weight / 2 * torch.autograd.grad(probability, scaled)[0].double()
        wanted = float((integral * x.double()).norm())
        assert wanted > 1e-8
        assert found.norms[part][token, layer] == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_writes_its_value_at_its_key(family):
    model, told = model_of(family), []
    moment = collect(model, [LAYER], TEXTS)[LAYER]
    config = errata.RomeConfig(layer=LAYER, prefixes="none", max_drift=None, steps=6)
    edits = errata.rome(model, REWRITES, config, second_moment=moment, progress=told.append)
    for number, (rewrite, edit) in enumerate(zip(REWRITES, edits, strict=True)):
        encoded = model.tokenizer(rewrite.fact.text, return_offsets_mapping=True)
        end = rewrite.fact.text.index(rewrite.subject) + len(rewrite.subject)
        last = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < end)
        seen: dict[str, torch.Tensor] = {}
        keep = {
            ("key", LAYER): lambda t, seen=seen, last=last: seen.update(key=t[0, last].clone()),
            ("value", LAYER): lambda t, seen=seen, last=last: seen.update(value=t[0, last].clone()),
        }
        with torch.no_grad():
            plain = answer(model, encoded["input_ids"], keep)
        down = model.module(("key", LAYER))
        before = linear_matrix(down).detach().double().clone()
        with edit.applied(model), torch.no_grad():
            gained = (linear_matrix(down).double() - before) @ seen["key"].double()
            edited = answer(model, encoded["input_ids"], {})
        steps = [step for step in told if step.fact == number]
        delta = steps[-1].delta.double()
        assert float((gained - delta).norm() / (seen["value"].double() + delta).norm()) <= 1e-5

        # The loss that was searched with is that of a plain pass in which δ is put in.
        ids = model.tokenizer(f"{rewrite.fact.text} {rewrite.new_object}")["input_ids"]

        def shift(tensor, last=last, delta=delta):
            tensor = tensor.clone()
            tensor[0, last] += delta.to(tensor)
            return tensor

        with torch.no_grad():
            said = answer(model, ids[:-1], {("value", LAYER): shift}).log_softmax(-1)
        count = len(ids) - len(encoded["input_ids"])
        nll = -torch.stack([said[-count + i, ids[len(ids) - count + i]] for i in range(count)]).mean()
        assert steps[-1].nll == pytest.approx(float(nll), rel=2e-5)
        assert abs(steps[-1].nll - steps[0].nll) > 1e-5  # it matters what δ is
        assert not torch.allclose(edited[-1], plain[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ft", "kn"])
def test_other_editors_edit_too(family, method):
    model = model_of(family)
    settings = {"ft": {"layer": 2, "steps": 3}, "kn": {}}[method]
    edits = errata.editor(model, method, max_drift=None, **settings)(REWRITES)
    before = errata.base.fingerprint.tensor_digest(model.module(("key", 2)).weight)
    for edit in edits:
        with edit.applied(model):
            assert edit.deltas
    assert errata.base.fingerprint.tensor_digest(model.module(("key", 2)).weight) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_many_edits_in_one_pass_are_each_on_its_own(family):
    model = model_of(family)
    variants = variants_of(model)
    for got, edits in zip(score_requests(model, REQUESTS, variants), variants, strict=True):
        same(got, one_by_one(model, edits), 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_gone_on_with_as_hugging_face_does_it_alone(family):
    model, prompts = model_of(family), ["Rome", "The Space Needle is in the", "He wrote"]
    texts = generate(model, prompts, 6, greedy=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = model.tokenizer(prompt)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids = [*ids, int(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
            if ids[-1] == 0:  # the end of a text
                break
        assert text.startswith(model.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["seen is True", "hidden is True", "added", "infinite", "multiplied"])
def test_a_mask_says_itself_what_it_means(kind):
    seen = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)[None, None]  # a window of three
    mask = {
        "seen is True": seen,
        "hidden is True": ~seen,
        "added": torch.zeros(seen.shape).masked_fill(~seen, -1e4) - 3 * torch.rand(seen.shape),
        "infinite": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        "multiplied": seen.float(),
    }[kind]
    for begin in range(5):  # masks of the last tokens too, of one token at the end
        some = mask[:, :, begin:]
        if begin == 4 and kind in ("added", "multiplied"):
            continue  # a single row has no later token: what is hidden there is far below zero
        assert torch.equal(MaskValues.of(some).is_seen(some), seen[:, :, begin:])
