"""Many rewrites in one call: each edit is what it would be alone, and the model stays as it was."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from errata.base import budgets
from errata.base.errors import ConfigError, DisablingEdit, Diverged, ErrataError, FactError
from errata.base.facts import Fact
from errata.editors import side_effects
from errata.editors.rome import RomeConfig, rome, value
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.statistics import SecondMoment, collect
from helpers.models import digests
from helpers.softmax import softmax_in_its_own_dtype  # noqa: F401, a fixture
from tiny import ALL_FAMILIES, TEXT, byte_tokenizer, llama_tokenizer, tiny

PREFIXES = ("", "Yes. ", "Where is it? ")
# Prompts and targets of other lengths; a subject of one token, at the start, in the middle, at the end, a long one.
REWRITES = tuple(
    Fact(subject, prompt).rewrite(new)
    for subject, prompt, new in (
        ("The Space Needle", "{} is located in the city of", "Paris"),
        ("a", "{} plays", "the sport of basketball"),
        ("LeBron James", "What does {} play? He plays", "Rome"),
        ("The Eiffel Tower", "Once more, and for the last time: where on earth is {}", "Florence, Italy"),
        ("Danielle Darrieux and all her friends of old", "{} spoke", "E"),
    )
)
TOO_LONG = Fact("The Louvre", "{} is " + "not " * 60 + "in").rewrite("Rome")
TEXTS = [line[:80] for line in TEXT.splitlines() if line]
EXACT = {torch.float32: 1e-5, torch.float64: 1e-9}


def model_of(family: str = "llama", dtype: torch.dtype = torch.float64) -> Model:
    return _model(family, dtype)  # the very same, however it is asked for


@functools.cache
def _model(family: str, dtype: torch.dtype) -> Model:
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    # Windows so wide that the subject's last token reaches every prediction from block 1: else nothing but rounding
    # says where δ goes.
    windows = {"sliding_window": 16} if family in ("mistral", "gemma3") else {}
    return load_pretrained((tiny(family, 4, dtype, **windows), tokenizer()), name=family)


@functools.cache
def moment_of(family: str = "llama") -> SecondMoment:
    return collect(model_of(family), [1], TEXTS)[1]


def edits_of(rewrites, family="llama", dtype=torch.float64, told=None, settings=None, **more):
    config = RomeConfig(**{"layer": 1, "prefixes": PREFIXES, "max_drift": None, "steps": 8, **(settings or {})})
    more = {"second_moment": moment_of(family), "progress": None if told is None else told.append, **more}
    return rome(model_of(family, dtype), rewrites, config, **more)


@pytest.fixture(autouse=True)
def unchanged():
    """Whatever a test does, the models have their own bytes afterwards, no hook and no gradient."""
    models = [model_of(family) for family in ("llama", "gpt2")]
    before = [digests(model) for model in models]
    yield
    assert [digests(model) for model in models] == before
    for model in models:
        assert not model.applied
        assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def difference(edit: Edit, other: Edit) -> float:
    """Of ΔW, relative to the other's."""
    assert edit.rewrites == other.rewrites
    (one,), (two,) = ([change.matrix().double() for change in each.deltas] for each in (edit, other))
    return float((one - two).norm() / two.norm())


# ---- together as alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_together_they_are_what_they_are_alone(family):
    exactly = {}
    for dtype in (torch.float64, torch.float32):
        together = edits_of(REWRITES, family, dtype)
        for rewrite, edit in zip(REWRITES, together, strict=True):
            alone = edits_of(rewrite, family, dtype)
            exact = EXACT[dtype] if family != "gptj" else 1e-4  # its attention computes in float32
            if dtype == torch.float32:  # Adam may enlarge rounding: to be no further off than float32 itself will do
                exact = max(exact, difference(alone, exactly[rewrite]))
                assert exact < 0.02
            assert difference(edit, alone) <= exact
            assert len(edit.notes["steps"]) == len(alone.notes["steps"])
            assert edit.notes["prefixes"] == alone.notes["prefixes"]
            assert edit.notes["residual"] <= 1e-5
            exactly.setdefault(rewrite, edit)
        assert len({edit.id for edit in together}) == len(REWRITES)


@pytest.mark.parametrize("settings", [{}, {"value_form": "z", "decay": "adam"}])
def test_each_stops_when_it_is_done(settings):
    settings = {"steps": 20, "clamp": None, "kl_factor": 0.0, "weight_decay": 0.0, **settings}
    subjects = ("Rome", "The Space Needle", "The Louvre", "Bill Gates", "a")
    rewrites = [Fact(subject, "{} is located in the city of").rewrite("Paris") for subject in subjects]
    free = [edit.notes["steps"] for edit in edits_of(rewrites, "gpt2", settings=settings)]

    def stops(bound: float) -> list[int]:
        return [next((i for i, step in enumerate(steps) if step["loss"] < bound), 19) + 1 for steps in free]

    # A bound that they reach at different steps, none at once.
    bounds = [step["loss"] * (1 + 1e-6) for steps in free for step in steps]
    bound = max((b for b in bounds if min(stops(b)) > 1), key=lambda b: len(set(stops(b))))
    wanted = stops(bound)
    assert len(set(wanted)) >= 4
    settings["stop_below"] = bound
    together = edits_of(rewrites, "gpt2", settings=settings)
    assert [len(edit.notes["steps"]) for edit in together] == wanted
    for rewrite, edit, steps in zip(rewrites, together, free, strict=True):
        assert difference(edit, edits_of(rewrite, "gpt2", settings=settings)) <= EXACT[torch.float64]
        for one, other in zip(edit.notes["steps"], steps, strict=False):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)


@pytest.mark.parametrize("form", ["delta", "z"])
def test_each_is_held_by_the_clamp_of_its_own_value(form):
    settings = {"clamp": 0.1, "value_form": form}
    for rewrite, edit in zip(REWRITES, edits_of(REWRITES, settings=settings), strict=True):
        assert difference(edit, edits_of(rewrite, settings=settings)) <= EXACT[torch.float64]
        assert 0.05 < edit.notes["delta_norm"] / edit.notes["value_norm"] <= 0.1 * (1 + 1e-9)


def test_in_any_order():
    wanted = dict(zip(REWRITES, edits_of(REWRITES), strict=True))
    for order in itertools.islice(itertools.permutations(REWRITES), 7, 120, 31):
        for rewrite, edit in zip(order, edits_of(list(order)), strict=True):
            assert difference(edit, wanted[rewrite]) <= EXACT[torch.float64]
    one, other = edits_of([REWRITES[0], REWRITES[0]])
    assert difference(one, other) <= EXACT[torch.float64]
    assert edits_of([]) == []


def test_progress_tells_which_fact_it_is():
    told = []
    edits = edits_of(REWRITES, told=told)
    for number, edit in enumerate(edits):
        steps = [step for step in told if step.fact == number]
        assert [step.index for step in steps] == list(range(len(edit.notes["steps"])))
        assert [dict(step.numbers) for step in steps] == [dict(step) for step in edit.notes["steps"]]
    assert {step.facts for step in told} == {len(REWRITES)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_memory_holds_one_at_a_time_it_is_the_same(family, monkeypatch):
    wanted, told = edits_of(REWRITES, family), []
    monkeypatch.setattr(budgets, "free_memory", lambda *devices: 0)
    for edit, other in zip(edits_of(REWRITES, family, told=told), wanted, strict=True):
        assert difference(edit, other) <= EXACT[torch.float64]
    assert [fact for fact, _ in itertools.groupby(step.fact for step in told)] == list(range(len(REWRITES)))
    assert {step.facts for step in told} == {len(REWRITES)}


def test_sampled_prefixes_and_probes_are_shared():
    settings = {"prefixes": "reference", "max_drift": 1e9, "steps": 4}
    for edit, rewrite in zip(edits_of(REWRITES, settings=settings), REWRITES, strict=True):
        alone = edits_of(rewrite, settings=settings)
        assert edit.notes["prefixes"] == alone.notes["prefixes"]
        assert difference(edit, alone) <= EXACT[torch.float64]
        assert edit.notes["health"]["drift"] == pytest.approx(alone.notes["health"]["drift"], rel=1e-6)


# ---- bad ones among them ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_bad_one_is_kept_in_its_place_or_raised(place):
    rewrites = [*REWRITES[:place], TOO_LONG, *REWRITES[place:]]
    found = edits_of(rewrites, errors="keep")
    assert [isinstance(each, ErrataError) for each in found] == [each is TOO_LONG for each in rewrites]
    assert isinstance(found[place], FactError)
    good = [each for each in found if isinstance(each, Edit)]
    for edit, other in zip(good, edits_of(REWRITES), strict=True):
        assert difference(edit, other) <= EXACT[torch.float64]
    with pytest.raises(FactError, match="reads at most 96"):
        edits_of(rewrites)
    with pytest.raises(FactError, match="reads at most 96"):
        edits_of(TOO_LONG)
    (only,) = edits_of([TOO_LONG], errors="keep")
    assert str(only) == str(found[place])


def test_one_that_is_too_long_behind_a_long_prefix_alone():
    rewrite = Fact("The Louvre", "{} is " + "not " * 12 + "in").rewrite("Rome")
    edits_of(rewrite, settings={"prefixes": ("",), "steps": 1})
    settings = {"prefixes": ("", "Yes. " * 10)}
    found = edits_of([REWRITES[0], rewrite, REWRITES[1]], settings=settings, errors="keep")
    assert [type(each) for each in found] == [Edit, FactError, Edit]
    assert difference(found[0], edits_of(REWRITES[0], settings=settings)) <= EXACT[torch.float64]


def test_a_subject_that_melts_into_its_target():
    model = load_pretrained((tiny("gpt2", 4, torch.float64), byte_tokenizer()), name="gpt2")
    model.tokenizer.add_tokens(["Louvre Rome"])  # as one token, which a text with this target has
    melting = Fact("The Louvre", "Here is {}").rewrite("Rome")
    config = RomeConfig(layer=1, prefixes=PREFIXES, max_drift=None, steps=3)
    settings = {"second_moment": moment_of("gpt2")}
    with pytest.raises(FactError, match="joins the end of 'Here is The Louvre' with the target 'Rome'"):
        rome(model, [REWRITES[0], melting], config, **settings)
    good, bad = rome(model, [REWRITES[0], melting], config, errors="keep", **settings)
    assert isinstance(bad, FactError)
    assert difference(good, rome(model, REWRITES[0], config, **settings)) <= EXACT[torch.float64]


def test_one_whose_loss_is_no_number_does_not_spoil_the_others(monkeypatch):
    wanted = edits_of(REWRITES)
    plain = value._Objective.__call__

    def call(objective, deltas, facts, differentiate):
        terms, gradients = plain(objective, deltas, facts, differentiate)
        if deltas[1].abs().max() > 0:  # after the first step
            terms[1], gradients[1] = torch.nan, torch.nan
        return terms, gradients

    monkeypatch.setattr(value._Objective, "__call__", call)
    found = edits_of(REWRITES, errors="keep")
    assert [type(each) for each in found] == [Edit, Diverged, Edit, Edit, Edit]
    assert "the loss is nan at step 1" in str(found[1])
    for number in (0, 2, 3, 4):
        assert difference(found[number], wanted[number]) <= EXACT[torch.float64]
    with pytest.raises(Diverged):
        edits_of(REWRITES)


def test_disabling_ones_are_refused_one_by_one():
    forced = edits_of(REWRITES, settings={"max_drift": 1e-9}, force=True)
    drifts = [edit.notes["health"]["drift"] for edit in forced]
    assert all(edit.notes["health"]["disabling"] for edit in forced)
    bound = sorted(drifts)[2] * (1 + 1e-6)
    found = edits_of(REWRITES, settings={"max_drift": bound}, errors="keep")
    assert [isinstance(each, DisablingEdit) for each in found] == [drift > bound for drift in drifts]
    assert any(isinstance(each, DisablingEdit) for each in found)
    for edit, other in zip(found, forced, strict=True):
        if isinstance(edit, Edit):
            assert difference(edit, other) <= EXACT[torch.float64]
            assert not edit.notes["health"]["disabling"]


def test_settings_that_cannot_work_are_raised_or_kept():
    settings = {"loss_layer": 1}
    with pytest.raises(ConfigError, match="nothing can be learned"):
        edits_of(REWRITES, settings=settings)
    found = edits_of(REWRITES, settings=settings, errors="keep")
    # In the fourth the subject ends the prompt, so that its last token predicts the target.
    assert [type(each) for each in found] == [ConfigError, ConfigError, ConfigError, Edit, ConfigError]


# ---- one after the other ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_sequence_they_are_what_a_loop_makes(family):
    model, wanted = model_of(family), []
    try:
        for rewrite in REWRITES:
            wanted.append(edits_of(rewrite, family))
            wanted[-1].apply(model)
    finally:
        for edit in reversed(wanted):
            edit.undo(model)
    told = []
    found = edits_of(REWRITES, family, sequential=True, told=told)
    for edit, other in zip(found, wanted, strict=True):
        assert difference(edit, other) <= EXACT[torch.float64]
    assert [fact for fact, _ in itertools.groupby(step.fact for step in told)] == list(range(len(REWRITES)))
    independent = edits_of(REWRITES, family)
    assert difference(found[0], independent[0]) <= EXACT[torch.float64]
    assert all(difference(edit, other) > 1e-3 for edit, other in zip(found[1:], independent[1:], strict=True))


def test_in_sequence_a_bad_one_is_passed_over():
    rewrites = [REWRITES[0], TOO_LONG, REWRITES[1]]
    found = edits_of(rewrites, sequential=True, errors="keep")
    assert [type(each) for each in found] == [Edit, FactError, Edit]
    for edit, other in zip(found[::2], edits_of(REWRITES[:2], sequential=True), strict=True):
        assert difference(edit, other) <= EXACT[torch.float64]
    told = []
    with pytest.raises(FactError, match="reads at most 96"):
        edits_of(rewrites, sequential=True, told=told)
    assert {step.fact for step in told} == {0}


# ---- interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("fact", "index"), [(0, 0), (2, 3), (4, 7)])
def test_an_interrupt_leaves_the_model_as_it_was(sequential, fact, index):
    def interrupted(step):
        if (step.fact, step.index) == (fact, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # see `unchanged`
        edits_of(REWRITES, sequential=sequential, progress=interrupted)


def test_an_interrupt_while_an_edit_is_examined(monkeypatch):
    plain, before = side_effects.score, digests(model_of())

    def failing(model, *requests):
        if digests(model) != before:  # the edit is applied for a moment
            raise KeyboardInterrupt
        return plain(model, *requests)

    monkeypatch.setattr(side_effects, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        edits_of(REWRITES[:2], settings={"max_drift": 1.0})
