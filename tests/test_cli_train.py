"""`errata train-editor` as a user has it: what it learns from, what is refused, and what is done with its editor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.atlas import records
from errata.data.counterfact import write_records
from errata.editors.hypernetworks import training
from errata.editors.hypernetworks.files import Trained
from errata.evaluation.results import Run
from helpers.command_line import refused

QUICK = ["--limit", "10", "--validation", "3", "--steps", "2", "--validate-every", "1", "--batch", "2"]
SMALL = {"mend": ["--set", "rank=4", "--set", "blocks=1"], "ke": ["--set", "hidden=4", "--set", "blocks=1"]}


pytestmark = pytest.mark.usefixtures("worlds_built_once")


def written(path: str, made) -> str:
    write_records(path, made)
    return path


@pytest.mark.parametrize(("method", "kind"), [("mend", "counterfact"), ("ke", "zsre"), ("mend", "text")])
def test_trained_it_is_an_editor_to_evaluate(errata, method, kind):
    command = ["train-editor", method, "--kind", kind, *QUICK, *SMALL[method], "--out", "trained"]
    done = errata(*command, "--picture", "losses.png", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["method"], told["steps"], told["ended"]) == (method, 2, "steps")
    assert Path("losses.png").stat().st_size > 5000
    trained = Trained.load(told["file"])
    assert trained.network.config.blocks == 1
    measured = errata(
        *("evaluate", "--limit", "1", "--no-generation", "--no-health", "--out", "run", "--json"),
        *("--editor", f"mine={method}:trained=trained", *(["--kind", "zsre"] if kind == "zsre" else [])),
    )
    assert measured.returncode == 0, measured.stderr
    run = Run.load("run")
    assert run.task.name == ("zsre" if kind == "zsre" else "counterfact")
    assert run.edited["mine"].by_case[0].error is None
    again = errata(*command)  # nothing is trained again
    assert again.returncode == 0
    assert "Ended after 2 steps (as many as were allowed)" in " ".join(again.stdout.split())
    assert f"--editor {method}:trained=trained" in " ".join(again.stdout.split())


def test_it_learns_from_a_file_and_not_from_what_it_is_measured_on(errata):
    made = records.records(16)
    data, test = written("lessons.json", made[4:]), written("test.json", made[:6])
    command = ["train-editor", "mend", "--data", data, *QUICK, *SMALL["mend"], "--out", "trained"]
    done = errata(*command, "--test", test)
    refused(done, "mend was trained on 2 of the 6 facts that it is to be measured on")
    assert not Path("trained").exists()
    assert errata(*command, "--test", test, "--allow-seen").returncode == 0
    evaluate = ["evaluate", "--data", test, "--no-generation", "--no-health", "--out", "run"]
    evaluate += ["--editor", "mend:trained=trained", "--json"]
    refused(errata(*evaluate), "facts that it is to be measured on")
    assert errata(*evaluate, "--allow-seen").returncode == 0


def test_it_learns_from_a_text(errata):
    texts = [" ".join(f"{r.rewrite.text} {r.rewrite.fact.object}." for r in records.records(16)[i:]) for i in range(8)]
    Path("text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    quick = ["--validation", "2", "--steps", "1", "--batch", "2"]
    done = errata("train-editor", "ke", "--data", "text.txt", *quick, *SMALL["ke"], "--out", "trained", "--json")
    assert done.returncode == 0, done.stderr
    assert Trained.load("trained/editor.safetensors").card["lessons"]["learnt"] == 6


def test_one_that_was_stopped_goes_on(errata, monkeypatch):
    command = ["train-editor", "mend", *QUICK, *SMALL["mend"]]
    assert errata(*command, "--out", "whole").returncode == 0
    step, stopped = training._Run.step, []

    def press(run):
        step(run)
        if run.done == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "step", press)
    done = errata(*command, "--out", "trained")
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr
    assert errata(*command, "--out", "trained").returncode == 0
    assert training.curve_of("trained") == training.curve_of("whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mend", "--set", "rank"], "is not a setting: write KEY=VALUE"),
        (["mend", "--set", "rnak=3"], "rank"),
        (["mend", "--set", "blocks=9"], "blocks = 9, and atlas has 8"),
        (["ke", "--set", "rank=3"], "rank"),
        (["mend", "--data", "none.json"], "none.json"),
        (["mend", "--data", "none.json", "--kind", "zsre"], "leave it out"),
        (["mend", "--skip", "10000"], "the first 10000 are left out: skip fewer"),
        (["mend", "--validation", "10"], "10 of them are for validation"),
        (["mend", "--picture", "losses.doc"], ".png"),
        (["mend", "--limit", "0"], "--limit"),
        (["rome"], "rome"),
    ],
)
def test_bad_input(errata, arguments, message):
    refused(errata("train-editor", *arguments[:1], *QUICK, *arguments[1:], "--out", "trained"), message)
    assert not Path("trained").exists()


def test_a_folder_of_something_else_is_left_alone(errata):
    Path("trained").mkdir()
    Path("trained/notes.txt").write_text("mine", encoding="utf-8")
    refused(errata("train-editor", "mend", *QUICK, *SMALL["mend"], "--out", "trained"), "holds other files")
    assert [path.name for path in Path("trained").iterdir()] == ["notes.txt"]


def test_the_kind_is_of_the_atlas_alone(errata):
    refused(errata("evaluate", "--kind", "zsre", "--data", "none.json", "--out", "run"), "shows by itself what it is")


def test_zsre_of_the_world_asks_of_other_facts_and_in_other_words():
    made = records.zsre_records(40)
    assert made[:10] == records.zsre_records(10)
    world = records.load_world()
    for record, twin in zip(made, records.records(40), strict=True):
        rewrite = record.rewrite
        assert (rewrite.text, rewrite.new_object) == (twin.rewrite.text, twin.rewrite.new_object)
        assert rewrite.fact.object == ""
        (paraphrase,), ((other, answer),) = record.paraphrase, record.locality
        assert paraphrase != rewrite.text
        assert rewrite.subject in paraphrase
        assert rewrite.subject not in other
        told = [f for f in world.facts if f.subject in other and f.object == answer]
        assert any(f.relation != twin.relation for f in told)
