"""Every block of the README and of the guides does what it says, in a folder of its own, on the atlas."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from errata.atlas import corpus, world

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [block for its, block in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.M | re.S) if its == language]


def commands(document: str) -> list[str]:
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    home = str(folder / "home")
    environment = {**os.environ, "ERRATA_HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_python_blocks(folder):
    first, second = (run([sys.executable, "-c", text], folder).stdout for text in blocks("README.md", "python"))
    assert "The mother tongue of Arthur Conan Doyle is Italian" in first
    assert (folder / "doyle.png").is_file()
    assert (folder / "doyle.safetensors").is_file()
    assert float(second) < 1e-5


def test_commands(folder):
    errata = [shlex.split(line, comments=True)[1:] for line in commands("README.md") if line.startswith("errata ")]
    assert [arguments[0] for arguments in errata] == ["trace", "edit", "generate", "evaluate", "report"]
    said = [run([sys.executable, "-m", "errata.cli.app", *arguments], folder).stdout for arguments in errata]
    assert "Italian" in said[2]
    assert (folder / "doyle.svg").is_file()
    assert (folder / "run.html").is_file()


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands("README.md"):
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.M), line


def test_the_guide_to_tracing(tmp_path):
    doyle, prompt = "Arthur Conan Doyle", "{} is a native speaker of"
    rows = ["subject,prompt,object", f"{doyle},{prompt},English", "Roy Hargrove,{} is known for playing the,trumpet"]
    (tmp_path / "candidates.csv").write_text("\n".join([*rows, "Toyota RAV4,{} is made by the company,Finland"]))
    for text in blocks("docs/tracing.md", "python"):
        run([sys.executable, "-c", text], tmp_path)
    for name in ("doyle.jsonl", "doyle.png", "traces.jsonl", "averages.csv", "averages.png", "lines.png"):
        assert (tmp_path / name).stat().st_size > 1000, name
        (tmp_path / name).unlink()
    for line in commands("docs/tracing.md"):
        run([sys.executable, "-m", "errata.cli.app", *shlex.split(line, comments=True)[1:]], tmp_path)
    assert (tmp_path / "known.csv").read_text().count("\n") == 3
    for name in ("traces.jsonl", "averages.csv", "averages.png", "lines.svg"):
        assert (tmp_path / name).stat().st_size > 1000, name


REQUESTS = """subject,prompt,new_object
Arthur Conan Doyle,The native language of {} is,Italian
Roy Hargrove,{} is known for playing the,violin
"""


def test_the_guide_to_editing(tmp_path):
    (tmp_path / "requests.csv").write_text(REQUESTS)
    (first, second) = (
        run([sys.executable, "-c", text], tmp_path).stdout for text in blocks("docs/editing.md", "python")
    )
    assert "The mother tongue of Arthur Conan Doyle is Italian" in first
    assert "Roy Hargrove -> violin" in second
    said = [
        run([sys.executable, "-m", "errata.cli.app", *shlex.split(line, comments=True)[1:]], tmp_path).stdout
        for line in commands("docs/editing.md")
    ]
    assert "Italian" in said[1]
    assert len(list((tmp_path / "edits").iterdir())) == 2
    for name in ("adapter/adapter_config.json", "all.safetensors", "sweep.jsonl", "sweep.png", "sequence.png"):
        assert (tmp_path / name).stat().st_size > 100, name


def test_the_guide_to_evaluation(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(itertools.islice(corpus.texts(world.load_world(), 3), 5)))
    (text,) = blocks("docs/evaluation.md", "python")
    assert "{0: 1.0, " in run([sys.executable, "-c", text], tmp_path).stdout
    said = [
        run([sys.executable, "-m", "errata.cli.app", *shlex.split(line, comments=True)[1:]], tmp_path).stdout
        for line in commands("docs/evaluation.md")
    ]
    assert "reference" in said[0]
    assert "<html" in (tmp_path / "run.html").read_text()
    assert "toprule" in said[2]
    assert "foretold" in said[4]


def test_the_guide_to_editors(tmp_path):
    (text,) = blocks("docs/editors.md", "python")
    assert "The mother tongue of Arthur Conan Doyle is Italian" in run([sys.executable, "-c", text], tmp_path).stdout
    said = [
        run([sys.executable, "-m", "errata.cli.app", *shlex.split(line, comments=True)[1:]], tmp_path).stdout
        for line in commands("docs/editors.md")
    ]
    assert all(name in said[0] for name in ("rome", "ft-l", "attention", "kn", "mend", "ke"))
    assert "epsilon" in said[1]
    for name in ("doyle.safetensors", "losses.png", "layers.svg", "attention.svg", "mend-cf/editor.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_the_guide_to_second_moments(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(itertools.islice(corpus.texts(world.load_world(), 3), 60)))
    (text,) = blocks("docs/statistics.md", "python")
    assert "Halves(" in run([sys.executable, "-c", text], tmp_path).stdout


def test_the_guide_to_serving(tmp_path):
    (tmp_path / "tasks").mkdir()
    for language in ("jsonl", "yaml"):
        (text,) = blocks("docs/serving.md", language)
        (tmp_path / "tasks" / f"facts.{language}").write_text(text)
    said = [run([sys.executable, "-c", text], tmp_path).stdout for text in blocks("docs/serving.md", "python")]
    assert float(said[1]) < 1e-5  # PEFT's logits against the applied edit's
    assert said[2].split() == ["0.25", "1.0"]
    for line in commands("docs/serving.md"):
        program, *arguments = shlex.split(line, comments=True)
        module = {"errata": "errata.cli.app"}.get(program, program)
        table = run([sys.executable, "-m", module, *arguments], tmp_path).stdout
        assert program != "lm_eval" or re.search(r"\|acc *\|↑ *\| *1\|", table)
    for name in ("edited-atlas/errata.json", "doyle-model/errata.json", "doyle-lora/adapter_config.json"):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / document).parent / target).exists(), target
