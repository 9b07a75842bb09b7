"""`errata sweep` and `errata sequence`, as a user has them."""

from __future__ import annotations

import json
import signal

import pytest
import typer
from typer.testing import CliRunner

from errata.base.errors import ConfigError, ErrataError
from errata.cli import sweep
from errata.evaluation.sequence import SequenceScores, edits_folder
from errata.evaluation.sites import SiteScores
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from tiny import byte_tokenizer, tiny

app = typer.Typer()
app.command("sweep")(sweep.sweep)
app.command("sequence")(sweep.sequence)


def errata(*arguments, code: int = 0):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(done.exception, Exception):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def other(monkeypatch):
    """Another model than the atlas, by the name "other"."""
    live = load_pretrained((tiny("gpt2", layers=3), byte_tokenizer()), name="other")
    monkeypatch.setattr("errata.cli.options.load", lambda *settings: live)
    return live


def test_sweep_on_the_atlas(tmp_path):
    command = ["sweep", "--save", tmp_path / "s.jsonl", "--records", 2, "--layers", "4,7", "--identity"]
    command += ["--tokens", "subject_last,last"]
    done = errata(*command, "--out", tmp_path / "s.png")
    assert "Edits do best at" in done.stdout
    assert "2 edits could not be made" in done.stdout
    assert (tmp_path / "s.png").stat().st_size > 10_000
    found = SiteScores.load(tmp_path / "s.jsonl")
    assert found.layers == (4, 7)
    said = json.loads(errata(*command, "--json").stdout)
    assert (said["records"], said["picture"], said["layers"]) == (2, None, [4, 7])
    assert said["sites"]["subject_last"]["impossible"] == [0, 2]
    assert said["sites"]["last"]["s"]["mean"] == found.mean["s"][1].tolist()
    assert said["unedited"]["es"]["mean"] == found.unedited["es"].mean
    assert said["best"]["s"] == found.best()[2] > said["unedited"]["s"]["mean"]
    command[command.index("--records") + 1] = 3  # a finished sweep goes on with more
    more = json.loads(errata(*command, "--json").stdout)
    assert (more["records"], more["sites"]["subject_last"]["impossible"]) == (3, [0, 3])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--save", "s.json"], "must be one of .jsonl"),
        (["--save", "s.jsonl", "--out", "s.txt"], "picture"),
        (["--save", "s.jsonl", "--layers", "x"], "--layers"),
        (["--save", "s.jsonl", "--layers", "7-8"], "no layer 8"),
        (["--save", "s.jsonl", "--tokens", "first"], "no token 'first'"),
        (["--save", "s.jsonl", "--identity", "--corpus", "c.txt"], "given twice, by --identity and --corpus"),
    ],
)
def test_sweeps_that_are_none(tmp_path, monkeypatch, more, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErrataError, match=named):
        errata("sweep", "--identity", *more)
    assert not list(tmp_path.iterdir())


def test_a_sweep_needs_records(tmp_path, other):
    with pytest.raises(ConfigError, match="none yet for other"):
        errata("sweep", "--model", "other", "--save", tmp_path / "s.jsonl", "--identity")


def test_sequence_on_the_atlas(tmp_path):
    save = tmp_path / "s.jsonl"
    command = ["sequence", "--save", save, "--edits", 3, "--untouched", 20, "--every", 2, "--identity"]
    done = errata(*command, "--out", tmp_path / "s.svg")
    assert "20 untouched" in " ".join(done.stdout.split())
    assert (tmp_path / "s.svg").stat().st_size > 10_000
    assert len(list(edits_folder(save).iterdir())) == 3
    said = json.loads(errata(*command, "--json").stdout)
    assert said["edits"] == [0, 2, 3]
    assert said["recalled"]["edited"][0] is None
    assert said["recalled"]["untouched"][0] == 1.0  # those that it knows are watched
    assert said["recalled"]["edited"][1:] == SequenceScores.load(save).edited[1:].tolist()
    command[command.index("--edits") + 1] = 4  # a finished run goes on with more
    more = json.loads(errata(*command, "--json").stdout)
    assert more["edits"] == [0, 2, 3, 4]
    assert more["recalled"]["untouched"][:3] == said["recalled"]["untouched"]


def tables(tmp_path, live):
    """Requests and facts of another model: of the facts it knows one."""
    said = live.complete("Oslo was", 1)[len("Oslo was") :].strip() or "x"
    requests = [{"subject": s, "prompt": "{} is in", "to": to} for s, to in (("Rome", "a"), ("Rome", "b"), ("", "c"))]
    facts = [("Oslo", said), ("Oslo", "zzz"), ("Rome", said), ("Bern", "")]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, requests)))
    (tmp_path / "f.csv").write_text("subject,prompt,object\n" + "\n".join(f"{s},{{}} was,{o}" for s, o in facts))
    return ["--requests", tmp_path / "r.jsonl", "--facts", tmp_path / "f.csv"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the requests contradict each other, on purpose
def test_sequence_from_tables(tmp_path, other, monkeypatch):
    weights = weights_digest(other.hf)
    monkeypatch.setattr("errata.evaluation.sequence.recalled", lambda model, facts: [f.object != "zzz" for f in facts])
    save = tmp_path / "s.jsonl"
    command = ["sequence", "--model", "other", *tables(tmp_path, other), "--save", save, "--layer", 1, "--identity"]
    done = errata(*command, "--json", code=1)
    assert json.loads(done.stdout)["edits"] == [0, 1, 2]
    assert SequenceScores.load(save).settings["untouched"] == 1
    told = done.stderr.splitlines()
    assert "r.jsonl, line 3: the subject is empty" in told[0]
    assert "'Rome is in' is to have several answers" in told[1]
    assert "lines 1 (a), 2 (b)" in told[1]
    assert "f.csv, line 5: it has no object" in told[2]
    assert told[-1] == "left out: 2 lines"
    assert weights_digest(other.hf) == weights


def test_other_models_need_tables(tmp_path, other):
    requests = tables(tmp_path, other)[:2]
    with pytest.raises(ConfigError, match="--requests and --facts"):
        errata("sequence", "--model", "other", *requests, "--save", tmp_path / "s.jsonl", "--identity")


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    from errata.evaluation import sequence

    rome = sequence.rome

    def pressed(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return rome(*arguments, **settings)

    monkeypatch.setattr(sequence, "rome", pressed)
    save = tmp_path / "s.jsonl"
    done = errata("sequence", "--save", save, "--edits", 2, "--untouched", 5, "--identity", code=130)
    assert "1 of 2 edits are there, and the same command goes on" in done.stderr
    assert len(SequenceScores.load(save).edits) == 2
