"""`errata sweep` and `errata sequence`, as a user has them."""

from __future__ import annotations

import json
import signal

import pytest
import typer
from typer.testing import CliRunner

from errata.base.errors import ConfigError, ErrataError
from errata.cli import sweep
from errata.evaluation.results import Run
from errata.evaluation.sequence import SequenceScores, edits_folder
from errata.evaluation.setting_scores import SettingScores
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
    out, picture = tmp_path / "s", tmp_path / "s.png"
    command = ["sweep", "--out", out, "--limit", 2, "--layers", "4,7", "--identity", "--tokens", "subject_last,last"]
    done = errata(*command, "--picture", picture)
    assert "where S is highest" in " ".join(done.stdout.split())
    assert picture.stat().st_size > 10_000
    run = Run.load(out)
    assert [*run.edited] == [f"rome-layer={i},fact_token={t}" for i in (4, 7) for t in ("subject_last", "last")]
    found = SettingScores.of(run, "layer")
    said = json.loads(errata(*command, "--json").stdout)
    assert (said["records"], said["picture"], said["along"], said["at"]) == (2, None, "layer", [4, 7])
    assert said["lines"]["fact token subject_last"]["failures"] == [0, 2]
    last = said["lines"]["fact token last"]
    assert [one["mean"] for one in last["s"]] == [found.scores["s"]["fact token last", at].mean for at in (4.0, 7.0)]
    assert said["unedited"]["es"]["mean"] == found.unedited["es"].mean
    assert last["best"] == found.best("fact token last")
    assert max(one["mean"] for one in last["s"]) > said["unedited"]["s"]["mean"]
    command[command.index("--limit") + 1] = 3  # a finished sweep goes on with more
    more = json.loads(errata(*command, "--json").stdout)
    assert (more["records"], more["lines"]["fact token subject_last"]["failures"]) == (3, [0, 3])


def test_sweep_of_another_model_with_records_from_a_file(tmp_path, other):
    record = {
        "subject": "Rome",
        "prompt": "Where is Rome?",
        "target_new": "Paris",
        "rephrase_prompt": "In which city is Rome?",
        "locality_prompt": "Who is it?",
        "locality_ground_truth": "He",
    }
    records = [record, {**record, "target_new": ""}, {**record, "target_new": "city"}]
    (tmp_path / "r.json").write_text(json.dumps(records))
    command = ["sweep", "--model", "other", "--out", tmp_path / "s", "--data", tmp_path / "r.json", "--identity"]
    command += ["--editor", "rome:prefixes=none,steps=2", "--layers", "0-1", "--tokens", "last", "--json"]
    done = errata(*command, code=1)
    assert "r.json, entry 2: its target_new is empty" in done.stderr
    assert done.stderr.splitlines()[-1] == "left out: 1 of the file's entries"
    said = json.loads(done.stdout)
    assert (said["model"], said["records"], said["at"]) == ("other", 2, [0, 1])
    assert set(said["lines"]) == {"rome"}
    assert set(said["unedited"]) == {"efficacy", "paraphrase", "specificity"}
    run = Run.load(tmp_path / "s")
    assert (run.task.name, run.settings["records"]["source"]) == ("wikibigedit", "r.json")
    assert run.edited["rome-layer=1,fact_token=last"].settings["config"]["steps"] == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--picture", "s.txt"], "picture"),
        (["--layers", "x"], "--layers"),
        (["--layers", "7-8"], "unknown layer 8"),
        (["--tokens", "first"], "unknown token role 'first'"),
        (["--corpus", "c.txt"], "given twice, by --identity and --corpus"),
        (["--editor", "rome:layer=3"], "goes through values of 'layer'"),
        (["--editor", "rome:max_drift=3"], "max_drift has no effect here"),
        (["--editor", "rome:stepz=3"], "steps"),
        (["--editor", "kn"], "kn cannot be swept"),
    ],
)
def test_sweeps_that_are_none(tmp_path, monkeypatch, more, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErrataError, match=named):
        errata("sweep", "--identity", "--out", "s", *more)
    assert not list(tmp_path.iterdir())


def test_a_sweep_needs_records(tmp_path, other):
    with pytest.raises(ConfigError, match="there are no records for other"):
        errata("sweep", "--model", "other", "--out", tmp_path / "s", "--identity")


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

    put_on = sequence._put_on

    def pressed(*arguments):
        signal.raise_signal(signal.SIGINT)
        return put_on(*arguments)

    monkeypatch.setattr(sequence, "_put_on", pressed)
    save = tmp_path / "s.jsonl"
    done = errata("sequence", "--save", save, "--edits", 2, "--untouched", 5, "--identity", code=130)
    assert "1 of 2 edits are there, and the same command goes on" in done.stderr
    assert len(SequenceScores.load(save).edits) == 2
