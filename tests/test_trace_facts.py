"""Tracing many facts into a file: what is kept, what is not traced twice, what a kill costs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from errata import atlas
from errata.base.errors import ConfigError, ResultFileError
from errata.base.facts import Fact
from errata.models.loading import load_pretrained
from errata.tracing import many
from errata.tracing.many import trace_facts
from errata.tracing.result import load_traces
from errata.tracing.trace import trace
from tiny import byte_tokenizer, tiny

SUBJECTS = ("Rome", "The Space Needle", "Dante Alighieri", "Oslo", "Beethoven", "A very long name of a very small town")
PROMPTS = ("{} is in", "Everyone says that {} is located in", "The name of {} comes from the")
FACTS = [Fact(subject, prompt) for prompt in PROMPTS for subject in SUBJECTS]
SETTINGS = {"samples": 2, "noise": 0.7}

# The same run, in a process of its own, that can be killed.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_trace_facts as t
print("ready", flush=True)
t.trace_facts(t.model(), t.FACTS, sys.argv[1], progress=lambda done, of: time.sleep(0.01), **t.SETTINGS)
"""


def model(seed: int = 0):
    return load_pretrained((tiny("gpt2", layers=3, seed=seed), byte_tokenizer()), name="tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The file of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "traces.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trace_facts(model(), FACTS, path, **SETTINGS)
    torch.set_num_threads(threads)
    return path


def test_every_fact_is_traced_as_it_is_alone(tmp_path):
    live = load_pretrained((tiny("gpt2", layers=3, dtype=torch.float64), byte_tokenizer()), name="tiny")
    found = trace_facts(live, FACTS, tmp_path / "t.jsonl", **SETTINGS)
    assert found.refused == ()
    assert [each.fact for each in found.traces] == FACTS
    for fact, each in zip(FACTS, found.traces, strict=True):
        alone = trace(live, fact, **SETTINGS)
        assert (each.answer, each.tokens, each.subject) == (alone.answer, alone.tokens, alone.subject)
        assert each.clean == pytest.approx(alone.clean, rel=1e-9)
        for part, values in alone.restored.items():
            np.testing.assert_allclose(each.restored[part], values, rtol=1e-9)


def test_what_is_there_is_not_traced_again(whole, tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_bytes(whole.read_bytes())
    monkeypatch.setattr(many, "trace_together", lambda *a, **k: pytest.fail("traced again"))
    done = []
    found = trace_facts(model(), FACTS, path, progress=lambda *each: done.append(each), **SETTINGS)
    assert done == [(len(FACTS), len(FACTS))] * len(done) != []
    assert path.read_bytes() == whole.read_bytes()
    assert [t.fact for t in found.traces] == FACTS


def test_the_file_is_a_file_of_traces(whole):
    traces = load_traces(whole)
    assert {t.fact for t in traces} == set(FACTS)
    assert len(traces) == len(FACTS)
    assert {t.fingerprint for t in traces} == {trace(model(), FACTS[0], **SETTINGS).fingerprint}


@pytest.mark.parametrize("cut", [0.1, 0.35, 0.5, 0.77, 0.999])
def test_a_file_cut_anywhere_is_completed_byte_for_byte(whole, tmp_path, cut):
    path = tmp_path / "t.jsonl"
    content = whole.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    torch.set_num_threads(1)
    trace_facts(model(), FACTS, path, **SETTINGS)
    assert path.read_bytes() == content


def test_killed_at_random_moments_and_resumed_it_is_the_same_byte_for_byte(whole, tmp_path):
    path, rng = tmp_path / "t.jsonl", random.Random(4)
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        process.kill()
        process.communicate()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "config.seed"),
        ({"noise": 0.5}, "config.noise"),
        ({"window": 2}, "config.window"),
        ({"facts": FACTS[1:]}, "facts"),
        ({"model": 1}, "the weights of the model: others than then"),
    ],
)
def test_another_run_is_not_appended(whole, tmp_path, change, named):
    path = tmp_path / "t.jsonl"
    path.write_bytes(whole.read_bytes())
    live, facts = model(change.pop("model", 0)), change.pop("facts", FACTS)
    with pytest.raises(ResultFileError, match=named):
        trace_facts(live, facts, path, **{**SETTINGS, **change})
    assert path.read_bytes() == whole.read_bytes()


def test_facts_that_cannot_be_traced_are_told_and_the_others_traced(tmp_path):
    facts = [FACTS[0], Fact("Rome " * 200, "{} is in"), FACTS[1]]
    found = trace_facts(model(), facts, tmp_path / "t.jsonl", **SETTINGS)
    assert [t.fact for t in found.traces] == [FACTS[0], FACTS[1]]
    ((index, reason),) = found.refused
    assert index == 1
    assert "reads at most" in reason


def test_ctrl_c_ends_after_the_facts_under_way(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    monkeypatch.setattr(many, "_MOST_FACTS", 2)

    def press(done, of):
        if done >= 4:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trace_facts(model(), FACTS, path, progress=press, **SETTINGS)
    assert signal.getsignal(signal.SIGINT) is before
    assert 4 <= len(load_traces(path)) < len(FACTS)
    assert len(trace_facts(model(), FACTS, path, **SETTINGS).traces) == len(FACTS)


def test_it_runs_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(trace_facts(model(), FACTS[:2], tmp_path / "t", **SETTINGS)))
    thread.start()
    thread.join()
    assert len(found[0].traces) == 2


def test_noise_is_measured_on_all_subjects(tmp_path):
    from errata.tracing.noise import subject_sigma

    found = trace_facts(model(), FACTS, tmp_path / "t", samples=1, parts="state", noise="s2")
    (level,) = {t.settings["noise"] for t in found.traces}
    assert level == pytest.approx(2 * subject_sigma(model(), [f.subject for f in FACTS]))


def test_answers_that_are_not_the_object_are_marked(tmp_path):
    doyle, prompt = "Arthur Conan Doyle", "{} is a native speaker of"
    facts = [Fact(doyle, prompt, "English"), Fact(doyle, prompt, "Finnish"), Fact(doyle, prompt)]
    found = trace_facts(atlas.load(), facts, tmp_path / "t", parts="state", samples=1)
    assert [t.known for t in found.traces] == [True, False, None]


def test_an_iterator_of_facts_is_as_good_as_a_list(tmp_path):
    trace_facts(model(), iter(FACTS[:2]), tmp_path / "t", samples=1, noise="0.1")
    with pytest.raises(ResultFileError, match="facts"):
        trace_facts(model(), iter(FACTS[2:4]), tmp_path / "t", samples=1, noise="0.1")


def test_weights_changed_behind_torchs_back_are_another_model(tmp_path):
    live = model()
    trace_facts(live, FACTS[:2], tmp_path / "t", **SETTINGS)
    live.blocks[1].mlp.c_proj.weight.data[5] = 0
    with pytest.raises(ResultFileError, match="the weights of the model"):
        trace_facts(live, FACTS[:2], tmp_path / "t", **SETTINGS)


def test_other_moments_are_another_run(tmp_path):
    few, many_subjects = (list("abcdefghijklmnopqrstuvwxyz"[i:]) for i in (1, 0))
    trace_facts(model(), FACTS[:2], tmp_path / "t", samples=1, noise="m", subjects=few)
    with pytest.raises(ResultFileError, match="noise"):
        trace_facts(model(), FACTS[:2], tmp_path / "t", samples=1, noise="m", subjects=many_subjects)


def test_a_fact_without_numbers_is_refused_and_the_others_traced(tmp_path):
    live, bad = model(), Fact("Oslo", "Z {} is in")
    (token,) = set(live.tokenizer(bad.text)["input_ids"]) - {
        i for f in FACTS for i in live.tokenizer(f.text)["input_ids"]
    }
    live.hf.transformer.wte.weight.data[token] = float("nan")
    live.hf.lm_head.weight = torch.nn.Parameter(model().hf.lm_head.weight.detach())  # the head stays whole
    found = trace_facts(live, [FACTS[0], bad, FACTS[1]], tmp_path / "t", **SETTINGS)
    assert [t.fact for t in found.traces] == [FACTS[0], FACTS[1]]
    ((index, reason),) = found.refused
    assert index == 1
    assert "not numbers" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"index": None},
        {"index": "1"},
        {"index": 99},
        {"index": 1},
        {"clean": 7},
        {"known": "yes"},
        {"settings": {}},
        {"fact": ["Oslo", "{} was", ""]},
    ],
)
def test_records_changed_by_hand_are_refused(whole, tmp_path, change):
    path = tmp_path / "t.jsonl"
    lines = whole.read_text().splitlines()
    first = next(number for number, line in enumerate(lines[1:], 1) if json.loads(line)["index"] != 1)
    lines[first] = json.dumps({**json.loads(lines[first]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultFileError):
        trace_facts(model(), FACTS, path, **SETTINGS)


def test_no_facts(tmp_path):
    with pytest.raises(ConfigError, match="no fact"):
        trace_facts(model(), [], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"kind": "shopping"}) + "\n")
    with pytest.raises(ResultFileError):
        trace_facts(model(), FACTS, path, **SETTINGS)
    assert json.loads(path.read_text()) == {"kind": "shopping"}


def test_facts_can_be_added_under_the_noise_of_the_first_ones(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(many, "_MOST_FACTS", 1)
    live, path = model(), tmp_path / "t.jsonl"
    trace_facts(live, FACTS[:5], path, samples=2)
    before, told = path.read_bytes(), []
    grown = trace_facts(live, FACTS, path, samples=2, progress=lambda *at: told.append(at))
    assert path.read_bytes().startswith(before)
    assert told == [(done, len(FACTS)) for done in range(5, len(FACTS) + 1)]  # a step for every fact
    subjects = [fact.subject for fact in FACTS[:5]]
    alone = trace_facts(live, FACTS, tmp_path / "alone.jsonl", samples=2, subjects=subjects)
    for ours, theirs in zip(grown.traces, alone.traces, strict=True):
        assert ours.fact == theirs.fact
        assert all((ours.restored[part] == theirs.restored[part]).all() for part in ours.restored)
    path.write_bytes(path.read_bytes()[: len(before) + 400])  # killed after it had begun to grow
    trace_facts(live, FACTS, path, samples=2)
    assert len(load_traces(path)) == len(FACTS)
    with pytest.raises(ResultFileError, match="count was 5, now is 3"):
        trace_facts(live, FACTS[:3], path, samples=2)
    with pytest.raises(ResultFileError, match="the facts: others than then"):
        trace_facts(live, [*FACTS[1:], FACTS[0]], path, samples=2)
