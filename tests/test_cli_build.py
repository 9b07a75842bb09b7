"""`errata data build` as a user has it: the guide's own catalogue, folders, refusals, and what a model has to say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from errata.tasks.records import read_records
from helpers.command_line import refused

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "data.md"
FILES = ["attribute_snippets.json", "build.json", "counterfact.json"]


def guide(language: str) -> str:
    """A block of the guide's part on building."""
    part = GUIDE.read_text(encoding="utf-8").split("## Make a CounterFact from your own facts")[1]
    return re.findall(rf"^```{language}\n(.*?)^```", part, flags=re.M | re.S)[0]


@pytest.fixture
def run(errata, tmp_path):
    (tmp_path / "catalogue.csv").write_text(guide("csv"), encoding="utf-8")
    (tmp_path / "templates.json").write_text(guide("json"), encoding="utf-8")
    return errata


COMMAND = shlex.split(guide("sh"))[1:]
ELSEWHERE = [*COMMAND[:-1], "other"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_guide_builds_its_catalogue(run, tmp_path):
    assert guide("csv").count("\n") == 30
    done = run(*COMMAND)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    said = " ".join(done.stdout.split())
    assert said.startswith("27 records of 29 facts")
    assert "its relation has no other object" in said
    assert "Iliona kettle – colour – " in said
    assert sorted(contents(tmp_path / "catalogue")) == FILES
    found = read_records(tmp_path / "catalogue")
    assert len(found.records) == 27
    assert found.bad == ()
    for record in found.records:
        assert (len(record.paraphrase), len(record.neighborhood), len(record.attribute)) == (2, 3, 3)
        assert len(record.generation) == 10
        assert len(found.snippets.of(record)) >= 3
    card = json.loads((tmp_path / "catalogue" / "build.json").read_text())
    assert (card["records"], card["facts"], card["settings"]["seed"]) == (27, 29, 0)
    assert card["missed"] == {"its relation has no other object": {"colour": 2}}
    assert {name: entry["file"] for name, entry in card["inputs"].items()} == {
        "facts": "catalogue.csv",
        "templates": "templates.json",
    }


def test_the_same_command_makes_the_same_bytes(run, tmp_path):
    run(*COMMAND)
    first = contents(tmp_path / "catalogue")
    assert run(*COMMAND).returncode == 0
    assert contents(tmp_path / "catalogue") == first
    header, *lines = guide("csv").splitlines()
    (tmp_path / "catalogue.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert run(*ELSEWHERE).returncode == 0
    again = contents(tmp_path / "other")
    assert (again.pop("build.json") == first.pop("build.json"), again) == (False, first)


def test_another_build_is_not_replaced(run, tmp_path):
    run(*COMMAND)
    first = contents(tmp_path / "catalogue")
    refused(run(*COMMAND, "--seed", "1"), "a build from other settings")
    (tmp_path / "templates.json").write_text(guide("json") + "\n")
    refused(run(*COMMAND, "--limit", "3"), "a build from other settings and inputs")
    assert contents(tmp_path / "catalogue") == first
    assert run(*COMMAND, "--limit", "3", "--force").returncode == 0
    assert len(read_records(tmp_path / "catalogue").records) == 3
    (tmp_path / "catalogue" / "notes.txt").write_text("mine")
    refused(run(*COMMAND, "--force"), "it holds other things")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "build.json").write_text('{"kind": "something else"}')
    refused(run(*COMMAND[:-1], "folder", "--force"), "it holds other things")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "catalogue",
        "catalogue.csv",
        "folder",
        "templates.json",
    ]


def test_bad_lines_are_named_and_the_others_used(run, tmp_path):
    (tmp_path / "catalogue.csv").write_text(guide("csv") + "juno  KETTLE,maker,halden\nX,maker\nX,price,high\n")
    (tmp_path / "templates.json").write_text(json.dumps(json.loads(guide("json")) | {"size": {"templates": ["{} is"]}}))
    (tmp_path / "texts.csv").write_text("subject,text\nAurora lamp,It glows.\nZeno,Who?\nFaro kettle,\n")
    done = run(*COMMAND, "--texts", "texts.csv", "--json")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "catalogue.csv, line 31: the same fact as line 11" in lines[0]
    assert "catalogue.csv, line 32: 2 fields" in lines[1]
    assert "texts.csv, line 4: it has no subject, or no text" in lines[2]
    assert "templates for 'size', and no fact" in lines[3]
    assert "texts.csv: of 1 subjects there are texts, and no fact" in lines[4]
    assert lines[5] == "left out: 3 lines"
    said = json.loads(done.stdout)
    assert [each["line"] for each in said["bad"]] == [31, 32, 4]
    assert said["missed"]["its relation has no templates"] == {"price": 1}
    assert (said["records"], said["bad_lines"]) == (27, 3)
    snippets = read_records(tmp_path / "catalogue").snippets
    assert "It glows." in [snippet.text for snippet in snippets.groups["maker", "Norvik"]]
    refused(run(*ELSEWHERE, "--strict"), "line 31: the same fact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--neighbors", "9"], "no fact of catalogue.csv makes a record: its object has fewer than 9"),
        (["--neighbors", "0"], "neighbors"),
        (["--templates", "none.json"], "there is no file none.json"),
        (["--sentences", "none.txt"], "there is no file none.txt"),
        (["--sentences", "blank.txt"], "there is no sentence in blank.txt"),
        (["--sentences", "latin.txt"], "is not text in UTF-8"),
        (["--texts", "none.csv"], "there is no file none.csv"),
        (["--less-likely"], "name it by --model or --known-to"),
        (["--sentences", "some.txt", "--model", "atlas"], "--model is given for nothing"),
        (["--model", "./no-such-folder"], "no-such-folder"),
        (["--out", "catalogue.csv"], "a file stands there"),
        (["--out", "/proc/none/catalogue"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("It rained.\n")
    (tmp_path / "latin.txt").write_bytes("Café.\n".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    refused(run(*COMMAND, *arguments), message)
    assert sorted(tmp_path.iterdir()) == before


def test_sentences_of_ones_own(run, tmp_path):
    (tmp_path / "some.txt").write_text("It rained all day.\n\nThe bus was late.\n")
    assert run(*COMMAND, "--sentences", "some.txt").returncode == 0
    for record in read_records(tmp_path / "catalogue").records:
        assert all(text.startswith(("It rained all day. ", "The bus was late. ")) for text in record.paraphrase)


# ---- models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Facts of the atlas's world on two languages; one in seven with the other language than the atlas knows."""
    from errata.atlas.world import load_world

    folder = tmp_path_factory.mktemp("world")
    loaded = load_world()
    facts = [f for f in loaded.facts if f.relation == "native_language" and f.object in ("Italian", "Spanish")][:28]
    wrong = {f.subject for f in facts[::7]}
    rows = [
        (f.subject, {"Italian": "Spanish", "Spanish": "Italian"}[f.object] if f.subject in wrong else f.object)
        for f in facts
    ]
    lines = ["subject,relation,object", *(f'"{subject}",speaks,{name}' for subject, name in rows)]
    (folder / "facts.csv").write_text("\n".join(lines) + "\n")
    templates = loaded.relations["native_language"].templates
    (folder / "templates.json").write_text(json.dumps({"speaks": {"templates": templates}}))
    return folder, wrong, len(rows)


def test_facts_that_a_model_knows_with_objects_that_it_finds_less_likely(run, world, tmp_path):
    folder, wrong, count = world
    command = ["data", "build", folder / "facts.csv", "--templates", folder / "templates.json", "--neighbors", "3"]
    done = run(*command, "--out", "known", "--known-to", "atlas", "--less-likely", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    subjects = {record.rewrite.subject for record in read_records(tmp_path / "known").records}
    assert subjects.isdisjoint(wrong)
    assert len(subjects) >= 0.8 * (count - len(wrong))
    missed = sum(said["missed"]["the model does not know it"].values())
    assert missed >= len(wrong)
    assert len(subjects) + sum(sum(its.values()) for its in said["missed"].values()) == count
    assert list(said["weights"]) == ["atlas"]
    assert not (tmp_path / "known.progress.jsonl").exists()
    # Of the wrong ones the atlas finds the new object more likely, not less.
    (tmp_path / "some.txt").write_text("It rained.\n")
    done = run(*command, "--out", "less", "--model", "atlas", "--less-likely", "--sentences", "some.txt")
    assert done.returncode == 0, done.stderr
    few = {record.rewrite.subject for record in read_records(tmp_path / "less").records}
    assert len(few & wrong) <= len(wrong) / 4
    assert run(*command, "--out", "all").returncode == 0
    assert wrong <= {record.rewrite.subject for record in read_records(tmp_path / "all").records}


def test_a_model_writes_the_sentences(run, tmp_path):
    done = run(*COMMAND, "--model", "atlas", "--limit", "5")
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "catalogue").records
    assert len(records) == 5
    texts = [text for record in records for text in record.paraphrase]
    assert not any(name in text.split(". ")[0] for text in texts for name in ("lamp", "kettle"))
    first = contents(tmp_path / "catalogue")
    run(*COMMAND, "--model", "atlas", "--limit", "5")
    assert contents(tmp_path / "catalogue") == first
    refused(run(*COMMAND, "--model", "atlas", "--limit", "5", "--dtype", "bfloat16"), "from other settings")
    card = json.loads((tmp_path / "catalogue" / "build.json").read_text())
    card["weights"]["atlas"] = "of another atlas"
    (tmp_path / "catalogue" / "build.json").write_text(json.dumps(card))
    refused(run(*COMMAND, "--model", "atlas", "--limit", "5"), "from other weights")
