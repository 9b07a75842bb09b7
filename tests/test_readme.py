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


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def said_by(errata, document: str) -> list[str]:
    """What each command of a document says, one after the other in one folder; this process is the command line's."""
    found = []
    for line in commands(document):
        program, *arguments = shlex.split(line, comments=True)
        if program == "errata":
            done = errata(*arguments)
            assert done.returncode == 0, (line, done.stderr)
            found.append(done.stdout)
    return found


def test_python_blocks(tmp_path):
    folder = tmp_path
    first, second = (run([sys.executable, "-c", text], folder).stdout for text in blocks("README.md", "python"))
    assert "The mother tongue of Arthur Conan Doyle is Italian" in first
    assert (folder / "doyle.png").is_file()
    assert (folder / "doyle.safetensors").is_file()
    assert float(second) < 1e-5


def test_commands(errata, tmp_path):
    lines = [shlex.split(line, comments=True)[1] for line in commands("README.md") if line.startswith("errata ")]
    assert lines == ["trace", "edit", "generate", "evaluate", "report"]
    said = said_by(errata, "README.md")
    assert "Italian" in said[2]
    assert (tmp_path / "doyle.svg").is_file()
    assert (tmp_path / "run.html").is_file()


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands("README.md"):
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.M), line


def test_the_guide_to_tracing(errata, tmp_path):
    doyle, prompt = "Arthur Conan Doyle", "{} is a native speaker of"
    rows = ["subject,prompt,object", f"{doyle},{prompt},English", "Roy Hargrove,{} is known for playing the,trumpet"]
    (tmp_path / "candidates.csv").write_text("\n".join([*rows, "Toyota RAV4,{} is made by the company,Finland"]))
    for text in blocks("docs/tracing.md", "python"):
        run([sys.executable, "-c", text], tmp_path)
    for name in ("doyle.jsonl", "doyle.png", "traces.jsonl", "averages.csv", "averages.png", "lines.png"):
        assert (tmp_path / name).stat().st_size > 1000, name
        (tmp_path / name).unlink()
    said_by(errata, "docs/tracing.md")
    assert (tmp_path / "known.csv").read_text().count("\n") == 3
    for name in ("traces.jsonl", "averages.csv", "averages.png", "lines.svg"):
        assert (tmp_path / name).stat().st_size > 1000, name


REQUESTS = """subject,prompt,new_object
Arthur Conan Doyle,The native language of {} is,Italian
Roy Hargrove,{} is known for playing the,violin
"""


def test_the_guide_to_editing(errata, tmp_path):
    (tmp_path / "requests.csv").write_text(REQUESTS)
    (first, second, _) = (
        run([sys.executable, "-c", text], tmp_path).stdout for text in blocks("docs/editing.md", "python")
    )
    assert "The mother tongue of Arthur Conan Doyle is Italian" in first
    assert "Roy Hargrove -> violin" in second
    said = said_by(errata, "docs/editing.md")
    assert "Italian" in said[1]
    assert len(list((tmp_path / "edits").iterdir())) == 2
    for name in ("adapter/adapter_config.json", "all.safetensors", "sweep.jsonl", "sweep.png", "sequence.png"):
        assert (tmp_path / name).stat().st_size > 100, name


def test_the_guide_to_evaluation(errata, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(itertools.islice(corpus.texts(world.load_world(), 3), 5)))
    (text,) = blocks("docs/evaluation.md", "python")
    assert "{0: 1.0, " in run([sys.executable, "-c", text], tmp_path).stdout
    said = said_by(errata, "docs/evaluation.md")
    assert "reference" in said[0]
    assert "<html" in (tmp_path / "run.html").read_text()
    assert "toprule" in said[2]
    assert "foretold" in said[4]


def test_the_guide_to_editors(errata, tmp_path):
    (text,) = blocks("docs/editors.md", "python")
    assert "The mother tongue of Arthur Conan Doyle is Italian" in run([sys.executable, "-c", text], tmp_path).stdout
    said = said_by(errata, "docs/editors.md")
    assert all(name in said[0] for name in ("rome", "ft-l", "attention", "kn", "mend", "ke"))
    assert "epsilon" in said[1]
    for name in ("doyle.safetensors", "losses.png", "layers.svg", "attention.svg", "mend-cf/editor.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_the_guide_to_data(tmp_path):
    (text,) = blocks("docs/data.md", "python")
    said = run([sys.executable, "-c", text], tmp_path).stdout
    assert said == "法国的首都是巴黎\ncapital(France)=Paris\nThe capital of France is\nParis\n"


def test_the_guide_to_second_moments(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(itertools.islice(corpus.texts(world.load_world(), 3), 60)))
    (text,) = blocks("docs/statistics.md", "python")
    assert "Halves(" in run([sys.executable, "-c", text], tmp_path).stdout


def test_the_guide_to_serving(errata, tmp_path):
    (tmp_path / "tasks").mkdir()
    for language in ("jsonl", "yaml"):
        (text,) = blocks("docs/serving.md", language)
        (tmp_path / "tasks" / f"facts.{language}").write_text(text)
    said = [run([sys.executable, "-c", text], tmp_path).stdout for text in blocks("docs/serving.md", "python")]
    assert float(said[1]) < 1e-5  # PEFT's logits against the applied edit's
    assert said[2].split() == ["0.25", "1.0"]
    said_by(errata, "docs/serving.md")
    for line in commands("docs/serving.md"):
        if line.startswith("lm_eval "):
            table = run([sys.executable, "-m", *shlex.split(line, comments=True)], tmp_path).stdout
            assert re.search(r"\|acc *\|↑ *\| *1\|", table)
    for name in ("edited-atlas/errata.json", "doyle-model/errata.json", "doyle-lora/adapter_config.json"):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / document).parent / target).exists(), target
