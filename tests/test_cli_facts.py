"""`errata facts` as a user has it: what is kept, what is told, and what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from errata.base.facts import Fact
from errata.cli.facts import _tell_unknown
from errata.data.fact_table import FactRow, read_facts
from errata.metrics import knowledge
from errata.metrics.knowledge import Knowledge
from helpers.command_line import refused

WRONG = set(range(0, 30, 6))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Thirty facts of the atlas's world, five of them with another object; and those five as they are."""
    from errata.atlas.records import records

    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = []
    for i, record in enumerate(records(30)):
        rewrite = record.rewrite
        line = {"subject": rewrite.subject, "prompt": rewrite.prompt, "relation": record.relation, "name": f"f{i}"}
        if i in WRONG:
            lines.append({**line, "object": rewrite.new_object, "name": f"wrong{i}"})
        lines.append({**line, "object": rewrite.fact.object})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def run(errata):
    return lambda *arguments: errata("facts", *arguments)


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names_of_columns(run, tmp_path):
    (tmp_path / "a.csv").write_text("Subject,PROMPT,Answer\nRome,{} is in,Italy\n")
    done = run("a.csv", "--out", "b.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "b.jsonl").read_text())["object"] == "Italy"
    (tmp_path / "a.csv").write_text("Subject,PROMPT,Solution\nRome,{} is in,Italy\n")
    done = run("a.csv", "--out", "b.jsonl")
    assert "a.csv: columns that are not read: 'solution' (the nearest that is: 'relation')" in done.stderr
    (tmp_path / "a.csv").write_text("subject,prompt,objekt\nRome,{} is in,Italy\n")
    refused(run("a.csv", "--out", "b.jsonl"), "no column 'objekt', which is like 'object'")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_table_is_converted(run, table, tmp_path, ending):
    done = run(table, "--out", tmp_path / f"t.{ending}")
    assert done.returncode == 0, done.stderr
    assert "35 facts" in done.stdout
    before, after = (read_facts(path).rows for path in (table, tmp_path / f"t.{ending}"))
    assert [(r.fact, r.relation, r.name) for r in after] == [(r.fact, r.relation, r.name) for r in before]
    assert not done.stderr


def test_known_facts_are_kept(run, table, tmp_path):
    done = run(table, "--known", "--out", "known.tsv", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["facts"], said["known"], said["model"], said["bad"]) == (35, 30, "atlas", [])
    names = [row.name for row in read_facts(tmp_path / "known.tsv").rows]
    assert names == [f"f{i}" for i in range(30)]
    for verdict, row in zip(said["verdicts"], read_facts(table).rows, strict=True):
        assert verdict["line"] == row.line
        assert verdict["known"] == (not row.name.startswith("wrong"))
        assert verdict["named"] in verdict["continuation"]
    assert written(tmp_path) == ["known.tsv"]


BROKEN = """subject,prompt,object
Arthur Conan Doyle,The native language of {} is,English
Arthur Conan Doyle,The native language of {} is,English
,The native language of {} is,English
Roy Hargrove,The native language of {} is,
"""


def test_the_first_unknown_facts_are_shown_with_what_the_model_says(capsys):
    rows = [FactRow(n, Fact(f"S{n}", "{} is in", "Rome"), "", str(n)) for n in range(12)]
    cut = [Knowledge(row, "Oslo, where\nit", "Oslo", False) for row in rows]
    _tell_unknown(cut)
    shown = " ".join(capsys.readouterr().out.split())
    assert "S9 is in" in shown
    assert "S10 is in" not in shown
    assert "Oslo, where it" in shown
    assert "and 2 more: --json lists all" in shown
    _tell_unknown([])
    assert capsys.readouterr().out == ""


def test_bad_lines_are_named_and_the_others_used(run, tmp_path):
    (tmp_path / "t.csv").write_text(BROKEN + f"{'Roy ' * 400},The native language of {{}} is,English\n")
    done = run("t.csv")
    assert done.returncode == 1
    assert done.stdout == "3 facts in t.csv\n"
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["t.csv, line 3", "t.csv, line 4", "left out"]
    assert "the same fact as line 2" in lines[0]
    assert lines[2] == "left out: 2 of 5"

    done = run("t.csv", "--known", "--out", "known.csv", "--json")
    assert done.returncode == 1
    assert [each["line"] for each in json.loads(done.stdout)["bad"]] == [3, 4, 5, 6]
    assert "line 5: it has no object" in done.stderr
    assert "line 6: the text 'The native language of Roy Roy" in done.stderr
    assert [row.fact.object for row in read_facts(tmp_path / "known.csv").rows] == ["English"]

    refused(run("t.csv", "--strict", "--out", "strict.csv"), "t.csv, line 3: the same fact as line 2")
    assert written(tmp_path) == ["known.csv", "t.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "there is no file none.csv"),
        (["t.xlsx"], "t.xlsx"),
        (["t.csv", "--known"], "give --out"),
        (["t.csv", "--out", "t.json"], "its ending must be one of"),
        (["t.csv", "--out", "t.csv"], "--out is t.csv itself"),
        (["t.csv", "--out", "/proc/none/t.csv"], "cannot write"),
        (["t.csv", "--known", "--out", "o.csv", "--max-new-tokens", "0"], "max-new-tokens"),
        (["t.csv", "--known", "--out", "o.csv", "--model", "./no-such-folder"], "no-such-folder"),
        (["columns.csv"], "names no columns"),
        (["empty.csv"], "it is empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    (tmp_path / "t.csv").write_text("subject,prompt,object\nRome,{} is in,Italy\n")
    (tmp_path / "columns.csv").write_text("a,b\nc,d\n")
    (tmp_path / "empty.csv").write_text("")
    refused(run(*arguments), message)
    assert written(tmp_path) == ["columns.csv", "empty.csv", "t.csv"]


def test_bad_input_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "t.csv").write_text(BROKEN)
    code = (
        "import sys\n"
        "from errata.cli.app import main\n"
        "sys.argv = ['errata', 'facts', 't.csv', '--known', '--out', 'o.csv', '--strict']\n"
        "try: main()\n"
        "except SystemExit as left: assert left.code == 2, left.code\n"
        "assert 'torch' not in sys.modules, 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def asked(monkeypatch):
    """How many facts the model is asked for; set `stop` to interrupt it after so many."""
    real = knowledge.continuations

    class Asked:
        count = 0
        stop = 10**9

    def continuations(*arguments, **options):
        for each in real(*arguments, **options):
            if Asked.count == Asked.stop:
                raise KeyboardInterrupt
            Asked.count += 1
            yield each

    monkeypatch.setattr(knowledge, "continuations", continuations)
    return Asked


def test_interrupted_it_goes_on(run, table, tmp_path, asked):
    asked.stop = 20
    done = run(table, "--known", "--out", "known.csv")
    assert done.returncode == 130
    assert "20 of 35 facts are asked" in done.stderr
    assert "Traceback" not in done.stderr
    assert written(tmp_path) == ["known.csv.progress.jsonl"]

    asked.stop = 10**9
    refused(run(table, "--known", "--out", "known.csv", "--max-new-tokens", "5"), "max_new_tokens was 20, now is 5")
    assert asked.count == 20
    shown = run(table, "--known", "--out", "known.csv").stdout
    assert "atlas knows 30 of 35 facts" in shown
    assert "model names" in shown  # the five that it does not know, with its own answers
    assert "more: --json" not in shown
    assert asked.count == 35
    assert written(tmp_path) == ["known.csv"]
    assert len(read_facts(tmp_path / "known.csv").rows) == 30


def test_killed_it_goes_on(run, table, tmp_path, asked):
    command = [sys.executable, "-m", "errata.cli.app", "facts", table, "--known", "--out", "known.csv"]
    progress = tmp_path / "known.csv.progress.jsonl"
    process = subprocess.Popen([*command, "--batch-size", "1"], cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        ends = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < ends:
            if progress.exists() and progress.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.001)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    kept = progress.read_bytes().count(b"\n") - 1
    assert 3 <= kept < 35
    assert run(table, "--known", "--out", "known.csv").returncode == 0
    assert asked.count == 35 - kept
    assert written(tmp_path) == ["known.csv"]
    assert len(read_facts(tmp_path / "known.csv").rows) == 30
