"""Every block of README and of the docs does what it says, in a folder of its own, on the atlas."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from errata.atlas import corpus, world
from errata.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

RUN = {"python", "sh"}  # blocks of these languages are run here
SHOWN = {"text", "console", "bash", "toml", "yaml", "json", "jsonl", "csv"}  # these are only shown, or are files
OUTPUT = "output"  # what the block of Python before it prints, to the character


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, without directives of Sphinx such as ```{toctree}."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [Block(*block) for block in found if not block[0].startswith("{")]


def is_run(page: str) -> bool:
    return any(block.language in RUN for block in blocks(page))


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}


# Runs blocks one after the other. A block that imports errata begins anew; others go on with its names.
INTERPRETER = """
import json, sys

for line in sys.stdin:
    text = json.loads(line)
    if "import errata" in text:
        names = {"__name__": "__main__"}
    exec(compile(text, "block", "exec"), names)
    print("\\0", flush=True)
"""


class Interpreter:
    """A Python process in a folder that runs the blocks of a page."""

    def __init__(self, folder: Path) -> None:
        self.errors = folder / "stderr.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", INTERPRETER],
                cwd=folder,
                env=environment(folder),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def run(self, text: str) -> str:
        """Output of a block."""
        self.process.stdin.write(json.dumps(text) + "\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line.endswith("\0\n"):
                return "".join([*lines, line[:-2]])
            lines.append(line)
        raise AssertionError(f"{text}\n{self.errors.read_text()}")

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def run_command(line: str, errata: Callable, folder: Path) -> str:
    """Output of a line of a shell block."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "errata":  # in this process: no interpreter to start
        done = errata(*arguments)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, flags=re.M), line
        return ""
    assert program == "lm_eval", f"{line}: nothing runs {program} here"
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def run_blocks(page: str, errata: Callable, folder: Path) -> Iterator[tuple[str, str]]:
    """Language and output of each Python block and each shell command, in the order of the page."""
    said = ""
    with Interpreter(folder) as interpreter:
        for language, text in blocks(page):
            if language == "python":
                said = interpreter.run(text)
                yield language, said
            elif language == OUTPUT:
                assert said.strip() == text.strip()
            elif language == "sh":
                for line in filter(str.strip, text.replace("\\\n", " ").splitlines()):
                    yield language, run_command(line, errata, folder)


class Page(NamedTuple):
    """How the blocks of a page are tested.

    Attributes:
        prepare: writes the files that the page takes for given.
        files: files that its blocks write, of more than 100 bytes each.
        check: asserts about the output of its Python blocks and of its commands.
    """

    prepare: Callable[[Path], object] = lambda folder: None
    files: tuple[str, ...] = ()
    check: Callable[[list[str], list[str]], None] = lambda python, sh: None


def texts(count: int) -> str:
    return "\n\n".join(itertools.islice(corpus.texts(world.load_world(), 3), count))


def check_readme(python: list[str], sh: list[str]) -> None:
    assert "The mother tongue of Arthur Conan Doyle is Italian" in python[0]
    assert "Italian" in sh[4]  # after two of make


def check_models(python: list[str], sh: list[str]) -> None:
    assert float(python[0]) < 1e-5


CANDIDATES = """subject,prompt,object
Arthur Conan Doyle,{} is a native speaker of,English
Roy Hargrove,{} is known for playing the,trumpet
Toyota RAV4,{} is made by the company,Finland
"""

REQUESTS = """subject,prompt,new_object
Arthur Conan Doyle,The native language of {} is,Italian
Roy Hargrove,{} is known for playing the,violin
"""


def check_editing(python: list[str], sh: list[str]) -> None:
    assert "The mother tongue of Arthur Conan Doyle is Italian" in python[0]
    assert "Roy Hargrove -> violin" in python[1]
    assert "Italian" in sh[1]


def check_evaluation(python: list[str], sh: list[str]) -> None:
    assert "{0: 1.0, " in python[0]
    assert "reference" in sh[0]
    assert "toprule" in sh[2]
    assert "foretold" in sh[4]


def check_editors(python: list[str], sh: list[str]) -> None:
    assert "The mother tongue of Arthur Conan Doyle is Italian" in python[0]
    assert all(name in sh[0] for name in ("rome", "ft-l", "attention", "kn", "mend", "ke"))
    assert "epsilon" in sh[1]


def prepare_data(folder: Path) -> None:
    for block in blocks("docs/how-to/data.md"):
        if block.language in ("csv", "json"):
            (folder / {"csv": "catalogue.csv", "json": "templates.json"}[block.language]).write_text(block.text)


def check_data(python: list[str], sh: list[str]) -> None:
    assert python[0] == "法国的首都是巴黎\ncapital(France)=Paris\nThe capital of France is\nParis\n"
    assert "27 records of 29 facts" in " ".join(sh[0].split())


def prepare_statistics(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(texts(60))


def check_statistics(python: list[str], sh: list[str]) -> None:
    assert "Halves(" in python[0]


def prepare_serving(folder: Path) -> None:
    (folder / "tasks").mkdir()
    for block in blocks("docs/how-to/serving.md"):
        if block.language in ("jsonl", "yaml"):
            (folder / "tasks" / f"facts.{block.language}").write_text(block.text)


def check_serving(python: list[str], sh: list[str]) -> None:
    assert float(python[1]) < 1e-5  # PEFT's logits against the applied edit's
    assert python[2].split() == ["0.25", "1.0"]
    tables = [said for said in sh if re.search(r"\|acc *\|↑ *\| *1\|", said)]
    assert len(tables) == 2


def check_tutorial(python: list[str], sh: list[str]) -> None:
    assert "Italian" in sh[2]


TESTED = {
    "README.md": Page(files=("doyle.png", "doyle.svg", "doyle.safetensors", "run.html"), check=check_readme),
    "docs/tutorial.md": Page(
        files=("doyle.png", "doyle.svg", "edit.safetensors", "doyle-lora/adapter_config.json"), check=check_tutorial
    ),
    "docs/how-to/models.md": Page(check=check_models),
    "docs/how-to/tracing.md": Page(
        prepare=lambda folder: (folder / "candidates.csv").write_text(CANDIDATES),
        files=("doyle.jsonl", "doyle.png", "traces.jsonl", "averages.csv", "averages.png", "lines.png", "lines.svg"),
    ),
    "docs/how-to/editing.md": Page(
        prepare=lambda folder: (folder / "requests.csv").write_text(REQUESTS),
        files=(
            "adapter/adapter_config.json",
            "all.safetensors",
            "sweep/unedited.jsonl",
            "sweep.png",
            "sweep.svg",
            "sequence.png",
        ),
        check=check_editing,
    ),
    "docs/how-to/evaluation.md": Page(
        prepare=lambda folder: (folder / "text.txt").write_text(texts(5)), files=("run.html",), check=check_evaluation
    ),
    "docs/how-to/editors.md": Page(
        files=("doyle.safetensors", "losses.png", "layers.svg", "attention.svg", "mend-cf/editor.safetensors"),
        check=check_editors,
    ),
    "docs/how-to/data.md": Page(prepare=prepare_data, files=("catalogue/counterfact.json",), check=check_data),
    "docs/how-to/statistics.md": Page(prepare=prepare_statistics, check=check_statistics),
    "docs/how-to/serving.md": Page(
        prepare=prepare_serving,
        files=("edited-atlas/errata.json", "doyle-model/errata.json", "doyle-lora/adapter_config.json"),
        check=check_serving,
    ),
}


@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)])
def test_every_block_runs(page, errata, tmp_path):
    assert page in TESTED, f"{page} has blocks to run: say in TESTED what they do"
    prepare, files, check = TESTED[page]
    prepare(tmp_path)
    done = list(run_blocks(page, errata, tmp_path))
    check(*([output for language, output in done if language == wanted] for wanted in ("python", "sh")))
    for name in files:
        assert (tmp_path / name).stat().st_size > 100, name


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_is_run_or_shown(page):
    """So no block is left out by a misspelling."""
    for language, text in blocks(page):
        assert language in RUN | SHOWN | {OUTPUT}, (language, text)


def shown_commands() -> list[str]:
    """Commands of errata in blocks that are only shown."""
    lines = [
        line
        for page in PAGES
        for language, text in blocks(page)
        if language in SHOWN
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [found[1] for line in lines if (found := re.search(r"(?:^|[$-] |: )(errata [a-z].*)", line.strip()))]


def test_commands_that_are_only_shown_have_options_that_exist():
    commands = shown_commands()
    assert len(commands) >= 10
    for line in commands:
        words = shlex.split(line.replace("…", ""), comments=True)[1:]
        command = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{line}: there is no such command"
        known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        assert {word for word in words if re.match("--[a-z]", word)} <= {*known, "--help"}, line


WITH_LINKS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_LINKS)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#([^)]+))?\)", text):
        path = (ROOT / page).parent / target
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), (target, anchor)


@pytest.mark.parametrize("page", WITH_LINKS)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`(?:python )?(?!my_)((?:\w+/)*\w+\.py)`", text):  # my_package is the reader's
        here = (ROOT / name).is_file() or (ROOT / "tests" / name).is_file()
        assert here or any((ROOT / "src").rglob(name)), name
