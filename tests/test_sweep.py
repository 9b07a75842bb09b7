"""Edits at every layer and token role: what is scored, what is kept, what a kill costs."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import errata
from errata.base.errors import ConfigError, ResultFileError, StaleStatistics
from errata.base.facts import Fact
from errata.data.records import Record
from errata.evaluation import runner
from errata.evaluation.results import Run
from errata.evaluation.runner import evaluate
from errata.evaluation.setting_scores import SettingScores
from errata.evaluation.sweep import sweep
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.statistics import SecondMoment
from errata.tasks.counterfact import score_record
from helpers.scores import summarise
from made_runs import lines_of
from tiny import byte_tokenizer, tiny

SUBJECTS = ("Rome", "The Space Needle", "Dante", "Oslo", "Beethoven")
RECORDS = [
    Record(
        case_id=10 * number,
        relation="place",
        rewrite=Fact(subject, "{} is in", "Seattle").rewrite("Paris"),
        paraphrase=(f"Where is it? {subject} lies in", f"One finds {subject} in"),
        neighborhood=tuple(f"{other} is in" for other in SUBJECTS if other != subject),
        attribute=(),
        generation=(),
    )
    for number, subject in enumerate(SUBJECTS)
]
SETTINGS = {"prefixes": "none", "steps": 4, "weight_decay": 0.0, "kl_factor": 0.0, "clamp": None}
LAYERS, TOKENS = [0, 2], ["subject_last", "last"]
NAMES = [f"rome-layer={layer},fact_token={token}" for layer in LAYERS for token in TOKENS]

# The same sweep, in a process of its own, that can be killed.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_sweep as t
t.runner.TOGETHER = 2
t.torch.set_num_threads(1)
print("ready", flush=True)
t.swept(sys.argv[1], progress=lambda done, of: time.sleep(0.1))
"""


@pytest.fixture(autouse=True)
def _in_twos(monkeypatch):
    monkeypatch.setattr(runner, "TOGETHER", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0):
    return load_pretrained((tiny("gpt2", layers=3, seed=seed), byte_tokenizer()), name="tiny")


def identity(live):
    return lambda layer: SecondMoment.identity(live.d_mlp)


def swept(folder, live=None, records=RECORDS, settings=SETTINGS, **changes) -> Run:
    live = live or model()
    given = {"layers": LAYERS, "tokens": TOKENS, "second_moment": identity(live), **changes}
    return sweep(live, records, folder, settings=settings, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a sweep that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TOGETHER", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        swept(folder)
        torch.set_num_threads(threads)
    return folder


def test_scores_are_those_of_edits_applied_one_by_one(tmp_path):
    live = load_pretrained((tiny("gpt2", layers=3, dtype=torch.float64), byte_tokenizer()), name="tiny")
    before = weights_digest(live.hf)
    found = SettingScores.of(swept(tmp_path / "s", live), "layer")
    assert weights_digest(live.hf) == before
    assert found.lines == tuple(f"fact token {token}" for token in TOKENS)
    assert found.unedited["es"].mean == summarise([score_record(live, record) for record in RECORDS])["es"].mean
    means = []
    for token in TOKENS:
        scores = []
        for record in RECORDS:
            edit = errata.rome(
                live,
                record.rewrite,
                layer=0,
                fact_token=token,
                second_moment=identity(live),
                max_drift=None,
                **SETTINGS,
            )
            with edit.applied(live):
                scores.append(score_record(live, record))
        wanted = summarise(scores)
        for name in ("es", "ps", "ns", "s"):
            estimate = found.scores[name][f"fact token {token}", 0.0]
            assert estimate.mean == pytest.approx(wanted[name].mean, rel=1e-12)
            assert estimate.half == pytest.approx(wanted[name].half, nan_ok=True)
        means.append(wanted["em"].mean)
    assert max(means) > 0  # edits do something


def test_it_is_the_run_that_evaluate_makes_of_the_same_rows(whole, tmp_path):
    live = model()
    editors = {
        name: errata.rome.bind(
            live,
            layer=layer,
            fact_token=token,
            second_moment=identity(live),
            attention_sink="ignore",
            **SETTINGS,
        )
        for name, (layer, token) in zip(NAMES, [(i, t) for i in LAYERS for t in TOKENS], strict=True)
    }
    evaluate(live, RECORDS, editors, tmp_path / "r")
    assert [*Run.load(whole).edited] == NAMES
    assert lines_of(tmp_path / "r") == lines_of(whole)


def test_what_cannot_be_edited_counts_as_unedited_and_says_why(whole):
    run = Run.load(whole)
    found = SettingScores.of(run, "layer")
    assert found.failures == {
        ("fact token subject_last", 0.0): 0,
        ("fact token last", 0.0): 0,
        ("fact token subject_last", 2.0): len(RECORDS),
        ("fact token last", 2.0): 0,
    }
    (reason,) = {result.error for result in run.edited[NAMES[2]].by_case.values()}
    assert "reaches no prediction" in reason
    for name in found.metrics:
        assert found.scores[name]["fact token subject_last", 2.0].mean == found.unedited[name].mean


def test_a_record_without_the_token_is_no_obstacle(tmp_path):
    ends = Record(1, "", Fact("Rome", "They live in {}", "a").rewrite("b"), (), (), (), ())
    run = swept(tmp_path / "s", records=[RECORDS[0], ends], layers=[0], tokens=["after_subject"])
    (row,) = run.edited.values()
    assert row.by_case[0].error is None
    assert "ends the prompt" in row.by_case[1].error


def test_second_moments_are_asked_for_once_a_layer_and_one_is_held(tmp_path):
    live, asked, there = model(), [], []

    def of_layer(layer):
        gc.collect()
        assert not any(moment() for moment in there)
        asked.append(layer)
        moment = SecondMoment.identity(live.d_mlp)
        there.append(weakref.ref(moment))
        return moment

    swept(tmp_path / "s", live, second_moment=of_layer, layers=[1, 0, 2])
    assert asked == [1, 0, 2]


def test_what_is_there_is_not_made_again(whole, tmp_path, monkeypatch):
    swept(tmp_path / "s")
    before = lines_of(tmp_path / "s", times=True)
    monkeypatch.setattr("errata.editors.rome.editor._make", lambda *a, **k: pytest.fail("edited again"))
    done = []
    swept(tmp_path / "s", progress=lambda *each: done.append(each))
    total = (len(NAMES) + 1) * len(RECORDS)
    assert done[-1] == (total, total)
    assert lines_of(tmp_path / "s", times=True) == before


def test_progress_grows_to_the_whole(tmp_path):
    done = []
    swept(tmp_path / "s", progress=lambda *each: done.append(each))
    total = (len(NAMES) + 1) * len(RECORDS)
    assert {of for _, of in done} == {total}
    counts = [count for count, _ in done]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, total)


def test_killed_at_a_random_moment_and_resumed_it_is_the_same(whole, tmp_path):
    folder = tmp_path / "s"
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    time.sleep(random.uniform(0.5, 1.5))
    process.kill()
    process.communicate()
    swept(folder)
    assert lines_of(folder) == lines_of(whole)


def test_ctrl_c_ends_after_the_records_under_way(whole, tmp_path):
    def press(done, of):
        if done >= 4:
            signal.raise_signal(signal.SIGINT)

    live = model()
    before, weights = signal.getsignal(signal.SIGINT), weights_digest(live.hf)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "s", live, progress=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert weights_digest(live.hf) == weights
    assert [*Run.load(tmp_path / "s").edited] == NAMES[:2]
    swept(tmp_path / "s", live)
    assert lines_of(tmp_path / "s") == lines_of(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {**SETTINGS, "steps": 5}}, "steps"),
        ({"seed": 2}, "seed"),
        ({"records": RECORDS[1:]}, "the records"),
        ({"live": 1}, "weights of the model"),
        ({"second_moment": SecondMoment(2 * torch.eye(24, dtype=torch.float64), 1, None)}, "second_moment"),
    ],
)
def test_another_sweep_is_not_added(whole, tmp_path, change, named):
    swept(tmp_path / "s", layers=[0])
    before = lines_of(tmp_path / "s")
    if "live" in change:
        change = {"live": model(change["live"])}
    with pytest.raises(ResultFileError, match=named):
        swept(tmp_path / "s", **{"layers": [0], **change})
    assert lines_of(tmp_path / "s") == before


def test_a_second_moment_that_does_not_fit_leaves_no_trace(tmp_path):
    with pytest.raises(StaleStatistics):
        swept(tmp_path / "s", second_moment=lambda layer: SecondMoment.identity(3))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"records": []}, "no records"),
        ({"layers": []}, "no layer"),
        ({"layers": [3]}, "unknown layer 3: choose from 0, 1, 2"),
        ({"layers": [1, 0, 1]}, "a layer is given twice"),
        ({"tokens": ["first"]}, "unknown token role 'first'"),
        ({"records": [RECORDS[0], RECORDS[0]]}, "case 0 is there twice"),
        ({"settings": {"layer": 1}}, "goes through values of 'layer'"),
        ({"settings": {"stepz": 1}}, "steps"),
        ({"method": "ft"}, "ft cannot be swept: it has no setting 'fact_token'"),
    ],
)
def test_what_makes_no_sweep(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        swept(tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()


def test_all_layers_and_tokens_unless_named_and_numbers_of_any_kind(tmp_path):
    live = model()
    run = sweep(
        live, RECORDS[:1], tmp_path / "s", layers=np.arange(1, 2), second_moment=identity(live), settings=SETTINGS
    )
    roles = ("subject_first", "subject_last", "after_subject", "last")
    assert [*run.edited] == [f"rome-layer=1,fact_token={role}" for role in roles]
    run = swept(tmp_path / "t", live, records=RECORDS[:1], layers=None, tokens=["last"])
    assert [results.settings["config"]["layer"] for results in run.edited.values()] == [0, 1, 2]


def test_a_sweep_goes_on_with_more_records_and_layers(whole, tmp_path):
    swept(tmp_path / "s", records=RECORDS[:2], layers=[0])
    swept(tmp_path / "s", layers=[0])
    swept(tmp_path / "s")
    assert lines_of(tmp_path / "s") == lines_of(whole)
    with pytest.raises(ConfigError, match="a run over 5 records, and 2 are asked for"):
        swept(tmp_path / "s", records=RECORDS[:2])
