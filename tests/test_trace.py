"""Causal tracing against plain forward passes with hooks of their own, one site at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from errata.base import budgets
from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.facts import Fact
from errata.models.loading import load_pretrained
from errata.tracing.average import average_effects
from errata.tracing.config import TraceConfig
from errata.tracing.noise import subject_sigma
from errata.tracing.result import ROLES, CausalTrace
from errata.tracing.sweep import window_layers
from errata.tracing.trace import trace
from plain_trace import PlainTrace, window_around
from tiny import byte_tokenizer, tiny

FACT = Fact("The Space Needle", "Everyone says that {} is located in")


def make(family: str, layers: int = 3):
    return load_pretrained((tiny(family, layers=layers, dtype=torch.float64), byte_tokenizer()), name=family)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_every_site_is_what_plain_passes_give(family):
    model = make(family)
    found = trace(model, FACT, samples=3, noise=0.7, window=2, seed=5)
    ids = model.tokenizer(FACT.text)["input_ids"]
    first, last = found.subject
    noise = 0.7 * np.random.RandomState(5).randn(3, last - first + 1, model.d_model)
    plain = PlainTrace(model.hf, family, ids, range(first, last + 1), noise)
    rng = np.random.default_rng(0)
    for part in ("state", "mlp", "attention"):
        for token in {first, last, len(ids) - 1, *rng.integers(first, len(ids), 2).tolist()}:
            for layer in range(3):
                want = plain.restored(part, token, layer, window_around(layer, 2, "paper", 3))
                assert found.restored[part][token, layer] == pytest.approx(want, rel=1e-9)


def test_sites_before_the_subject_have_no_effect_and_the_last_state_has_all_of_it():
    model = make("gpt2")
    found = trace(model, FACT, samples=3, noise=0.7)
    first, _ = found.subject
    assert first > 0
    assert np.all(found.indirect_effect("state")[:first] == 0)
    assert found.indirect_effect("state")[-1, -1] == pytest.approx(found.total_effect, rel=1e-9)


def test_a_small_memory_changes_no_trace(monkeypatch):
    model = make("llama")
    whole = trace(model, FACT, samples=3, noise=0.7)
    monkeypatch.setitem(budgets.TOKENS["forward"], "cpu", 1)
    monkeypatch.setattr(budgets, "LOGITS", 1)
    piecemeal = trace(model, FACT, samples=3, noise=0.7, memory=1)
    assert piecemeal.corrupted == pytest.approx(whole.corrupted, rel=1e-9)
    for part in whole.restored:
        np.testing.assert_allclose(whole.restored[part], piecemeal.restored[part], rtol=1e-9)


def test_seeds_decide_the_noise():
    model = make("gpt2")
    same, again, other = (trace(model, FACT, parts=["state"], samples=2, noise=0.5, seed=s) for s in (1, 1, 2))
    assert np.array_equal(same.restored["state"], again.restored["state"])
    assert not np.allclose(same.restored["state"], other.restored["state"])


def test_sigma_is_measured_on_the_subjects_given():
    model = make("gpt2")
    rows = [model.tokenizer(s)["input_ids"] for s in ("Rome", "Dante Alighieri")]
    numbers = torch.cat([model.hf.transformer.wte.weight[row].flatten() for row in rows])
    assert subject_sigma(model, ["Rome", "Dante Alighieri"]) == pytest.approx(float(numbers.detach().std()))
    found = trace(model, FACT, parts=["state"], samples=1, noise="s2", subjects=["Rome", "Dante Alighieri"])
    assert found.settings["noise"] == pytest.approx(2 * float(numbers.detach().std()))


def test_windows():
    assert list(window_layers(15, 10, "paper", 48)) == list(range(11, 21))
    assert list(window_layers(15, 10, "reference", 48)) == list(range(10, 20))
    assert list(window_layers(0, 3, "paper", 8)) == [0, 1]
    assert list(window_layers(7, 3, "reference", 8)) == [6, 7]
    assert [TraceConfig().width(layers) for layers in (48, 28, 8)] == [10, 6, 3]
    assert TraceConfig(window=4).width(48) == 4


def test_a_trace_is_a_value(tmp_path):
    found = trace(make("gpt2"), FACT, samples=2, noise=0.7)
    found.save(tmp_path / "t.jsonl")
    again = CausalTrace.load(tmp_path / "t.jsonl")
    assert (again.fact, again.tokens, again.subject, again.roles) == (
        found.fact,
        found.tokens,
        found.subject,
        found.roles,
    )
    assert again.settings == found.settings
    for part, values in found.restored.items():
        assert np.array_equal(values, again.restored[part])
    frame = again.to_frame()
    assert len(frame) == 3 * len(found.tokens) * 3
    assert frame["indirect_effect"].max() == max(found.indirect_effect(p).max() for p in found.restored)
    for suffix in ("png", "svg", "pdf"):
        again.plot(tmp_path / f"t.{suffix}")
        assert (tmp_path / f"t.{suffix}").stat().st_size > 1000


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    trace(make("gpt2"), FACT, samples=1, noise=0.7, parts=["state"]).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ResultFileError, match="cut short"):
        CausalTrace.load(path)


def test_a_trace_whose_maps_do_not_fit_its_tokens_is_refused(tmp_path):
    broken = CausalTrace(FACT, "x", ("a", "b"), (0, 0), 0.9, 0.1, {"state": np.zeros((3, 2))}, {"window": None}, "m")
    broken.save(tmp_path / "t.jsonl")
    with pytest.raises(ResultFileError, match="do not fit together"):
        CausalTrace.load(tmp_path / "t.jsonl")


def test_roles():
    def roles(tokens, subject):
        return CausalTrace(FACT, "", tuple(tokens), subject, 1, 0, {}, {}, "").roles

    assert roles("abcdef", (1, 3)) == (
        "before",
        "subject_first",
        "subject_middle",
        "subject_last",
        "after_subject",
        "last",
    )
    assert roles("ab", (0, 0)) == ("subject_last", "last")
    assert roles("a", (0, 0)) == ("subject_last",)
    assert roles("abcd", (0, 0)) == ("subject_last", "after_subject", "further", "last")


def test_averages():
    def one(values, subject, tokens):
        return CausalTrace(FACT, "", tokens, subject, 0.9, 0.1, {"state": np.array(values)}, {}, "")

    two = [
        one([[0.2, 0.3], [0.5, 0.7], [0.1, 0.9]], (0, 1), ("a", "b", "c")),
        one([[0.4, 0.5], [0.3, 0.5], [0.3, 0.5]], (0, 0), ("a", "b", "c")),
    ]
    mean = average_effects(two)
    assert mean.facts == 2
    assert mean.total_effect == pytest.approx(0.8)
    table = dict(zip(ROLES, mean.mean["state"], strict=True))
    assert table["subject_first"] == pytest.approx([0.1, 0.2])
    assert table["subject_last"] == pytest.approx([(0.4 + 0.3) / 2, (0.6 + 0.4) / 2])
    assert table["last"] == pytest.approx([0.1, 0.6])
    assert np.isnan(table["subject_middle"]).all()
    half = mean.interval["state"][ROLES.index("subject_last")][0]
    assert half == pytest.approx(1.96 * np.std([0.4, 0.3], ddof=1) / 2**0.5)
    with pytest.raises(ConfigError, match="at least one"):
        average_effects([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["head"]}, "parts = 'head' is not valid"),
        ({"parts": []}, "parts"),
        ({"samples": 0}, "samples = 0"),
        ({"noise": 0.0}, "noise"),
        ({"noise": "z9"}, "s3"),
        ({"window": 0}, "window = 0"),
        ({"window_edges": "middle"}, "window_edges"),
        ({"seed": -1}, "seed = -1"),
        ({"windw": 3}, "did you mean 'window'"),
        ({"scored": "whole"}, "answer='object'"),
        ({"config": TraceConfig(), "seed": 1}, "given twice"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        trace(make("gpt2"), FACT, **settings)


def test_tokens_that_do_not_occur_are_refused():
    with pytest.raises(FactError, match="subject_middle"):
        trace(make("gpt2"), Fact("o", "{} is in"), tokens="subject_middle")


def test_a_trace_shows_itself_in_a_line():
    assert len(repr(trace(make("gpt2"), FACT, samples=1))) < 300


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(FactError, match="reads at most 96"):
        trace(make("gpt2"), Fact("Rome " * 200, "{} is in"))
