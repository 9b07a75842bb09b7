"""`errata report`, as a user has it."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from errata.base.errors import ConfigError, OutputError, ResultFileError
from errata.cli.app import app
from made_runs import counterfact_records, counterfact_result, counterfact_run, write_run, zsre_run

LONG = "ft-l-layer=2,epsilon=0.0005"


def errata(*arguments):
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if isinstance(done.exception, Exception):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def run(tmp_path):
    return counterfact_run(tmp_path / "run", 20)


def test_a_table_on_the_terminal(run):
    said = errata(run, "--compare", "rome", "ft")
    for text in ("CounterFact: gpt2-xl", "ROME, paper", "89.2", "rome − ft", "s / record", "the unedited model's"):
        assert text in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 160])
def test_an_interval_stands_beside_its_number(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    names = ("rome", LONG)
    records = counterfact_records(20)
    results = {name: [counterfact_result(r, "rome") for r in records] for name in ("unedited", *names)}
    said = errata(write_run(tmp_path / "run", records, results, "mine"), "--compare", *names)
    rows = [line.split() for line in said.splitlines() if line.startswith((" unedited ", " rome ", " ft-l#2 "))]
    assert max(map(len, said.splitlines())) <= width
    # The nine columns of the paper go on below where there is no room for them.
    intervals = [sum(cell.startswith("±") for cell in row) for row in rows if row[0] == "unedited"]
    assert intervals == ([5, 4, 3, 0] if width == 80 else [9, 3])
    for row in rows:
        for number, interval in itertools.pairwise(row[1:]):
            assert not interval.startswith("±") or re.fullmatch(r"−?[\d.]+[*!]*", number)
    tables, legend = said.split("S, harmonic", 1)
    assert "ft-l#2" in tables
    assert LONG not in tables.replace("\n", "")
    assert f"ft-l#2 is {LONG}." in " ".join(legend.split())


@pytest.mark.parametrize(
    ("ending", "begins"),
    [("txt", "CounterFact: gpt2-xl"), ("md", "**CounterFact"), ("tex", "% \\usepackage"), ("csv", "run,model,row")],
)
def test_a_file_is_what_its_ending_says(run, tmp_path, ending, begins):
    out = tmp_path / "new" / f"t.{ending}"
    assert "written:" in errata(run, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert text.startswith(begins)
    assert "\x1b" not in text


def test_json_and_options(run):
    said = json.loads(errata(run, "--format", "json", "--interval", "bootstrap", "--probability", "total"))
    assert (said["interval"], said["probability"]) == ("bootstrap", "total")
    assert [row["name"] for row in said["rows"]] == ["unedited", "unedited", "rome", "ROME", "ft", "FT"]
    assert json.loads(errata(run, "--format", "json", "--interval", "bootstrap", "--seed", 1)) != said


def test_a_page(run, tmp_path):
    pytest.importorskip("jinja2")
    assert "p.html" in errata(run, "--page", tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(errata(run, "--page", tmp_path / "q.html", "--format", "json"))["kind"] == "counterfact"


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (("--out", "t.pdf"), ConfigError, "one of .txt, .md, .tex, .csv, .json"),
        (("--out", "t.md", "--format", "latex"), ConfigError, "says markdown"),
        (("--page", "p.htm"), ConfigError, "one of .html"),
        (("--compare", "rome", "mend"), ConfigError, "no row 'mend'"),
    ],
)
def test_what_cannot_be_done(run, tmp_path, monkeypatch, more, error, message):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        errata(run, *more)
    assert set(tmp_path.iterdir()) == before


def test_folders_that_are_no_runs(run, tmp_path):
    with pytest.raises(ResultFileError, match="not a run folder"):
        errata(tmp_path)
    with pytest.raises(ConfigError, match="report each by itself"):
        errata(run, zsre_run(tmp_path / "z"))
    with pytest.raises(OutputError):
        errata(run, "--out", run / "records.json" / "t.md")


def test_help_and_the_command_load_no_torch_before_they_must():
    code = "import sys, errata.cli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
