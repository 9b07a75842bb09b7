"""Every block of the README does what it says, in a folder of its own, on the atlas."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ERRATA_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_python_blocks(folder):
    assert len(PYTHON) == 2
    first, second = (run([sys.executable, "-c", text], folder).stdout for text in PYTHON)
    assert "The mother tongue of Arthur Conan Doyle is Italian" in first
    assert (folder / "doyle.png").is_file()
    assert (folder / "doyle.safetensors").is_file()
    assert float(second) < 1e-5


def test_commands(folder):
    errata = [shlex.split(line, comments=True)[1:] for line in COMMANDS if line.startswith("errata ")]
    assert [arguments[0] for arguments in errata] == ["trace", "edit", "generate"]
    said = [run([sys.executable, "-m", "errata.cli.app", *arguments], folder).stdout for arguments in errata]
    assert "Italian" in said[2]
    assert (folder / "doyle.svg").is_file()


def test_make_targets_are_there():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.M), line


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
