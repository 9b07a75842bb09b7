"""Edits one after the other: what is measured, what is kept, and that a killed run goes on from the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.base.facts import Fact
from errata.editors.rome import RomeConfig, rome
from errata.edits.edit import Edit
from errata.evaluation import sequence
from errata.evaluation.sequence import SequenceScores, edit_in_sequence, edits_folder, recalled
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.statistics import SecondMoment
from tiny import byte_tokenizer, tiny

SUBJECTS = ("Rome", "The Space Needle", "Dante", "Oslo", "Beethoven")
# Edited at the last token: what a random decoder says hardly depends on earlier ones.
WORDS = ("Paris", "French", "founder", "located", "the")  # tokens of the tokenizer
REWRITES = [Fact(subject, "{} is").rewrite(new) for subject, new in zip(SUBJECTS, WORDS, strict=True)]
CONFIG = RomeConfig(fact_token="last", prefixes="none", steps=25, weight_decay=0.0, kl_factor=0.0, clamp=None)

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_sequence as t
print("ready", flush=True)
t.run(sys.argv[1], progress=lambda done, of: time.sleep(0.15))
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0):
    return load_pretrained((tiny("gpt2", layers=3, seed=seed), byte_tokenizer()), name="tiny")


def facts(live):
    """Facts that the model recalls as long as it is not edited, one at least, and three that it does not."""
    texts = [f"{one}{two} was" for one in "ABCDEFGHIJ" for two in "abcdefghij"]
    said = {text.split()[0]: live.complete(text, 1)[len(text) :] for text in texts}
    known = [Fact(subject, "{} was", word) for subject, word in said.items() if word in (" is", " in", " of", " was")]
    assert known
    return known + [Fact(subject, "{} was", "Paris") for subject in ("Oslo", "Bern", "Milan")]


def run(path, live=None, rewrites=REWRITES, watched=None, **changes):
    live = live or model()
    settings = {"second_moment": SecondMoment.identity(live.d_mlp), "layer": 1, "every": 2, **changes}
    config = settings.pop("config", CONFIG)
    return edit_in_sequence(live, rewrites, facts(live) if watched is None else watched, path, config, **settings)


def files(path) -> dict[str, bytes]:
    """The file and the edits of a run."""
    return {"": path.read_bytes(), **{each.name: each.read_bytes() for each in sorted(edits_folder(path).iterdir())}}


def copied(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "s.jsonl"
    shutil.copy(whole, path)
    shutil.copytree(edits_folder(whole), edits_folder(path))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The files of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "s.jsonl"
    torch.set_num_threads(1)
    run(path)
    return path


def test_it_is_rome_on_top_of_rome_and_undone_at_the_end(tmp_path):
    live, twin = model(), model()
    before = weights_digest(live.hf)
    found = run(tmp_path / "s.jsonl", live, every=1)
    assert weights_digest(live.hf) == before
    assert not live.applied
    config = RomeConfig(**{**CONFIG.model_dump(), "layer": 1, "max_drift": None})
    wanted = [Fact(each.subject, each.prompt, each.new_object) for each in REWRITES]
    watched, recall = facts(live), []
    assert found.untouched[0] == np.mean(recalled(twin, watched))
    assert np.isnan([found.edited[0], found.newest[0]]).all()
    for number, rewrite in enumerate(REWRITES, 1):
        edit = rome(twin, rewrite, config, second_moment=SecondMoment.identity(twin.d_mlp))
        kept = Edit.load(edits_folder(tmp_path / "s.jsonl") / f"{number:04d}.safetensors")
        assert torch.equal(edit.deltas[0].matrix(), kept.deltas[0].matrix())
        assert edit.fingerprints == kept.fingerprints
        edit.apply(twin)
        recall.append(recalled(twin, [wanted[number - 1]])[0])
        assert found.edited[number] == pytest.approx(np.mean(recalled(twin, wanted[:number])))
        assert found.untouched[number] == pytest.approx(np.mean(recalled(twin, watched)))
        assert found.newest[number] == pytest.approx(np.mean(recall))
    assert recall.count(True) > 0
    assert found.untouched[0] > found.untouched[-1]  # what is measured moves
    assert found.edits.tolist() == [0, 1, 2, 3, 4, 5]


def test_recalled_is_what_a_model_says_greedily():
    live = model()
    assert recalled(live, facts(live))[-4:] == [True, False, False, False]


def test_measured_every_so_often_and_at_the_end(whole):
    found = SequenceScores.load(whole)
    assert found.edits.tolist() == [0, 2, 4, 5]
    assert found.edited.shape == found.newest.shape == found.untouched.shape == (4,)


def test_the_newest_are_ten_at_most(whole, monkeypatch):
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    yes = [line["recalled"] for line in lines[1:]]
    monkeypatch.setattr(sequence, "NEWEST", 2)
    newest = SequenceScores.load(whole).newest
    assert newest[1:].tolist() == [np.mean(yes[n - 1 : n + 1]) for n in (2, 4, 5)]


def test_kept_edits_go_on_a_model_in_their_order(whole):
    live = model()
    with contextlib.ExitStack() as stack:
        for path in sorted(edits_folder(whole).iterdir()):
            stack.enter_context(Edit.load(path).applied(live))
        wanted = [Fact(each.subject, each.prompt, each.new_object) for each in REWRITES]
        assert SequenceScores.load(whole).edited[-1] == pytest.approx(np.mean(recalled(live, wanted)))


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.8, 0.999])
def test_files_cut_anywhere_are_completed_byte_for_byte(whole, tmp_path, cut):
    path = copied(whole, tmp_path)
    content = whole.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    run(path)
    assert files(path) == files(whole)


def test_killed_at_a_random_moment_and_resumed_it_is_the_same_byte_for_byte(whole, tmp_path):
    path = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    time.sleep(random.uniform(0.2, 0.6))
    process.kill()
    process.communicate()
    run(path)
    assert files(path) == files(whole)


def test_what_is_there_is_not_made_again(whole, tmp_path, monkeypatch):
    path = copied(whole, tmp_path)
    monkeypatch.setattr(sequence, "_put_on", lambda *a, **k: pytest.fail("edited again"))
    done = []
    found = run(path, progress=lambda *each: done.append(each))
    assert done == [(5, 5)]
    np.testing.assert_array_equal(found.edited, SequenceScores.load(whole).edited)
    assert files(path) == files(whole)


def test_ctrl_c_ends_after_the_edit_under_way_and_takes_all_off(whole, tmp_path):
    live, path = model(), tmp_path / "s.jsonl"
    weights = weights_digest(live.hf)
    with pytest.raises(KeyboardInterrupt):
        run(path, live, progress=lambda done, of: done == 3 and signal.raise_signal(signal.SIGINT))
    assert weights_digest(live.hf) == weights
    assert SequenceScores.load(path).edits.tolist() == [0, 2]
    run(path, live)
    assert files(path) == files(whole)


@pytest.mark.parametrize("harm", ["missing", "other", "torn"])
def test_edits_that_are_not_as_they_were(whole, tmp_path, harm):
    path = copied(whole, tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    second = edits_folder(path) / "0002.safetensors"
    if harm == "missing":
        second.unlink()
    elif harm == "other":
        shutil.copy(edits_folder(path) / "0001.safetensors", second)
    else:
        second.write_bytes(second.read_bytes()[:-4])
    live = model()
    weights = weights_digest(live.hf)
    with pytest.raises(ResultFileError, match=r"0002\.safetensors"):
        run(path, live)
    assert weights_digest(live.hf) == weights


def test_an_edit_that_cannot_be_made_is_told_and_the_others_are(tmp_path):
    long = Fact("Rome " * 20, "{} is in").rewrite("f")
    live = model()
    config = RomeConfig(**{**CONFIG.model_dump(), "prefixes": ("x" * (live.max_length - 60),)})
    found = run(tmp_path / "s.jsonl", live, [REWRITES[0], long, REWRITES[1]], config=config)
    ((number, reason),) = found.refused
    assert number == 2
    assert "reads at most" in reason
    assert [each.name for each in sorted(edits_folder(tmp_path / "s.jsonl").iterdir())] == [
        "0001.safetensors",
        "0003.safetensors",
    ]
    assert found.edits.tolist() == [0, 2, 3]
    again = run(tmp_path / "s.jsonl", live, [REWRITES[0], long, REWRITES[1]], config=config)
    assert again.refused == found.refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"every": 1}, "every"),
        ({"layer": 0}, "config.layer"),
        ({"rewrites": REWRITES[1:]}, "rewrites"),
        ({"rewrites": REWRITES[::-1]}, "facts"),
        ({"watched": [Fact("Bern", "{} was", "a")]}, "untouched"),
        ({"second_moment": SecondMoment(2 * torch.eye(24, dtype=torch.float64), 1, 1)}, "second_moment"),
    ],
)
def test_another_run_is_not_appended(whole, tmp_path, change, named):
    path = copied(whole, tmp_path)
    with pytest.raises(ResultFileError, match=named):
        run(path, **change)
    assert files(path) == files(whole)


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (2, {"edits": 3}),
        (2, {"edit": None}),
        (2, {"recalled": None}),
        (1, {"recalled": True}),
        (3, {"lost": [2]}),
        (3, {"lost": None}),
        (2, {"lost": [0]}),
        (3, {"untouched_lost": [6]}),
    ],
)
def test_records_changed_by_hand_are_refused(whole, tmp_path, number, change):
    path = copied(whole, tmp_path)
    lines = whole.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultFileError, match="changed by hand"):
        run(path)
    with pytest.raises(ResultFileError, match="changed by hand"):
        SequenceScores.load(path)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"rewrites": []}, ConfigError, "0 rewrites"),
        ({"watched": []}, ConfigError, "0 untouched"),
        ({"every": 0}, ConfigError, "every 0"),
        ({"layer": None}, ConfigError, "needs the setting 'layer'"),
        ({"layer": 3}, ConfigError, "layer"),
        ({"watched": [Fact("Rome", "{} is in")]}, FactError, "target is empty"),
    ],
)
def test_what_makes_no_run(tmp_path, change, error, named):
    with pytest.raises(error, match=named):
        run(tmp_path / "s.jsonl", **change)
    assert not (tmp_path / "s.jsonl").exists()


def test_settings_that_allow_of_no_edit(tmp_path):
    live = model()
    weights = weights_digest(live.hf)
    with pytest.raises(ConfigError, match="reaches no prediction"):
        run(
            tmp_path / "s.jsonl",
            live,
            layer=2,
            config=RomeConfig(**{**CONFIG.model_dump(), "fact_token": "subject_last"}),
        )
    assert weights_digest(live.hf) == weights


def test_a_run_goes_on_with_more_rewrites_and_not_with_fewer(tmp_path):
    path = tmp_path / "s.jsonl"
    run(path, rewrites=REWRITES[:3])
    begun = files(path)
    found = run(path)
    assert found.edits.tolist() == [0, 2, 3, 4, 5]
    again = files(path)
    assert again[""].startswith(begun[""])
    at_once = tmp_path / "at-once.jsonl"
    whole = run(at_once)
    assert {**files(at_once), "": b""} == {**again, "": b""}  # the very same edits
    assert found.edited.tolist()[-1:] == whole.edited.tolist()[-1:]
    np.testing.assert_array_equal(SequenceScores.load(path).untouched, found.untouched)
    for fewer in (REWRITES[:4], REWRITES[:3]):
        with pytest.raises(ConfigError, match=f"a run over 5 edits, and {len(fewer)} are asked for"):
            run(path, rewrites=fewer)
    with pytest.raises(ResultFileError, match=r"edit 4 of .* is of another rewrite"):
        run(path, rewrites=[*REWRITES[:3], *REWRITES[:2]])
    assert files(path) == again


@pytest.mark.parametrize("kept", ["joint", "apart"])
def test_an_edit_keeps_what_is_written_of_its_subject_unless_told_otherwise(tmp_path, kept):
    of_one = [Fact("Dante", prompt).rewrite(word) for prompt, word in (("{} is", "Paris"), ("{} was", "founder"))]
    config = RomeConfig(**{**CONFIG.model_dump(), "fact_token": "subject_last", "same_subject": kept})
    run(tmp_path / "s.jsonl", rewrites=of_one, config=config)
    twin = model()
    config = RomeConfig(**{**config.model_dump(), "layer": 1, "max_drift": None})
    for number, rewrite in enumerate(of_one, 1):
        edit = rome(twin, rewrite, config, second_moment=SecondMoment.identity(twin.d_mlp))
        stored = Edit.load(edits_folder(tmp_path / "s.jsonl") / f"{number:04d}.safetensors")
        assert torch.equal(edit.deltas[0].matrix(), stored.deltas[0].matrix())
        edit.apply(twin)
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["config"]["same_subject"] == kept
