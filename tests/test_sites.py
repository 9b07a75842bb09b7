"""Edits at every layer and token: what is scored, what is kept, what a kill costs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from errata.base.errors import ConfigError, FactError, ResultFileError, StaleStatistics
from errata.base.facts import Fact
from errata.benchmarks.records import Record
from errata.editors.rome import RomeConfig, rome
from errata.evaluation import sites
from errata.evaluation.sites import METRICS, SiteScores, sweep_sites
from errata.metrics.counterfact import score_record, summarise
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.statistics import SecondMoment
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
CONFIG = RomeConfig(prefixes="none", steps=4, weight_decay=0.0, kl_factor=0.0, clamp=None)
SETTINGS = {"layers": [0, 2], "tokens": ["subject_last", "last"]}
SITES = 4

# The same run, in a process of its own, that can be killed.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_sites as t
print("ready", flush=True)
t.sites._TOGETHER = 2
t.swept(sys.argv[1], progress=lambda done, of: time.sleep(0.15))
"""


@pytest.fixture(autouse=True)
def _in_twos(monkeypatch):
    monkeypatch.setattr(sites, "_TOGETHER", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0):
    return load_pretrained((tiny("gpt2", layers=3, seed=seed), byte_tokenizer()), name="tiny")


def identity(live):
    return lambda layer: SecondMoment.identity(live.d_mlp)


def swept(path, live=None, records=RECORDS, config=CONFIG, second_moments=None, **changes):
    live = live or model()
    return sweep_sites(
        live, records, path, config, second_moments=second_moments or identity(live), **{**SETTINGS, **changes}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The file of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "sites.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_TOGETHER", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        swept(path)
        torch.set_num_threads(threads)
    return path


def test_scores_are_those_of_edits_made_put_on_and_taken_off_one_by_one(tmp_path):
    live = load_pretrained((tiny("gpt2", layers=3, dtype=torch.float64), byte_tokenizer()), name="tiny")
    before = weights_digest(live.hf)
    found = swept(tmp_path / "s", live)
    assert weights_digest(live.hf) == before
    assert found.unedited["es"] == summarise([score_record(live, record) for record in RECORDS])["es"]
    for row, token in enumerate(SETTINGS["tokens"]):
        config = RomeConfig(**{**CONFIG.model_dump(), "layer": 0, "fact_token": token, "max_drift": None})
        scores = []
        for record in RECORDS:
            with rome(live, record.rewrite, config, second_moment=identity(live)(0)).applied(live):
                scores.append(score_record(live, record))
        means = summarise(scores)
        for name in ("es", "ps", "ns"):
            assert found.mean[name][row, 0] == means[name].mean
            assert found.interval[name][row, 0] == pytest.approx(means[name].half)
        assert found.mean["s"][row, 0] == pytest.approx(means["s"].mean)
    lines = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert max(line["scores"]["em"] for line in lines[1:] if line.get("token") == "last") > 0  # edits do something


def test_what_cannot_be_edited_counts_as_unedited_and_says_why(whole):
    found = SiteScores.load(whole)
    assert found.impossible.tolist() == [[0, len(RECORDS)], [0, 0]]
    ((reason, count),) = found.reasons.items()
    assert count == len(RECORDS)
    assert "reaches no prediction" in reason
    for name in METRICS:
        assert found.mean[name][0, 1] == pytest.approx(found.unedited[name].mean)
    assert (found.counts == len(RECORDS)).all()


def test_a_record_without_the_token_is_no_obstacle(tmp_path):
    ends = Record(1, "", Fact("Rome", "They live in {}", "a").rewrite("b"), (), (), (), ())
    found = swept(tmp_path / "s", records=[RECORDS[0], ends], layers=[0], tokens=["subject_first_after"])
    assert found.impossible.tolist() == [[1]]
    assert found.counts.tolist() == [[2]]
    (reason,) = found.reasons
    assert "ends the prompt" in reason


def test_the_file_alone_gives_the_same(whole, tmp_path):
    path = tmp_path / "s"
    path.write_bytes(whole.read_bytes())
    again, loaded = swept(path), SiteScores.load(whole)
    for name in METRICS:
        np.testing.assert_array_equal(again.mean[name], loaded.mean[name])
        np.testing.assert_array_equal(again.interval[name], loaded.interval[name])
    assert (again.best(), again.unedited, again.reasons) == (loaded.best(), loaded.unedited, loaded.reasons)
    assert (loaded.layers, loaded.tokens, loaded.model) == ((0, 2), ("subject_last", "last"), "tiny")


def test_what_is_there_is_not_made_again(whole, tmp_path, monkeypatch):
    path = tmp_path / "s"
    path.write_bytes(whole.read_bytes())
    monkeypatch.setattr(sites, "rome", lambda *a, **k: pytest.fail("edited again"))
    done = []
    swept(path, second_moments=lambda layer: pytest.fail("asked for"), progress=lambda *each: done.append(each))
    assert done == [(SITES * len(RECORDS),) * 2]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [0.1, 0.35, 0.5, 0.62, 0.77, 0.999])
def test_a_file_cut_anywhere_is_completed_byte_for_byte(whole, tmp_path, cut):
    path = tmp_path / "s"
    content = whole.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    swept(path)
    assert path.read_bytes() == content


def test_killed_at_a_random_moment_and_resumed_it_is_the_same_byte_for_byte(whole, tmp_path):
    path = tmp_path / "s"
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    time.sleep(random.uniform(0.2, 0.6))
    process.kill()
    process.communicate()
    swept(path)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"layers": [0]}, "layers"),
        ({"tokens": ["last", "subject_last"]}, "tokens"),
        ({"config": RomeConfig(**{**CONFIG.model_dump(), "steps": 5})}, "config.steps"),
        ({"records": RECORDS[1:]}, "cases"),
        ({"records": [*RECORDS[:4], Record(40, "", RECORDS[0].rewrite, (), (), (), ())]}, "records"),
        ({"live": 1}, "weights of the model"),
    ],
)
def test_another_run_is_not_appended(whole, tmp_path, change, named):
    path = tmp_path / "s"
    path.write_bytes(whole.read_bytes())
    if "live" in change:
        change = {"live": model(change["live"])}
    with pytest.raises(ResultFileError, match=named):
        swept(path, **change)
    assert path.read_bytes() == whole.read_bytes()


def test_the_layer_and_token_of_the_settings_do_not_matter(whole, tmp_path):
    path = tmp_path / "s"
    path.write_bytes(whole.read_bytes())
    swept(path, config=RomeConfig(**{**CONFIG.model_dump(), "layer": 1, "fact_token": "last"}))
    assert path.read_bytes() == whole.read_bytes()


def test_another_second_moment_is_another_run(whole, tmp_path):
    path = tmp_path / "s"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:9]))
    live = model()
    other = SecondMoment(2 * torch.eye(live.d_mlp, dtype=torch.float64), 1, 0)
    with pytest.raises(ResultFileError, match="another second moment of layer 0"):
        swept(path, live, second_moments=lambda layer: other)


def test_a_second_moment_that_does_not_fit_leaves_no_trace(whole, tmp_path):
    live = model()
    with pytest.raises(StaleStatistics):
        swept(tmp_path / "s", live, second_moments=lambda layer: SecondMoment.identity(3))
    swept(tmp_path / "s", live)
    assert (tmp_path / "s").read_bytes() == whole.read_bytes()


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
    found = SiteScores.load(tmp_path / "s")
    assert found.counts.tolist() == [[4, 0], [0, 0]]
    assert np.isnan(found.mean["s"][1]).all()
    swept(tmp_path / "s", live)
    assert (tmp_path / "s").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (3, {"case": 11}),
        (3, {"case": 0}),
        (3, {"scores": None}),
        (3, {"scores": {"es": 1.0}}),
        (3, {"layer": 0}),
        (6, {"second_moment": None}),
        (9, {"layer": 1}),
        (9, {"token": "first"}),
        (9, {"token": None}),
        (9, {"scores": None}),
        (9, {"scores": {**dict.fromkeys(("es", "em", "ps", "pm", "ns", "nm"), 0.5), "em": "x"}}),
    ],
)
def test_records_changed_by_hand_are_refused(whole, tmp_path, number, change):
    path = tmp_path / "s"
    lines = whole.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultFileError, match="changed by hand"):
        swept(path)
    with pytest.raises(ResultFileError, match="changed by hand"):
        SiteScores.load(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"records": []}, "no case"),
        ({"layers": []}, "no layer"),
        ({"layers": [3]}, "no layer 3"),
        ({"layers": [1, 0, 1]}, "layer 1 is there twice"),
        ({"tokens": ["first"]}, "no token 'first'"),
        ({"records": [RECORDS[0], RECORDS[0]]}, "case 0 is there twice"),
    ],
)
def test_what_makes_no_sweep(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        swept(tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()


def test_a_record_that_cannot_be_scored_is_named(tmp_path):
    record = Record(7, "", Fact("Rome " * 200, "{} is in", "a").rewrite("b"), (), (), (), ())
    with pytest.raises(FactError, match="case 7"):
        swept(tmp_path / "s", records=[RECORDS[0], record])


def test_all_layers_and_tokens_unless_named_and_numbers_of_any_kind(tmp_path):
    found = swept(tmp_path / "s", records=RECORDS[:1], layers=np.arange(1, 2), tokens=None)
    assert found.layers == (1,)
    assert found.tokens == ("subject_first", "subject_last", "subject_first_after", "last")
    assert swept(tmp_path / "t", records=RECORDS[:1], layers=None, tokens=["last"]).layers == (0, 1, 2)


def test_a_sweep_goes_on_with_more_records_and_not_with_fewer(whole, tmp_path):
    path = tmp_path / "s"
    swept(path, records=RECORDS[:2])
    begun = path.read_bytes()
    found = swept(path)
    again, at_once = path.read_bytes(), SiteScores.load(whole)
    assert again.startswith(begun)
    for name in METRICS:
        np.testing.assert_array_equal(found.mean[name], at_once.mean[name])
        np.testing.assert_array_equal(SiteScores.load(path).mean[name], at_once.mean[name])
    assert found.unedited == at_once.unedited
    assert found.settings["cases"] == at_once.settings["cases"]
    for fewer in (RECORDS[:4], RECORDS[:2]):
        with pytest.raises(ConfigError, match=f"a run over 5 records, and {len(fewer)} are asked for"):
            swept(path, records=fewer)
    other = Record(40, "", RECORDS[0].rewrite, (), (), (), ())
    with pytest.raises(ResultFileError, match=r"case 40 of .* is another record"):
        swept(path, records=[*RECORDS[:4], other])
    assert path.read_bytes() == again
