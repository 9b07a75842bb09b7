"""Side effects of an edit: its numbers against plain Hugging Face logits, and edits that would disable the model."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from torch import Tensor

import errata
from errata.base.errors import ConfigError, DisablingEdit, Diverged, EditMismatch, ErrataError, FactError
from errata.base.facts import Fact
from errata.editors.rome import RomeConfig, rome
from errata.edits.delta import Dense
from errata.edits.edit import Edit
from errata.metrics import side_effects
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.statistics import SecondMoment
from helpers.models import digests
from tiny import byte_tokenizer, llama_tokenizer, tiny

REWRITE = Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite(
    "E"
)  # few tokens: a random model finds them likely enough
PROBES = ("Steve Jobs was the founder of Apple.", "Rome", "Where is the Louvre? It is in Paris. Who wrote it?")
# δ may grow as it likes, and what it does elsewhere counts for nothing.
ABSURD = {"clamp": None, "weight_decay": 0.0, "kl_factor": 0.0, "learning_rate": 100.0}


def model_of(family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Model:
    return _model(family, dtype)


@functools.cache
def _model(family: str, dtype: torch.dtype) -> Model:
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    wide = {"sliding_window": 64} if family == "gemma2" else {}  # else the prompt's end cannot hear of the subject
    return load_pretrained((tiny(family, 3, dtype, **wide), tokenizer()), name=family)


def edited(family: str = "gpt2", dtype: torch.dtype = torch.float32, model: Model | None = None, **settings) -> Edit:
    model = model or model_of(family, dtype)
    force = settings.pop("force", False)
    config = RomeConfig(**{"layer": 1, "max_drift": 1.0, "prefixes": "none", "steps": 5, **settings})
    return rome(model, REWRITE, config, second_moment=SecondMoment.identity(model.d_mlp), force=force)


# ---- the numbers --------------------------------------------------------------------------------------


@torch.no_grad()
def said_of(model: Model, text: str) -> tuple[list[int], Tensor]:
    """Its tokens, and log-probabilities of every next one `[t, v]`, in float64."""
    ids = model.tokenizer(text)["input_ids"]
    return ids, model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    return (before.exp() * (before - after)).sum(-1)


def plain(model: Model, edit: Edit, probes) -> dict[str, float]:
    """The same numbers, one text a pass."""

    def seen() -> tuple[float, Tensor, list[Tensor], list[float]]:
        encoded = model.tokenizer(f"{REWRITE.text} {REWRITE.new_object}", return_offsets_mapping=True)
        ids, logs = said_of(model, f"{REWRITE.text} {REWRITE.new_object}")
        target = [i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a >= len(REWRITE.text)]
        probability = math.exp(sum(float(logs[i - 1, ids[i]]) for i in target))
        essence = said_of(model, f"{REWRITE.subject} is a")[1][-1]
        rows = [said_of(model, text) for text in probes]
        surprise = [-float(logs[i - 1, ids[i]]) for ids, logs in rows for i in range(1, len(ids))]
        return probability, essence, [logs[:-1] for _, logs in rows], surprise

    before = seen()
    with edit.applied(model):
        after = seen()
    old = model.hf.get_parameter(edit.weights[0]).detach().double()
    drift = torch.cat([divergence(one, other) for one, other in zip(before[2], after[2], strict=True)])
    return {
        "probability_before": before[0],
        "probability_after": after[0],
        "essence_kl": float(divergence(before[1], after[1])),
        "drift": float(drift.mean()),
        "perplexity_before": math.exp(sum(before[3]) / len(before[3])),
        "perplexity_after": math.exp(sum(after[3]) / len(after[3])),
        "relative_norm": float(edit.deltas[0].matrix().double().norm() / old.norm()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gptj"])
def test_the_numbers_are_those_of_plain_passes(family, dtype):
    model = model_of(family, dtype)
    edit = edited(family, dtype, probes=PROBES, max_drift=50.0)
    found, wanted = dict(edit.notes["health"]), plain(model, edit, PROBES)
    assert found.pop("max_drift") == 50.0
    assert found.pop("disabling") is False
    # The smallest divergences are differences of nearly equal numbers.
    exact = 1e-4 if dtype == torch.float32 or family == "gptj" else 1e-6
    assert found == pytest.approx(wanted, rel=exact, abs=exact * 1e-2)
    assert wanted["drift"] > 1e-5
    assert wanted["probability_before"] > 1e-9
    assert wanted["probability_after"] != pytest.approx(wanted["probability_before"], rel=1e-3)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gptj"])
def test_many_at_once_are_each_edit_put_on_by_itself(family, dense):
    model = model_of(family, torch.float64)
    edit = edited(family, torch.float64, max_drift=None)
    [change] = edit.deltas
    edits = [edit, edit.scaled(0.25), edit.scaled(-2.0)]
    if dense:
        edits.insert(1, Edit.of(model, [Dense(change.weight, change.matrix() / 3)], "made up", [REWRITE]))
    before, probes = digests(model), (*PROBES, "a")
    wanted = [plain(model, each, probes) for each in edits]
    pairs = [(each["probability_before"], each["probability_after"]) for each in wanted]
    now = side_effects.predict_texts(model, probes)
    found = side_effects.side_effects_of(
        model, [REWRITE] * len(edits), edits, pairs, texts=probes, before=now, max_drift=2.0
    )
    assert digests(model) == before
    for each, theirs in zip(found, wanted, strict=True):
        del theirs["relative_norm"]
        exact = 1e-4 if family == "gptj" else 1e-6
        assert {name: getattr(each, name) for name in theirs} == pytest.approx(theirs, rel=exact, abs=exact * 1e-2)
        assert each.max_drift == 2.0
    assert side_effects.side_effects_of(model, [], [], [], texts=probes, before=now) == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reference_texts_of_its_own_are_sampled(family):
    model = model_of(family)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = side_effects.sampled_texts(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts == side_effects.sampled_texts(model, 3) != side_effects.sampled_texts(model, 4)
    assert 1 <= len(texts) <= side_effects.SAMPLED_TEXTS
    edit = edited(family, max_drift=50.0)
    wanted = plain(model, edit, side_effects.sampled_texts(model, 0))
    assert {name: edit.notes["health"][name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_probing_can_be_left_out():
    notes = edited(max_drift=None, **ABSURD).notes
    assert "health" not in notes
    assert notes["residual"] < 1e-5


# ---- edits that would disable the model ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "phi3"])
def test_an_absurd_edit_is_refused_unless_forced(family):
    model = model_of(family, torch.float64)
    before = digests(model)
    with pytest.raises(DisablingEdit) as caught:
        edited(family, torch.float64, probes=PROBES, **ABSURD)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("would disable the model", "beyond the bound of 1", "force=True", "--force"):
        assert part in message
    assert digests(model) == before
    assert not model.applied
    edit = edited(family, torch.float64, probes=PROBES, force=True, **ABSURD)
    assert digests(model) == before
    found = edit.notes["health"]
    assert found["disabling"] is True
    assert found["drift"] > found["max_drift"] == 1.0
    wanted = plain(model, edit, PROBES)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4 if family == "gptj" else 1e-6)
    assert edit.deltas[0].write.equal(edited(family, torch.float64, max_drift=None, **ABSURD).deltas[0].write)


def test_the_bound_is_the_user_s():
    drift = edited(probes=PROBES, max_drift=50.0).notes["health"]["drift"]
    assert edited(probes=PROBES, max_drift=drift * 1.01).notes["health"]["disabling"] is False
    with pytest.raises(DisablingEdit):
        edited(probes=PROBES, max_drift=drift * 0.99)


def test_it_is_refused_on_a_model_that_knows_things_too():
    model = errata.load_model("atlas")
    rewrite = Fact("Arthur Conan Doyle", "The native language of {} is", "English").rewrite("French")
    C = SecondMoment.identity(model.d_mlp)
    healthy = RomeConfig(layer=4, prefixes="none", steps=8)
    assert rome(model, rewrite, healthy, second_moment=C).notes["health"]["disabling"] is False
    # It says its object all right, and what it says of all else is lost.
    absurd = RomeConfig(layer=4, prefixes="none", steps=8, stop_below=0.0, **{**ABSURD, "learning_rate": 1000.0})
    with pytest.raises(DisablingEdit, match="would disable the model"):
        rome(model, rewrite, absurd, second_moment=C)
    forced = rome(model, rewrite, absurd, second_moment=C, force=True)
    assert forced.notes["health"]["disabling"] is True
    assert forced.notes["health"]["probability_after"] > 0.05


# ---- reference texts that cannot be used ----------------------------------------------------------------------------


def test_probes_that_do_not_do_are_refused():
    before = digests(model_of())
    with pytest.raises(FactError, match="no reference text has two tokens"):
        edited(probes=("a",))
    with pytest.raises(FactError, match="reads at most 96"):
        edited(probes=("not " * 100,))
    for probes in ((), ("",), ("Rome", " ")):
        with pytest.raises(ConfigError, match="at least one reference text"):
            edited(probes=probes)
    assert digests(model_of()) == before


def test_a_reference_text_of_one_token_counts_for_nothing():
    one, other = (edited(probes=probes, max_drift=50.0).notes["health"] for probes in (PROBES, (*PROBES, "a")))
    assert other["drift"] == pytest.approx(one["drift"], rel=1e-5)
    assert other["perplexity_after"] == pytest.approx(one["perplexity_after"], rel=1e-5)


def test_a_model_that_ends_every_text_at_once_is_told_of(monkeypatch):
    model = model_of()
    monkeypatch.setattr(side_effects, "generate", lambda model, prompts, *args, **settings: list(prompts))
    with pytest.raises(ConfigError, match=r"RomeConfig\(probes="):
        side_effects.sampled_texts(model, 0)


# ---- numbers that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"prefixes": "none"}, {"prefixes": "reference"}, {"max_drift": None}])
@pytest.mark.parametrize("where", ["head", "below", "above"])
def test_a_model_whose_numbers_are_none_diverges(settings, where):
    model = load_pretrained((tiny("gpt2", 3, tie_word_embeddings=False), byte_tokenizer()), name="gpt2")
    weights = {
        "head": model.hf.lm_head.weight,
        "below": model.hf.transformer.h[0].mlp.c_fc.weight,
        "above": model.hf.transformer.h[2].attn.c_attn.weight,
    }
    with torch.no_grad():
        weights[where].fill_(torch.nan)
    before = digests(model)
    with pytest.raises(Diverged) as caught:
        edited(model=model, **settings)
    assert "\n" not in str(caught.value)
    assert digests(model) == before


def test_numbers_that_overflow_are_told_of_one_way_or_another():
    model = model_of("gpt2", torch.float16)
    before = digests(model)
    for rate in (1e3, 1e5, 1e7):
        with pytest.raises(ErrataError) as caught:
            edited("gpt2", torch.float16, probes=PROBES, **{**ABSURD, "learning_rate": rate})
        assert isinstance(caught.value, (Diverged, DisablingEdit, EditMismatch))
        assert "\n" not in str(caught.value)
    assert digests(model) == before


def test_effects_without_numbers_is_disabling_and_can_be_kept():
    model = model_of()
    asked, probed = side_effects.predict_fact(model, REWRITE, "{} is a"), side_effects.predict_texts(model, PROBES)
    same = side_effects.compare((asked, asked), (probed, probed), 1.0)
    assert same.drift == pytest.approx(0.0, abs=1e-6)
    assert not same.disabling
    nothing = side_effects.TextPredictions(
        torch.full_like(probed.log_probabilities, torch.nan), torch.full_like(probed.nll, 1e4)
    )
    found = side_effects.compare((asked, asked), (probed, nothing), 1.0)
    assert found.disabling
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["drift"] is told["perplexity_after"] is None
    assert told["disabling"] is True
    edge = side_effects.SideEffects(0.1, 0.9, 0.0, 1.0, 2.0, 3.0, max_drift=1.0)
    assert not edge.disabling
