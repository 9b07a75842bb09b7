"""`errata evaluate` as a user has it: what goes in, what is refused, what is left in the folder."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from errata import editor
from errata.api import load_model
from errata.atlas.records import records
from errata.base.errors import ConfigError
from errata.editors.layer_choice import choose_layer
from errata.edits.edit import Edit
from errata.evaluation import executors, runner
from errata.evaluation.results import Run
from errata.statistics.second_moment import SecondMoment
from helpers.command_line import refused
from samples import sample
from tiny import TEXT, byte_tokenizer, tiny

CHEAP = ["--identity", "--no-generation", "--no-health"]
ROME = ["--editor", "r=rome:steps=2,prefixes=none"]


pytestmark = pytest.mark.usefixtures("worlds_built_once")


@pytest.fixture
def errata(errata):
    return lambda *arguments: errata("evaluate", *arguments)


def entry(case: int = 1, **changes) -> dict:
    asked = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "Italian", "id": "Q1"},
        "target_true": {"str": "English", "id": "Q2"},
        "subject": "Arthur Conan Doyle",
    }
    whole = {
        "case_id": case,
        "requested_rewrite": {**asked, **{key: value for key, value in changes.items() if key in asked}},
        "paraphrase_prompts": ["Arthur Conan Doyle spoke the language"],
        "neighborhood_prompts": ["The mother tongue of Robert Louis Stevenson is"],
        "attribute_prompts": ["The mother tongue of Roberto Benigni is"],
        "generation_prompts": ["Arthur Conan Doyle lives in"],
    }
    return {**whole, **{key: value for key, value in changes.items() if key in whole}}


def written(path: str, entries: object) -> str:
    Path(path).write_text(json.dumps(entries), encoding="utf-8")
    return path


def lines(folder: str | Path) -> dict[str, list[dict]]:
    journals = sorted(Path(folder).rglob("*.jsonl"))
    return {p.name: [{**json.loads(line), "seconds": 0} for line in p.read_text().splitlines()[1:]] for p in journals}


# ---- what it does -----------------------------------------------------------------------------------------


def test_the_atlas_with_all_that_is_measured(errata):
    command = ["--out", "run", "--limit", "1", "--identity", "--editor", "rome:steps=3,prefixes=none"]
    done = errata(*command, "--keep-edits")
    assert done.returncode == 0, done.stderr
    for words in ("unedited", "ES", "GE", "RS", "written: run"):
        assert words in done.stdout, done.stdout
    run = Run.load("run")
    assert [*run.edited] == ["rome-steps=3,prefixes=none"]
    assert (run.settings["model"], run.settings["records"]["source"], len(run.records)) == ("atlas", "atlas", 1)
    for results in run.edited.values():
        for result in results.by_case.values():
            assert len(result.texts) == len(run.records[result.case].generation) > 0
            assert None not in (result.entropy, result.reference, result.health)
            assert Edit.load(Path("run") / result.edit).rewrites == (run.records[result.case].rewrite,)
    before = lines("run")
    again = errata(*command, "--json")
    assert again.returncode == 0
    assert {row["name"] for row in json.loads(again.stdout)["rows"] if row["source"] == "run"} == {
        "unedited",
        "rome-steps=3,prefixes=none",
    }
    assert lines("run") == before  # nothing is measured again


def test_the_layer_is_found_by_a_trace_of_the_records(errata):
    command = ["--out", "run", "--editor", "traced=rome:layer=auto,steps=2,prefixes=none", "--limit", "2", *CHEAP]
    done = errata(*command)
    assert done.returncode == 0, done.stderr
    (file,) = Path("run").rglob("traced.jsonl")
    config = json.loads(file.read_text().splitlines()[0])["config"]
    site = choose_layer(load_model(), [record.rewrite.fact for record in records(500)[:2]])
    assert (config["layer"], config["layer_by"]) == (site.layer, "auto")
    before = lines("run")
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]))  # one record is left to do
    done = errata(*command)
    assert done.returncode == 0, done.stderr
    assert lines("run") == before


def test_a_layer_is_found_by_the_first_ten_facts_alone():
    live = load_model()
    facts = [record.rewrite.fact for record in records(14)]
    settings = {"layer": "auto", "prefixes": "none", "second_moment": SecondMoment.identity(live.d_mlp)}
    some, more = (editor(live, facts=given, **settings).config for given in (facts[:10], facts))
    assert some == more
    assert some["layer"] == choose_layer(live, facts).layer
    with pytest.raises(ConfigError, match="facts"):
        editor(live, facts=["Paris"], **settings)


def test_no_editor_is_the_unedited_model_alone(errata):
    done = errata("--out", "run", "--limit", "2", *CHEAP, "--json")
    assert done.returncode == 0
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["unedited"]
    assert not (Path("run") / "editors").exists()
    result = Run.load("run").unedited.by_case[0]
    assert (result.texts, result.health) == ((), None)


def test_a_run_may_be_stopped_and_goes_on_with_the_same_command(errata, monkeypatch):
    monkeypatch.setattr(runner, "TOGETHER", 1)
    command = ["--limit", "3", *CHEAP, *ROME]
    assert errata("--out", "whole", *command).returncode == 0
    measured = executors.measure

    def press(*arguments):
        signal.raise_signal(signal.SIGINT)
        return measured(*arguments)

    monkeypatch.setattr(executors, "measure", press)
    for step in (1, 2):
        done = errata("--out", "run", *command)
        assert done.returncode == 130
        said = f"interrupted: {2 * step} of 6 results are there, and the same command goes on"
        assert done.stderr.splitlines() == [said]
        assert {len(found) for found in lines("run").values()} == {step}
    monkeypatch.setattr(executors, "measure", measured)
    path = Path("run") / "editors" / "r.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # and the second line is cut by a kill
    assert errata("--out", "run", *command).returncode == 0
    assert lines("run") == lines("whole")


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("counterfact_nested", {"s", "es", "ps", "ns", "ats"}),
        ("counterfact_flat", {"s", "es", "ps", "ns"}),
        ("zsre", {"efficacy", "paraphrase", "specificity"}),
    ],
)
def test_published_schemas(errata, name, numbers):
    data = sample(name)
    done = errata("--out", "run", "--data", str(data), "--limit", "3", *CHEAP, *ROME, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert numbers <= {column["name"] for column in told["columns"]}
    assert [(row["name"], row["measured"]) for row in told["rows"]] == [("unedited", 3), ("r", 3)]
    # The same file by another path, from another folder, is the same run; and a sample is another.
    shutil.copy(data, data.name)
    assert errata("--out", "run", "--data", data.name, "--limit", "3", *CHEAP, *ROME).returncode == 0
    refused(errata("--out", "run", "--data", data.name, "--limit", "3", "--sample", "2", *CHEAP), "records")
    done = errata("--out", "few", "--data", data.name, "--limit", "5", "--sample", "2", "--seed", "3", *CHEAP)
    assert done.returncode == 0
    assert len(Run.load("few").records) == 2


def test_another_model_and_its_second_moment(errata, tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))  # without second moments of other tests
    hf, tokenizer = tiny("llama", layers=3), byte_tokenizer()
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "texts.txt").write_text(TEXT)
    (tmp_path / "probe.txt").write_text("It rains.\n\nRome is the capital of Italy,\nand Paris of France.\n")
    data = written("r.json", [entry(1, prompt="{} is"), entry(2, prompt="{} was")])
    spec = ["--editor", "r=rome:layer=1,steps=2,prefixes=none"]
    command = ["--model", "m", "--data", data, "--no-generation", "--out", "run", *spec]
    refused(errata(*command), "give --corpus FILE")
    assert not Path("run").exists()
    refused(errata("--model", "m", "--out", "run", *CHEAP), "there are no records for m")
    done = errata(*command, "--corpus", "texts.txt", "--corpus-tokens", "64", "--probe", "probe.txt", "--json")
    assert done.returncode == 0, done.stderr
    run = Run.load("run")
    assert run.settings["model"] == "m"
    assert all(result.health["drift"] >= 0 for result in run.edited["r"].by_case.values())
    refused(errata(*command, "--identity", "--probe", "probe.txt"), "config.second_moment: others than then")


def test_how_edits_that_were_made_move_a_text(errata):
    assert errata("--out", "run", "--limit", "2", *CHEAP, *ROME, "--keep-edits").returncode == 0
    edits = [each for case in (0, 1) for each in ("--edit", f"run/edits/r/{case}.safetensors")]
    Path("p.txt").write_text("IBM 4300 was made by Siemens. It is a machine.")
    done = errata(*edits[:2], "--probe", "p.txt")
    assert done.returncode == 0, done.stderr
    assert "with the edit" in done.stdout
    assert "foretold on average" in done.stdout
    told = json.loads(errata(*edits, "--probe", "p.txt", "--json").stdout)
    assert told["drift"] != 0
    assert told["after"] != told["before"] > 1
    Path("short.txt").write_text("a")
    refused(errata(*edits, "--probe", "short.txt"), "nothing to foretell")
    refused(errata(*edits[:2] * 2, "--probe", "p.txt"), "applied to 'atlas' already")
    refused(errata(*edits), "give it with --probe")
    for option in (["--out", "x"], ["--limit", "3"], ["--executor", "ray"], ["--no-health"]):
        refused(errata(*edits, "--probe", "p.txt", *option), "without options of a run")
    refused(errata("--edit", "p.txt", "--probe", "p.txt"), "not a whole safetensors file")
    refused(errata("--edit", "none", "--probe", "p.txt"), "there is no file none")


# ---- what is refused, with nothing left behind ------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rom", "there is no editor 'rom': did you mean 'rome'?"),
        ("zzz", "choose from rome"),
        ("", "there is no editor ''"),
        ("rome:step=2", "RomeConfig has no setting 'step': did you mean 'steps'?"),
        ("rome:steps=0", "steps = 0 is not valid"),
        ("rome:steps", "'steps' is not a setting: write KEY=VALUE"),
        ("rome:steps=2,", "'' is not a setting"),
        ("rome:=2", "'=2' is not a setting"),
        ("rome:steps=2,steps=3", "steps is given twice"),
        ("rome:layer=99", "atlas has layers 0 to 7"),
        ("rome:preset=papier", "no preset 'papier': choose from 'paper', 'reference'"),
        ("rome:preset=[1]", "no preset [1]"),
        ("rome:clamp=Infinity", "clamp = inf is not valid"),
        ("rome:loss_layer=99,prefixes=none", "from 4, the edited layer, to 7, the last"),
        ("rome:max_drift=0.1,prefixes=none", "max_drift has no effect here"),
        ("a/b=rome", "'a/b' cannot name a row"),
        ("=rome", "'' cannot name a row"),
        ("unedited=rome", "'unedited' is taken"),
        ("rome:kl_prompt={} is " + "a" * 99, "too long to name a row: give a name"),
        ("rome:prefixes=" + "[" * 9999, "prefixes"),
    ],
)
def test_bad_editors(errata, spec, message):
    refused(errata("--out", "run", "--editor", "x=" * (len(spec) > 999) + spec, "--limit", "2", *CHEAP), message)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("spec", "name", "settings"),
    [
        ("rome", "rome", {}),
        ("rome:", "rome", {}),
        ("a=b=rome:key=reference", "a=b", {"key": "reference"}),
        ("rome:key=reference,clamp=None", "rome-key=reference,clamp=None", {"key": "reference", "clamp": None}),
        ("rome:clamp=null,steps=25", "rome-clamp=None,steps=25", {"clamp": None, "steps": 25}),
        (
            'rome:prefixes=["a b, c",""],steps=1',
            "rome-prefixes=ab,c,,steps=1",
            {"prefixes": ["a b, c", ""], "steps": 1},
        ),
        ("x=rome:steps=2,kl_prompt={} is a", "x", {"steps": 2, "kl_prompt": "{} is a"}),
        ("x=rome:kl_prompt={} is a,steps=2", "x", {"steps": 2, "kl_prompt": "{} is a"}),
        ("x=rome:kl_prompt=a=b {}", "x", {"kl_prompt": "a=b {}"}),
    ],
)
def test_what_an_editor_says(spec, name, settings):
    from errata.cli.options import editor_spec

    assert editor_spec(spec) == (name, "rome", settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run folder by --out"),
        (["--out", "run", *ROME, *ROME], "two rows are called r"),
        (["--out", "run", "--workers", "2"], "--workers is of Ray"),
        (["--out", "run", "--address", "auto"], "--address is of Ray"),
        (["--out", "run", "--executor", "spark"], "'here', 'ray'"),
        (["--out", "run", "--limit", "0"], "--limit"),
        (["--out", "run", "--sample", "x"], "--sample"),
        (["--out", "run", "--corpus", "c.txt", "--identity"], "given twice"),
        (["--out", "run", "--model", "nothing"], "no model 'nothing'"),
        (["--out", "run", "--device", "mars"], "'mars' is not a device"),
        (["--out", "run", "--dtype", "int8"], "'int8' is not a dtype"),
        (["--out", "run", "--data", "nothing.json"], "there is no file nothing.json"),
        (["--out", "run", "--data", "."], "name the file of records itself"),
        (["--out", "run", "--probe", "nothing"], "there is no file nothing"),
        (["--out", "run", "--probe", "empty"], "empty is empty"),
        (["--out", "run", "--probe", "latin"], "Give a file in UTF-8"),
        (["--out", "run", "--probe", "one", "--limit", "2"], "no reference text has two tokens"),
        (["--out", "run", "--limit", "2", "--sample", "2"], "give --limit alone"),
        (["--out", "one", "--limit", "2"], "cannot write one/unedited.jsonl"),
        (["--out", "one/run", "--limit", "2"], "cannot write one/run/unedited.jsonl"),
        (["--out", "run", "--limit", "2", "--second-moment", "one", *ROME], "one"),
    ],
)
def test_bad_options(errata, arguments, message):
    Path("empty").write_text(" \n")
    Path("one").write_text("a")
    Path("latin").write_bytes("é".encode("latin-1"))
    refused(errata(*arguments, "--no-generation"), message)
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "latin", "one"]


def test_a_run_is_not_gone_on_with_by_another(errata):
    command = ["--out", "run", "--limit", "2", *CHEAP, *ROME]
    assert errata(*command).returncode == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for more, message in (
        (["--limit", "1"], "is a run over 2 records, and 1 are asked for"),
        (["--seed", "1"], "seed was 0, now is 1"),
        (["--generation"], "generation was null"),
        (["--health"], "was null, now is given"),
        (["--editor", "new=rome:steps=2,prefixes=none"], "config.steps was 2, now is 3"),
    ):
        changed = [each.replace("steps=2", "steps=3") for each in command] if "steps" in message else command
        refused(errata(*changed, *more), message)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


# ---- records that are none --------------------------------------------------------------------------------


def test_bad_records_are_told_and_the_others_used(errata):
    entries = [
        entry(1),
        {key: value for key, value in entry(2).items() if key != "paraphrase_prompts"},
        entry(3, paraphrase_prompts=7),
        entry(4, target_new={"str": "English"}),
        entry(5, target_new={"str": "  "}),
        entry(6, prompt="The capital is"),
        entry("7"),
        entry(1),
        "text",
        entry(8, subject="caf\udce9"),
        entry(9, paraphrase_prompts=["word " * 999]),
    ]
    written("r.json", entries)
    done = errata("--out", "run", "--data", "r.json", *CHEAP, *ROME)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    messages = [
        "entry 2: it has no paraphrase_prompts",
        "entry 3: its paraphrase_prompts is a list",
        "entry 4: its new object is its old one",
        "entry 5: its str is empty",
        "entry 6: ",
        "entry 7: its case_id is a whole number",
        "entry 8: the same case_id, 1, as entry 1",
        "entry 9: it must be an object, not str",
        "entry 10: there are bytes in its subject that are no UTF-8",
    ]
    for line, message in zip(told, messages, strict=False):
        assert line.startswith(f"r.json, {message}"), line
    assert told[9:] == ["left out: 9 of the file's entries"]
    run = Run.load("run")
    assert {case: result.answers is None for case, result in run.edited["r"].by_case.items()} == {1: False, 9: True}
    assert "reads at most" in run.unedited.by_case[9].error
    assert errata("--out", "few", "--data", "r.json", *CHEAP, "--limit", "1").returncode == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b"", "r.json is empty"),
        ("r.json", b"[]", "is an empty list"),
        ("r.json", json.dumps([entry()]).encode()[:-20], "is not JSON"),
        ("r.json", json.dumps([entry(target_new={"str": ""})]).encode(), "no good record in r.json: entry 1"),
        ("r.json", json.dumps(entry()).encode(), "records stand in a list"),
        ("r.json", b'[{"subject": "a", "prompt": "{} b"}]', "it looks like a table of facts"),
        ("r.json", '[{"case_id": 1, "x": "\xff"}]'.encode("latin-1"), "holds no records"),
        ("r.json", "[]".encode("utf-16"), "UTF-16"),
        ("r.txt", b"x", "ends in .json or .jsonl"),
        ("r.jsonl", b'{"kind": "evaluation", "version": 1}\n', "it looks like a result of errata"),
    ],
)
def test_files_that_hold_no_records(errata, name, content, message):
    Path(name).write_bytes(content)
    refused(errata("--out", "run", "--data", name, *CHEAP), message)
    assert not Path("run").exists()


def test_a_file_cut_in_the_middle_of_a_line_is_read_up_to_it(errata):
    text = "\n".join(json.dumps(entry(case)) for case in (1, 2, 3))
    Path("r.jsonl").write_text(text[:-40])
    done = errata("--out", "run", "--data", "r.jsonl", *CHEAP)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("r.jsonl, entry 3: no JSON")
    assert [*Run.load("run").records] == [1, 2]


def test_a_folder_with_reference_texts(errata):
    Path("set").mkdir()
    written("set/counterfact.json", [entry(1)])
    said = [{"name": "Roberto Benigni", "text": "Roberto Benigni speaks Italian."}]
    own = [{"name": "Arthur Conan Doyle", "text": "Arthur Conan Doyle wrote in English."}]
    groups = [("Q1", said), ("Q2", own)]
    snippets = [{"relation_id": "P103", "target_id": target, "samples": some} for target, some in groups]
    written("set/attribute_snippets.json", snippets)
    assert errata("--out", "run", "--data", "set", "--no-health").returncode == 0
    result = Run.load("run").unedited.by_case[1]
    assert result.reference is not None
    assert result.essence > 1
    more = ("--no-health", "--essence", "reference", "--end-of-text", "continue")
    assert errata("--out", "published", "--data", "set", *more).returncode == 0
    told = json.loads(Path("published/card.json").read_text())["settings"]["generation"]
    assert (told["essence"], told["end_of_text"]) == ("reference", "continue")
    assert 1 < Run.load("published").unedited.by_case[1].essence < result.essence
    written("set/attribute_snippets.json", {"x": 3})
    refused(errata("--out", "other", "--data", "set", "--no-health"), "holds no attribute snippets")
    assert errata("--out", "other", "--data", "set", *CHEAP).returncode == 0  # nobody asks for them
