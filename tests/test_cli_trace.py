"""`errata trace`, `average`, `figure` and `gradients` as a user has them: what is told, kept and drawn."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from errata.atlas.records import records
from errata.cli import show
from errata.cli.trace import trace as command
from errata.tracing import many
from errata.tracing.average import AverageEffects, average_effects
from errata.tracing.config import TraceConfig
from errata.tracing.result import ROLES, load_traces, save_traces
from errata.tracing.sweep import PARTS as ALL_PARTS
from helpers.command_line import FACT, refused

DOYLE = {"subject": FACT[1], "prompt": FACT[3], "object": "English"}
FACTS = [
    DOYLE,
    {"subject": "Roy Hargrove", "prompt": "The native language of {} is", "object": "Dutch"},
    *(
        {"subject": r.rewrite.subject, "prompt": r.rewrite.prompt, "object": r.rewrite.fact.object}
        for r in records(30)[3:6]  # of different lengths
    ),
]
PARTS = "state,severed_mlp,severed_attention"
QUICK = ["--samples", "1"]
KEPT = ["--unknown", "--min-effect", "-1"]


@pytest.fixture
def run(errata, tmp_path):
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)) + "\n")
    return errata


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A file of traces of all facts and parts."""
    from errata.api import load_model
    from errata.data.fact_table import read_facts

    folder = tmp_path_factory.mktemp("results")
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)) + "\n")
    facts = [row.fact for row in read_facts(folder / "facts.jsonl").rows]
    many.trace_facts(load_model("atlas"), facts, folder / "r.jsonl", samples=1, parts=PARTS.split(","))
    return folder / "r.jsonl"


def written(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "facts.jsonl")


def same(ours, theirs):
    assert [each.fact for each in ours] == [each.fact for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.settings == other.settings
        assert one.restored.keys() == other.restored.keys()
        for part in one.restored:
            np.testing.assert_array_equal(one.restored[part], other.restored[part])


# ---- one fact ---------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_settings():
    offered = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for name, value in TraceConfig().model_dump().items():
        assert offered[name] == (",".join(value) if name == "parts" else value), name


def test_every_setting_is_passed_on(run, tmp_path):
    done = run(
        *("trace", *FACT, "--object", "English", "--answer", "object", "--scored", "whole", "--samples", "3"),
        *("--noise", "u2+1", "--window", "2", "--window-edges", "reference", "--seed", "5", "--memory", "200MB"),
        *(
            "--parts",
            "mlp, severed_mlp",
            "--severed-noise",
            "reference",
            "--tokens",
            "subject_last,last",
            "--save",
            "t.jsonl",
            "--json",
        ),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    asked = {
        "samples": 3,
        "window": 2,
        "window_edges": "reference",
        "seed": 5,
        "answer": "object",
        "scored": "whole",
        "tokens": ["subject_last", "last"],
        "parts": ["mlp", "severed_mlp"],
        "severed_noise": "reference",
    }
    assert asked.items() <= said["settings"].items()
    assert {"kind": "uniform", "multiple": 2.0, "after": 1}.items() <= said["settings"]["corruption"].items()
    assert (said["answer"].strip(), said["known"]) == ("English", True)
    [stored] = load_traces(tmp_path / "t.jsonl")
    assert stored.settings == said["settings"]
    first, last = said["subject_tokens"]
    for part, values in stored.restored.items():
        untraced = [token for token, line in enumerate(said["restored"][part]) if None in line]
        assert untraced == list(range(first, last))
        np.testing.assert_array_equal(values[last], said["restored"][part][last])


def test_what_was_not_traced_is_shown_as_a_dash(run):
    done = run("trace", *FACT, *QUICK, "--parts", "mlp", "--tokens", "last")
    assert done.returncode == 0, done.stderr
    doyle, end = (next(line for line in done.stdout.splitlines() if f" {token} " in line) for token in ("oyle*", "is"))
    assert doyle.count("–") == 8
    assert "–" not in end
    assert "Of the traced MLP outputs" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace"], "there is no fact to trace"),
        (["trace", "--subject", "Rome"], "--prompt"),
        (["trace", *FACT, "--facts", "facts.jsonl", "--save", "r.jsonl"], "given twice"),
        (["trace", "--object", "English", "--facts", "facts.jsonl", "--save", "r.jsonl"], "given twice"),
        (["trace", "--facts", "facts.jsonl"], "give --save"),
        (["trace", "--facts", "none.csv", "--save", "r.jsonl"], "there is no file none.csv"),
        (["trace", "--facts", "facts.jsonl", "--save", "facts.jsonl"], "--facts and --save are both"),
        (["trace", "--facts", "facts.jsonl", "--save", "r.csv"], "must be one of .jsonl"),
        (["trace", "--facts", "facts.jsonl", "--save", "r.jsonl", "--out", "r.txt"], ".txt"),
        (["trace", "--facts", "facts.jsonl", "--save", "r.jsonl", "--min-effect", "nan"], "--min-effect is nan"),
        (["trace", "--facts", "facts.jsonl", "--save", "/proc/none/r.jsonl"], "cannot write"),
        (["trace", *FACT, "--strict"], "--strict"),
        (["trace", *FACT, "--min-effect", "0"], "--min-effect"),
        (["trace", *FACT, "--answer", "object"], "--object"),
        (["trace", *FACT, "--answer", "nobody"], "--answer"),
        (["trace", *FACT, "--object", "English", "--scored", "whole"], "needs answer='object'"),
        (["trace", *FACT, "--parts", "state,soul"], "soul"),
        (["trace", *FACT, "--parts", ""], "parts"),
        (["trace", *FACT, "--tokens", "last,least"], "least"),
        (["trace", *FACT, "--noise", "loud"], "s3 (gaussian, 3σ)"),
        (["trace", *FACT, "--window", "0"], "--window"),
        (["trace", *FACT, "--memory", "much"], "write it like 4GB"),
        (["trace", *FACT, "--memory", "0"], "write it like 4GB"),
        (["average", "none.jsonl"], "there is no file none.jsonl"),
        (["average", "facts.jsonl"], "was not written by errata"),
        (["average", "facts.jsonl", "--out", "a.txt"], ".parquet"),
        (["average", "facts.jsonl", "--min-effect", "2"], "--min-effect is 2"),
        (["figure", "trace", "none.jsonl", "--out", "t.png"], "there is no file none.jsonl"),
        (["figure", "soul", "facts.jsonl", "--out", "t.png"], "soul"),
        (["figure", "trace", "facts.jsonl"], "--out"),
        (["figure", "trace", "facts.jsonl", "--out", "t.gif"], ".gif"),
        (["figure", "averages", "none.csv", "--out", "t.png"], "no averages at none.csv"),
        (["figure", "averages", "none.csv", "--out", "t.png", "--unknown"], "holds averages"),
        (["figure", "lines", "facts.jsonl", "--out", "t.png", "--fact", "1"], "--fact"),
        (["figure", "trace", "facts.jsonl", "--out", "t.png", "--unknown"], "--unknown"),
        (["figure", "gradients", "facts.jsonl", "--out", "t.png"], "--trace"),
        (["figure", "averages", "facts.jsonl", "--out", "t.png", "--trace", "r.jsonl"], "--trace"),
        (["gradients", *FACT], "--out"),
        (["gradients", *FACT, "--out", "g.txt"], ".txt"),
        (["gradients", *FACT, "--out", "g.png", "--points", "0"], "--points"),
        (["gradients", *FACT, "--out", "g.png", "--answer", "object"], "--object"),
        (["gradients", *FACT, "--out", "g.png", "--save", "g.jsonl", "--save-trace", "g.jsonl"], "are both g.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    before = (tmp_path / "facts.jsonl").read_bytes()
    refused(run(*arguments), message)
    assert written(tmp_path) == []
    assert (tmp_path / "facts.jsonl").read_bytes() == before


def test_figures_of_one_fact_and_refusals_need_no_torch(results, tmp_path):
    (tmp_path / "facts.csv").write_text("subject,prompt\nRome,{} is in\nRome,is in\n")
    code = (
        "import sys\n"
        "from errata.cli.app import main\n"
        f"for arguments, code in ((['figure', 'trace', {str(results)!r}, '--fact', '2', '--out', 't.svg'], None),\n"
        "    (['trace', '--facts', 'facts.csv', '--save', 'r.jsonl', '--strict'], 2),\n"
        "    (['trace', '--subject', 'Rome', '--prompt', '{} is in', '--memory', 'x'], 2)):\n"
        "    sys.argv = ['errata', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as left: assert left.code == code, left.code\n"
        "assert 'torch' not in sys.modules, 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == ["facts.csv", "t.svg"]


# ---- a table ----------------------------------------------------------------------------------------------


def test_a_table_is_traced_averaged_and_drawn(run, results, tmp_path):
    done = run(
        *("trace", "--facts", "facts.jsonl", "--save", "r.jsonl", "--parts", PARTS, *QUICK, "--out", "a.png"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    same(load_traces(tmp_path / "r.jsonl"), load_traces(results))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads(done.stdout)
    assert (said["traced"], said["bad"], said["saved"], said["picture"]) == (5, [], "r.jsonl", "a.png")
    found = average_effects(load_traces(results))
    assert said["averages"]["facts"] == found.facts == 4
    assert said["averages"]["left_out"] == {"answer is not the object": 1, "no effect": 0}
    assert said["averages"]["means"]["total_effect"]["mean"] == found.total_effect
    np.testing.assert_array_equal(
        said["averages"]["sites"]["state"]["subject_last"]["mean"], found.sites["state"]["mean"][2]
    )
    assert written(tmp_path) == ["a.png", "r.jsonl"]


def test_averages_are_shown(run, results):
    done = run("average", results)
    assert done.returncode == 0, done.stderr
    found = average_effects(load_traces(results))
    layer = int(found.mean["state"][2].argmax())
    [row] = [line for line in done.stdout.splitlines() if "subject_last (4)" in line]
    mean, half = (100 * values["state"][2, layer] for values in (found.mean, found.interval))
    assert f" {mean:.1f} ±{half:.1f} at {layer} " in row
    assert f"average total effect {100 * found.total_effect:.1f} ±" in done.stdout
    assert "Left out: 1 (answer is not the object)." in " ".join(done.stdout.split())


def test_averages_of_many_parts_go_on_below(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers = np.linspace(0, 1, 4)[None].repeat(len(ROLES), 0)
    mean, interval = (dict.fromkeys(ALL_PARTS, values) for values in (layers, layers / 10))
    found = SimpleNamespace(mean=mean, interval=interval, counts=[100] * len(ROLES))
    show.averages(found)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    heads = [line for line in said.splitlines() if "token (facts)" in line]
    assert len(heads) == 3
    assert all(sum(part.replace("_", " ") in head for head in heads) for part in ALL_PARTS)
    rows = [line for line in said.splitlines() if "subject_last (100)" in line]
    assert [row.count("100.0 ±10.0 at 3 ") for row in rows] == [2, 2, 1]


def test_averages_are_the_published_ones_if_asked(run, results, tmp_path):
    done = run("average", results, "--averaging", "reference", "--out", "a.json", "--json")
    assert done.returncode == 0, done.stderr
    found = average_effects(load_traces(results), averaging="reference")
    said = json.loads(done.stdout)
    assert said["criteria"] == found.criteria
    np.testing.assert_array_equal(said["sites"]["state"]["further"]["mean"], found.mean["state"][4])
    assert AverageEffects.load(tmp_path / "a.json").criteria["averaging"] == "reference"
    assert run("figure", "lines", results, "--averaging", "reference", "--out", "p.svg").returncode == 0
    for kind, file in (("averages", "a.json"), ("trace", results)):
        refused(run("figure", kind, file, "--averaging", "reference", "--out", "q.svg"), "averag")


def test_averages_of_several_files_are_shown_side_by_side(run, results, tmp_path):
    fewer = [replace(each, restored={"severed_mlp": each.restored["severed_mlp"]}) for each in load_traces(results)[:3]]
    save_traces(tmp_path / "few.jsonl", fewer)
    done = run("average", results, "few.jsonl", *KEPT)
    assert done.returncode == 0, done.stderr
    assert f"few.jsonl ({fewer[0].model})" in done.stdout
    heads = [line for line in done.stdout.splitlines() if "token (facts)" in line]
    assert len(heads) == 2
    assert all("state" in head and "severed" in head for head in heads)
    said = json.loads(run("average", results, "few.jsonl", *KEPT, "--json").stdout)
    assert [(each["file"], each["facts"]) for each in said["files"]] == [(str(results), 5), ("few.jsonl", 3)]
    refused(run("average", results, "few.jsonl", "--out", "a.csv"), "--out holds the averages of one file")


@pytest.mark.parametrize("kind", ["trace", "averages", "lines"])
def test_figures_of_chosen_parts(run, results, tmp_path, kind):
    more = ["--fact", "1"] if kind == "trace" else KEPT
    traces = load_traces(results)
    done = run("figure", kind, results, *more, "--parts", "severed_mlp", "--out", "p.svg")
    assert done.returncode == 0, done.stderr
    only = [replace(each, restored={"severed_mlp": each.restored["severed_mlp"]}) for each in traces]
    save_traces(tmp_path / "only.jsonl", only)
    assert run("figure", kind, "only.jsonl", *more, "--out", "own.svg").returncode == 0
    assert (tmp_path / "p.svg").read_bytes() == (tmp_path / "own.svg").read_bytes()
    assert run("figure", kind, results, *more, "--out", "all.svg").returncode == 0
    assert (tmp_path / "p.svg").read_bytes() != (tmp_path / "all.svg").read_bytes()
    refused(
        run("figure", kind, results, *more, "--parts", "severed_mlp,soul", "--out", "q.svg"), "'soul', which is not in"
    )
    refused(run("figure", "severed", results, "--parts", "severed_mlp", "--out", "q.svg"), "--parts chooses parts")


BROKEN = [DOYLE, DOYLE, {**DOYLE, "prompt": "is"}, {**DOYLE, "subject": "Roy " * 400}, FACTS[2]]


def test_bad_lines_are_named_and_the_others_traced(run, tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, BROKEN)) + "\n")
    done = run("trace", "--facts", "t.jsonl", "--save", "r.jsonl", *QUICK, "--json")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [*(f"t.jsonl, line {n}" for n in (2, 3, 4)), "left out"]
    assert "reads at most" in lines[2]
    assert lines[-1] == "left out: 3 of 5"
    said = json.loads(done.stdout)
    assert [each["line"] for each in said["bad"]] == [2, 3, 4]
    assert said["traced"] == len(load_traces(tmp_path / "r.jsonl")) == 2
    (tmp_path / "r.jsonl").unlink()

    strict = ["trace", "--facts", "t.jsonl", "--save", "r.jsonl", *QUICK, "--strict"]
    refused(run(*strict), "t.jsonl, line 2: the same")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [BROKEN[0], BROKEN[3]])) + "\n")
    refused(run(*strict), "t.jsonl, line 2: the prompt has")
    assert written(tmp_path) == ["t.jsonl"]


def test_a_table_without_a_fact_that_can_be_traced(run, tmp_path):
    (tmp_path / "t.csv").write_text("subject,prompt\nRome,{} is in\n")
    done = run("trace", "--facts", "t.csv", "--save", "r.jsonl", "--answer", "object", *QUICK)
    assert done.returncode == 2
    told, error = done.stderr.splitlines()
    assert "line 2: the fact on 'Rome' names no object" in told
    assert "no fact of t.csv can be traced" in error
    assert written(tmp_path) == ["t.csv"]


def test_traces_are_kept_where_nothing_is_left_to_average(run, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(FACTS[1]))
    done = run("trace", "--facts", "t.jsonl", "--save", "r.jsonl", "--out", "a.png", *QUICK, "--json")
    assert done.returncode == 1
    assert "no averages" in done.stderr
    said = json.loads(done.stdout)
    assert (said["traced"], said["averages"], said["picture"]) == (1, None, None)
    assert written(tmp_path) == ["r.jsonl", "t.jsonl"]
    done = run("trace", "--facts", "t.jsonl", "--save", "r.jsonl", "--out", "a.png", *QUICK, *KEPT)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == ["a.png", "r.jsonl", "t.jsonl"]


def test_interrupted_it_goes_on(run, results, tmp_path, monkeypatch):
    real, groups = many.trace_together, []

    def interrupted(model, facts, *rest):
        groups.append(len(facts))
        if len(groups) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(model, facts, *rest)

    monkeypatch.setattr(many, "trace_together", interrupted)
    arguments = ["trace", "--facts", "facts.jsonl", "--save", "r.jsonl", "--parts", PARTS, *QUICK]
    done = run(*arguments)
    assert done.returncode == 130
    assert done.stdout == ""
    traced = sum(groups)
    assert 2 <= traced < 5
    assert done.stderr == f"interrupted: {traced} of 5 facts are there, and the same command goes on\n"
    assert len(load_traces(tmp_path / "r.jsonl")) == traced

    refused(run(*arguments, "--seed", "2"), "seed was 1, now is 2")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert sum(groups) == 5
    assert (tmp_path / "r.jsonl").read_bytes() == results.read_bytes()


# ---- stored results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "kind"), [("csv", "averages"), ("json", "lines"), ("parquet", "severed")])
def test_averages_are_stored_and_drawn_again(run, results, tmp_path, ending, kind):
    stored = tmp_path / f"a.{ending}"
    done = run("average", results, *KEPT, "--out", stored)
    assert done.returncode == 0, done.stderr
    assert AverageEffects.load(stored).facts == 5
    refused(run("figure", kind, stored, "--out", stored), "are both")
    for file, picture, more in ((stored, "a.svg", []), (results, "b.svg", KEPT)):
        done = run("figure", kind, file, "--out", picture, *more)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_trace_is_drawn_again_by_number_or_subject(run, results, tmp_path):
    traces = load_traces(results)
    number = next(n for n, each in enumerate(traces, 1) if each.fact.subject == FACT[1])
    traces[number - 1].plot(tmp_path / "own.svg")
    for choice in (["--fact", number], ["--subject", FACT[1]]):
        done = run("figure", "trace", results, *choice, "--out", "t.svg")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "t.svg").read_bytes() == (tmp_path / "own.svg").read_bytes()
    refused(run("figure", "trace", results, "--out", "u.svg"), "holds 5 traces to choose from")
    refused(run("figure", "trace", results, "--out", "u.svg", "--fact", "6"), "none is of --fact 6")
    refused(run("figure", "trace", results, "--out", "u.svg", "--subject", "Rome"), "none is of --subject Rome")
    assert written(tmp_path) == ["own.svg", "t.svg"]


def test_gradients_are_drawn_and_drawn_again(run, results, tmp_path):
    done = run(
        *("gradients", *FACT, "--points", "2", *QUICK, "--out", "g.svg", "--save", "g.jsonl"),
        *("--save-trace", "t.jsonl", "--json"),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["norms"].keys() == said["indirect_effects"].keys() == {"state", "mlp", "attention"}
    done = run("figure", "gradients", "g.jsonl", "--trace", "t.jsonl", "--out", "again.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "g.svg").read_bytes()
    refused(
        run("figure", "gradients", "g.jsonl", "--trace", results, "--out", "x.svg", "--fact", "2"), "another prompt"
    )


# ---- pictures of averages ---------------------------------------------------------------------------------


def test_averages_draw_themselves(results, tmp_path):
    found = average_effects(load_traces(results))
    for figure in (found.figure(), found.lines(), found.severed()):
        assert f"{found.facts} facts" in figure.get_suptitle()
    found.plot(tmp_path / "s.svg", kind="severed")
    assert b"with MLPs severed" in (tmp_path / "s.svg").read_bytes()
    row, bars = 2, found.severed().axes[0].containers
    heights = [bar.get_height() for bar in bars if type(bar).__name__ == "BarContainer" for bar in bar]
    expected = [found.mean[part][row] for part in ("state", "severed_attention", "severed_mlp")]
    np.testing.assert_allclose(heights, np.concatenate(expected))


def test_averages_say_what_they_cannot_draw(run, results, tmp_path):
    from errata.base.errors import ConfigError

    found = average_effects(load_traces(results))
    with pytest.raises(ConfigError, match="not as 'pie'"):
        found.plot(tmp_path / "x.png", kind="pie")
    done = run("trace", "--facts", "facts.jsonl", "--save", "r.jsonl", "--parts", "state,mlp", *QUICK)
    assert done.returncode == 0, done.stderr
    refused(
        run("figure", "severed", "r.jsonl", "--out", "s.png"), "trace with parts=state,severed_attention,severed_mlp"
    )
    assert written(tmp_path) == ["r.jsonl"]
