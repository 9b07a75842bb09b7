"""`errata edit` as a user has it: one fact, tables, where the layer comes from, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from errata.api import load_model
from errata.cli.edit import _still_falling, _verdict
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.scoring import score
from helpers.command_line import FACT, refused
from tiny import TEXT, byte_tokenizer, tiny

TABLE = """subject,prompt,new_object,object
Arthur Conan Doyle,The native language of {} is,Italian,English
Nobody,this has no place,x,y
Roy Hargrove,{} is known for playing the,violin,trumpet
Arthur Conan Doyle,The native language of {} is,French,English
"""


def test_one_fact_is_shown_with_its_layer_and_its_health(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--out", "d.safetensors", "--lora", "lora", "--merge", "merged")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for words in ("English", "Italian", "layer 4: the model's own hint", "Ŵk* = v* holds to", "nats per token"):
        assert words in said, said
    assert Edit.load(tmp_path / "d.safetensors").notes["health"]["disabling"] is False
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_so_many_tokens_of_the_models_own_corpus_count(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--corpus-tokens", "5000", "--out", "d.safetensors")
    assert done.returncode == 0, done.stderr
    assert Edit.load(tmp_path / "d.safetensors").notes["second_moment"]["tokens"] == 5000


def test_an_edit_is_judged_in_words_and_by_each_prompts_own_answer(errata):
    neighbour = "The native language of Danielle Darrieux is"
    done = errata("edit", *FACT, "--to", "Italian", "--also", neighbour, "--json")
    said = json.loads(done.stdout)
    own, other = said["prompts"]
    assert own["answer"] == "English"
    assert own["p_answer_before"] > 0.5 > own["p_answer_after"]
    model = load_model()
    assert model.complete(neighbour, 12).startswith(f"{neighbour} {other['answer']}")
    (scored,) = score(model, [neighbour], [other["answer"]])
    assert other["p_answer_before"] == pytest.approx(math.exp(scored.total), rel=1e-3)
    assert other["answer"] != "Italian"
    assert other["p_answer_before"] > 0.5
    assert said["verdict"].startswith("The edit took: P(Italian) 9")
    shown = " ".join(errata("edit", *FACT, "--to", "Italian", "--also", neighbour).stdout.split())
    assert said["verdict"] in shown
    assert "answer before" in shown


@pytest.mark.parametrize(
    ("before", "after", "health", "words"),
    [
        (0.1, 0.9, {"disabling": False, "drift": 0.002}, "The edit took: P(x) 90.0 %, 10.0 % before; unrelated text h"),
        (0.1, 0.9, {"disabling": False, "drift": 0.1}, "unrelated text moved noticeably (0.1 nats per token)"),
        (0.1, 0.9, {"disabling": False, "drift": 0.7}, "unrelated text moved far (0.7 nats per token)"),
        (0.1, 0.4, {"disabling": False, "drift": 0.0}, "The edit is weak: P(x) 40.0 %"),
        (0.6, 0.9, {"disabling": False, "drift": 0.0}, "changes little: the model gave this answer before"),
        (0.1, 0.9, {"disabling": True, "drift": 3.0}, "The edit breaks the model"),
        (0.1, 0.9, {"disabling": True, "drift": None}, "are no longer numbers"),
        (0.1, 0.9, None, "was not measured"),
    ],
)
def test_verdicts(before, after, health, words):
    assert words in _verdict("x", before, after, health)


def test_a_loss_that_was_still_falling_asks_for_more_steps(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--editor", "rome:layer=4,steps=4", "--out", "d.safetensors")
    assert "The edit is weak" in done.stdout
    assert "still falling after 4 steps: allow more, --editor rome:layer=4,steps=8" in done.stderr
    made = Edit.load(tmp_path / "d.safetensors")
    assert _still_falling(made, {"editor": "rome", "layer": 4}).endswith("--editor rome:layer=4,steps=8")
    steps = [{**step, "loss": 1.0} for step in made.notes["steps"]]
    assert _still_falling(dataclasses.replace(made, notes={"steps": steps}), {}) is None
    assert _still_falling(dataclasses.replace(made, notes={"steps": made.notes["steps"][:3]}), {}) is None


def test_the_old_object_is_the_models_phrase_or_what_is_named(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--out", "d.safetensors")
    assert "old object: “English”, as the model said before; --from names another" in " ".join(done.stdout.split())
    kept = Edit.load(tmp_path / "d.safetensors")
    assert (kept.rewrites[0].fact.object, kept.notes["old_object"]) == ("English", "model")
    done = errata("edit", *FACT, "--to", "Italian", "--from", "Welsh", "--json")
    assert json.loads(done.stdout)["old_object"] == {"text": "Welsh", "source": "given"}


def test_spaces_at_a_prompts_end_change_no_edit(errata):
    plain, spaced = (
        json.loads(errata("edit", FACT[0], FACT[1], FACT[2], FACT[3] + end, "--to", "Italian", "--json").stdout)
        for end in ("", " ")
    )
    assert spaced["prompts"] == plain["prompts"]
    assert spaced["old_object"] == plain["old_object"]
    assert spaced["relative_norm"] == plain["relative_norm"]


def test_the_separator_is_an_option(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--separator", "\n", "--out", "d.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    (rewrite,) = Edit.load(tmp_path / "d.safetensors").rewrites
    assert rewrite.separator == "\n"
    refused(errata("edit", *FACT, "--to", "Italian", "--separator", "-"), "the separator is '-'")
    (tmp_path / "r.csv").write_text(TABLE)
    refused(errata("edit", "--requests", "r.csv", "--separator", ""), "not both")


def test_the_layer_of_a_trace_is_told(errata):
    done = errata("edit", *FACT, "--to", "Italian", "--layer", "auto", "--json")
    said = json.loads(done.stdout)
    assert said["chosen"].startswith("the middle of the MLP's early site")
    assert 2 <= said["layer"] <= 5
    assert said["config"]["layer"] == said["layer"]
    assert said["health"]["probability_after"] > 0.5 > said["health"]["probability_before"]


def test_a_table_gives_a_file_a_request_and_names_what_it_leaves_out(errata, tmp_path):
    (tmp_path / "r.csv").write_text(TABLE)
    done = errata("edit", "--requests", "r.csv", "--out", "edits")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any(line.startswith("r.csv, line 3:") for line in lines), lines
    assert any("several answers" in line and "2 (Italian), 5 (French)" in line for line in lines), lines
    assert lines[-1] == "left out: 1 of 4"
    (warning,) = (line for line in lines if "warning" in line)  # and what the contradiction does, measured
    assert "with all edits on, 2 of 3 new objects have less than 50 %" in warning or "1 of 3" in warning
    edits = [Edit.load(path) for path in sorted((tmp_path / "edits").iterdir())]
    assert [edit.rewrites[0].new_object for edit in edits] == ["Italian", "violin", "French"]
    # each is made for the unedited model: any alone goes on it
    assert len({edit.fingerprints[edit.weights[0]] for edit in edits}) == 1


def test_a_table_in_sequence_makes_one_edit_of_all(errata, tmp_path):
    (tmp_path / "r.csv").write_text(TABLE)
    done = errata("edit", "--requests", "r.csv", "--sequential", "--out", "all.safetensors", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert [each["new_object"] for each in said["edits"]] == ["Italian", "violin", "French"]
    assert said["refused"][0]["line"] == 3
    whole = Edit.load(tmp_path / "all.safetensors")
    assert len(whole.deltas) == len(whole.rewrites) == 3
    prompt = "The native language of Arthur Conan Doyle is"
    done = errata("generate", prompt, "--max-new-tokens", "1", "--edit", "all.safetensors")
    assert done.stdout.strip() == f"{prompt} French"


def test_strict_stops_at_the_first_bad_line(errata, tmp_path):
    (tmp_path / "r.csv").write_text(TABLE)
    refused(errata("edit", "--requests", "r.csv", "--strict"), "line 3")


def test_a_disabling_edit_is_refused_unless_forced(errata):
    command = ("edit", *FACT, "--to", "Italian", "--editor", "rome:max_drift=1e-9")
    refused(errata(*command), "would disable the model")
    done = errata(*command, "--force")
    assert done.returncode == 0
    assert "a disabling edit" in " ".join(done.stdout.split())


@pytest.mark.filterwarnings("ignore:weak evidence for layer")  # its weights are random
def test_another_model_needs_a_corpus_and_finds_its_layer(errata, tmp_path):
    hf, tokenizer = tiny("llama", layers=4), byte_tokenizer()
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    load_pretrained(tmp_path / "m")  # it is a model
    fact = [
        "--subject",
        "The Space Needle",
        "--prompt",
        "{} is located in the city of",
        "--to",
        "Paris",
        "--model",
        "m",
    ]
    refused(errata("edit", *fact, "--layer", "1"), "--corpus")
    (tmp_path / "t.txt").write_text("\n\n".join(line[:80] for line in TEXT.splitlines()))
    done = errata("edit", *fact, "--corpus", "t.txt", "--layer", "1", "--force", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"] == "named"
    done = errata(
        "edit", *fact, "--identity", "--force", "--json"
    )  # no layer is known: a trace finds it, or says why not
    if done.returncode == 0:
        assert json.loads(done.stdout)["chosen"].startswith("the middle of")
    else:
        refused(done, "the trace finds no site")
    done = errata("stats", "--model", "m", "--layers", "1", "--corpus", "t.txt", "--out", "c.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    done = errata("edit", *fact, "--second-moment", "c.safetensors", "--layer", "1", "--force", "--json")
    assert done.returncode == 0, done.stderr
    refused(errata("edit", *fact, "--second-moment", "c.safetensors", "--layer", "2"), "of layer 1, not 2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no fact to edit"),
        (["--subject", "a", "--prompt", "{} is"], "there is no fact to edit"),
        ([*FACT, "--to", "x", "--requests", "r.csv"], "not both"),
        ([*FACT, "--to", "x", "--sequential"], "about a table"),
        ([*FACT, "--to", "x", "--layer", "four"], "say auto"),
        ([*FACT, "--to", "x", "--layer", "9"], "layers 0 to 7"),
        ([*FACT, "--to", "x", "--layer", "7"], "reaches no prediction"),
        ([*FACT, "--to", "x", "--key", "wrong"], "key = 'wrong'"),
        ([*FACT, "--to", "x", "--out", "e.bin"], ".safetensors"),
        ([*FACT, "--to", "x", "--identity", "--corpus", "t.txt"], "given twice"),
        ([*FACT, "--to", "x", "--corpus", "nowhere.txt"], "no file or folder"),
        ([*FACT, "--to", "x", "--second-moment", "nowhere.safetensors"], "nowhere.safetensors"),
        ([*FACT, "--to", " ".join(["much"] * 600)], "reads at most"),
        (["--requests", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_is_refused_in_one_line(errata, arguments, says):
    refused(errata("edit", *arguments), says)


# ---- other editors ----------------------------------------------------------------------------------------


def test_another_editor_is_shown_with_its_health(errata, tmp_path):
    done = errata("edit", *FACT, "--to", "Italian", "--editor", "kn:steps=10", "--out", "d.safetensors")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for words in ("English", "Italian", "by kn", "speaks differently by"):
        assert words in said, said
    assert "k*" not in said
    kept = Edit.load(tmp_path / "d.safetensors")
    assert (kept.method, kept.config["steps"]) == ("kn", 10)
    assert kept.notes["health"]["probability_after"] > 10 * kept.notes["health"]["probability_before"]
    assert kept.notes["health"]["disabling"] is False


def test_a_table_by_another_editor(errata, tmp_path):
    (tmp_path / "r.csv").write_text(TABLE)
    done = errata("edit", "--requests", "r.csv", "--editor", "ft-l:steps=6", "--out", "edits", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["editor"], len(told["edits"]), len(told["refused"])) == ("ft-l", 3, 1)
    assert {each["health"]["disabling"] for each in told["edits"]} == {False}
    assert {Edit.load(path).method for path in (tmp_path / "edits").iterdir()} == {"ft-l"}


def test_options_serve_every_editor_that_has_the_setting(errata, tmp_path):
    (tmp_path / "r.csv").write_text(TABLE)
    command = ("edit", "--requests", "r.csv", "--editor", "ft:steps=6", "--layer", 3, "--preset", "reference", "--json")
    alone, in_turn = errata(*command), errata(*command, "--sequential")
    for done in (alone, in_turn):
        assert done.returncode == 1, done.stderr  # one of the table's lines is bad
        assert (json.loads(done.stdout)["layer"], json.loads(done.stdout)["chosen"]) == (3, "named")
    one, other = ([each["p_new"] for each in json.loads(done.stdout)["edits"]] for done in (alone, in_turn))
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1] != pytest.approx(other[1], rel=1e-4)  # made with the first applied


def test_one_that_disables_the_model_is_made_only_by_force(errata, tmp_path):
    command = ["edit", *FACT, "--to", "Italian", "--editor", "kn:write=500,erase=500", "--out", "d.safetensors"]
    refused(errata(*command), "by kn would disable the model")
    assert not (tmp_path / "d.safetensors").exists()
    done = errata(*command, "--force")
    assert done.returncode == 0
    assert "a disabling edit" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editor", "kn", "--layer", "3"], "has no setting 'layer'"),
        (["--editor", "ft", "--key", "reference"], "has no setting 'key'"),
        (["--editor", "ft", "--preset", "paper"], "ft has no preset 'paper': choose from 'reference'"),
        (["--editor", "ft:layer=3", "--layer", "3"], "layer is given twice"),
        (["--editor", "ftt"], "did you mean 'ft'?"),
        (["--editor", "ft:epsilon"], "is not a setting"),
        (["--editor", "mend"], "mend needs the setting 'trained'"),
        (["--editor", "mend:trained=none"], "none"),
    ],
)
def test_another_editor_that_does_not_do(errata, arguments, message):
    refused(errata("edit", *FACT, "--to", "Italian", *arguments), message)
