"""The command line as a user has it: exit codes, one-line errors, JSON, files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from helpers.command_line import FACT, errata, in_process, refused


@pytest.fixture(autouse=True)
def _as_in_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def edit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "doyle.safetensors"
    done = errata("edit", *FACT, "--to", "Italian", "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout)


def test_help_is_quick_because_it_loads_no_torch():
    code = (
        "import sys; sys.argv = ['errata', '--help']\n"
        "from errata.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "trace", "average", "gradients", "figure", "facts", "edit", "generate"):
        assert command in done.stdout


def test_import_brings_in_no_torch():
    code = "import sys, errata; assert 'torch' not in sys.modules; errata.Fact; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_edit_changes_the_answer_and_saves(edit_file):
    path, said = edit_file
    assert path.is_file()
    (row,) = said["prompts"]
    assert row["before"].startswith("English")
    assert row["after"].startswith("Italian")
    assert row["p_new_after"] > 0.5 > row["p_new_before"]
    assert said["saved"] == str(path)


def test_generate_with_and_without_the_edit(edit_file, monkeypatch, capsys):
    path, said = edit_file
    prompt = "The native language of Arthur Conan Doyle is"
    plain, edited = (
        json.loads(in_process(monkeypatch, capsys, "generate", prompt, "--max-new-tokens", "1", "--json", *more).stdout)
        for more in ((), ("--edit", path))
    )
    assert plain["text"] == f"{prompt} English"
    assert edited["text"] == f"{prompt} Italian"
    assert edited["edits"] == [said["id"]]


def test_sampling_is_seeded(monkeypatch, capsys):
    asked = ("generate", "Roy Hargrove", "--top-k", "5", "--seed")

    def sampled(seed):
        return in_process(monkeypatch, capsys, *asked, seed).stdout

    assert sampled(1) == errata(*asked, 1).stdout
    assert sampled(1) != sampled(2)


def test_trace_prints_draws_and_saves(tmp_path, monkeypatch, capsys):
    picture, saved = tmp_path / "t.png", tmp_path / "t.jsonl"
    done = errata("trace", *FACT, "--samples", "2", "--out", picture, "--save", saved, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answer"].strip() == "English"
    assert found["clean"] > found["corrupted"]
    assert set(found["restored"]) == {"state", "mlp", "attention"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert saved.is_file()
    shown = in_process(monkeypatch, capsys, "trace", *FACT, "--samples", "2")
    assert "oyle*" in shown.stdout
    assert "subject_last" in shown.stdout


def test_demo_leaves_its_picture_and_edit(tmp_path, monkeypatch, capsys):
    done = errata("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["exact_undo"] is True
    by_kind = {}
    for row in said["rows"]:
        assert row["before"] == row["after"]
        by_kind.setdefault(row["kind"], []).append(row)
    assert all(r["during"].startswith("Italian") for r in [*by_kind["rewrite"], *by_kind["paraphrase"]])
    assert all(r["during"] == r["before"] for r in by_kind["neighbour"])
    assert by_kind["free text"][0]["during"] != by_kind["free text"][0]["before"]
    assert (tmp_path / said["picture"]).is_file()
    assert (tmp_path / said["edit"]).is_file()
    monkeypatch.chdir(tmp_path)
    again = in_process(monkeypatch, capsys, "demo")
    assert again.returncode == 0
    assert "byte for byte" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "--subject", "Rome", "--prompt", "Rome is in"], "0 places for the subject"),
        (["trace", "--subject", "Rome", "--prompt", "{} and {} are in"], "2 places for the subject"),
        (["trace", "--subject", " ", "--prompt", "{} is in"], "subject is empty"),
        (["trace", "--subject", "Rome", "--prompt", ""], "prompt is empty"),
        (["trace", "--subject", "Rome " * 400, "--prompt", "{} is in"], "reads at most"),
        (["trace", *FACT, "--samples", "0"], "--samples"),
        (["trace", *FACT, "--model", "no-such/model"], "no-such/model"),
        (["trace", *FACT, "--model", "./no-such-folder"], "no-such-folder"),
        (["trace", *FACT, "--device", "cuda:7"], "cuda:7"),
        (["trace", *FACT, "--device", "abacus"], "abacus"),
        (["trace", *FACT, "--dtype", "int3"], "int3"),
        (["trace", *FACT, "--samples", "1", "--out", "t.xyz"], ".xyz"),
        (["trace", *FACT, "--samples", "1", "--out", "/proc/none/t.png"], "cannot write"),
        (["edit", *FACT, "--to", " "], "new object is empty"),
        (["edit", *FACT, "--to", "Italian", "--layer", "8"], "layers 0 to 7"),
        (["edit", *FACT, "--to", "Italian", "--layer", "-1"], "layer"),
        (["edit", *FACT, "--to", "Italian", "--key", "golden"], "key"),
        (["edit", *FACT, "--to", "Italian", "--out", "/proc/none/e.safetensors"], "cannot write"),
        (["edit", *FACT, "--to", "Italian", "--corpus", "none.txt"], "none.txt"),
        (["generate", " "], "prompt is empty"),
        (["generate", "Rome", "--top-k", "0"], "top_k"),
        (["generate", "Rome", "--edit", "none.safetensors"], "none.safetensors"),
        (["demo", "--out", "/proc/none"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(in_process(monkeypatch, capsys, *arguments), message)
    assert not list(tmp_path.iterdir())


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    import torch

    from errata.cli import app

    def full(**settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(app, "app", full)
    refused(in_process(monkeypatch, capsys, "trace"), "CUDA out of memory: model and work do not fit")


def test_broken_and_foreign_edit_files(edit_file, tmp_path):
    path, _ = edit_file
    whole = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("not an edit at all")
    for name in ("cut", "text"):
        refused(errata("generate", "Rome", "--edit", tmp_path / f"{name}.safetensors"), name)


def test_an_edit_applied_twice_is_refused(edit_file):
    path, _ = edit_file
    refused(errata("generate", "Rome", "--edit", path, "--edit", path), "applied")


def test_an_edit_for_other_weights_is_refused(edit_file, tmp_path):
    from tiny import byte_tokenizer, tiny

    tiny("gpt2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(errata("generate", "Rome", "--model", tmp_path, "--edit", edit_file[0]), "does not fit")


def test_another_model_needs_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))  # without second moments of other tests
    from tiny import TEXT, byte_tokenizer, tiny

    tiny("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "corpus.txt").write_text(TEXT)
    common = ["edit", "--model", tmp_path / "m", "--subject", "Rome", "--prompt", "{} is in", "--to", "Paris"]
    refused(errata(*common, "--layer", "1"), "--corpus")
    done = errata(*common, "--layer", "1", "--corpus", tmp_path / "corpus.txt", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["weights"] == ["model.layers.1.mlp.down_proj.weight"]
    assert said["relative_norm"] > 0
    assert said["prompts"][0]["p_new_after"] != said["prompts"][0]["p_new_before"]


def test_every_command_has_an_example_that_it_understands():
    found = dict(commands())
    assert {"", "trace", "data", "data build"} <= found.keys()
    for name, command in found.items():
        title, program, *arguments = shlex.split(command.epilog)
        assert (title, program) == ("Example:", "errata")
        named = " ".join(arguments[: len(name.split())])
        assert named == name
        # Raises for an option that is not there, or a command of a group.
        command.make_context(name, arguments[len(name.split()) :])
        if hasattr(command, "commands"):
            assert arguments[len(name.split())] in command.commands


@pytest.mark.parametrize("width", [80, 200])
def test_help_is_whole(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for name, command in commands():
        said = in_process(monkeypatch, capsys, *name.split(), "--help").stdout
        assert max(map(len, said.splitlines())) <= width, name
        written = [command.help, command.epilog, *(getattr(each, "help", "") for each in command.params)]
        assert said.count("…") == sum(text.count("…") for text in written if text), f"{name}: words are cut"
        assert max(said) < "\U00010000", f"{name}: an emoji, of a word between colons"
        assert command.epilog in " ".join(said.split())
        for option in command.params:
            if option.opts[0].startswith("-"):
                assert re.search(rf"{option.opts[0]}\b", said), (name, option.opts)


def commands(group=None, name=""):
    """Each command with its name, groups and commands of groups too."""
    from typer.main import get_command

    from errata.cli.app import app

    group = group or get_command(app)
    yield name, group
    for each, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {each}".strip())


def test_python_runs_the_package_and_shells_complete_its_commands(tmp_path):
    run = [sys.executable, "-m", "errata"]
    assert subprocess.run([*run, "--version"], capture_output=True, text=True, cwd=tmp_path).stdout.startswith(
        "errata "
    )
    words = {"_ERRATA_COMPLETE": "complete_bash", "COMP_WORDS": "errata tr", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['errata']; from errata.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | words
    )
    assert done.stdout.split() == ["trace", "train-editor"]


def test_the_demo_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    done = in_process(monkeypatch, capsys, "demo", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["picture"], said["exact_undo"]) == (0, None, True)
    assert (tmp_path / said["edit"]).is_file()
    assert not list(tmp_path.rglob("*.png"))
