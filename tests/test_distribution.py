"""The distribution `errata-lm`: its name in every install line, its extras, its version."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import errata
import oldest
from errata.base import extras
from errata.base.errors import MissingExtra
from errata.base.versions import DISTRIBUTION

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OPTIONAL = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", OPTIONAL, flags=re.M))


def readable() -> list[Path]:
    """Every file that may tell somebody what to install."""
    here = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    folders = [
        path
        for folder in ("docs", "src", ".github", "benchmarks")
        for pattern in ("*.md", "*.py", "*.rst", "*.html", "*.ipynb", "*.yml")
        for path in (ROOT / folder).rglob(pattern)
    ]
    return [*here, *folders]


def wrong_installs(text: str) -> list[str]:
    """Install lines that name PyPI's `errata`, and its name with extras."""
    lines = re.findall(r"(?:pip3?|uv|pipx|uvx|conda) (?:pip )?(?:install|add|run)[^\n`]*", text)
    asked = [(line, word) for line in lines for word in re.findall(r"[^\s'\",;()]+", line)]
    named = [line for line, word in asked if re.fullmatch(r"errata(\[.*)?([=<>~!].*)?", word)]
    known = "|".join(sorted(EXTRAS))
    return named + re.findall(rf"(?<![\w-])errata\[(?:{known})\b[^\]]*\]", text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install errata", 1),
        ("python -m pip install --quiet 'errata==0.1.0'", 1),
        ("pip install torch errata", 1),
        ("uv pip install errata", 1),
        ("all = ['errata[plots,ray]']", 1),
        ("pip install errata-lm\npip install 'errata-lm[ray]'\npip install '.[all]'", 0),
        ('the hint `errata["subject_sigma"]`', 0),
        ("errata demo", 0),
    ],
)
def test_wrong_install_lines_are_noticed(text, wrong):
    assert len(wrong_installs(text)) >= wrong
    assert bool(wrong_installs(text)) == bool(wrong)


def test_no_page_or_message_installs_another_errata():
    wrong = {str(path.relative_to(ROOT)): wrong_installs(path.read_text(encoding="utf-8")) for path in readable()}
    assert not {path: lines for path, lines in wrong.items() if lines}
    assert sum(DISTRIBUTION in path.read_text(encoding="utf-8") for path in readable()) >= 4


def test_extras_that_are_named_exist():
    assert {"plots", "tables", "all", "dev"} <= EXTRAS
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    pages = "\n".join(path.read_text(encoding="utf-8") for path in readable())
    named = set(re.findall(r'\bneeded\("[\w.]+", "(\w+)"\)', source))
    named |= {extra for found in re.findall(r"(?:errata-lm|\.)\[([\w,]+)\]", pages) for extra in found.split(",")}
    assert named >= {"plots", "ray", "dev"}
    assert named <= EXTRAS


def test_only_one_place_tells_what_to_install():
    says = [path for path in (ROOT / "src").rglob("*.py") if "pip install" in path.read_text(encoding="utf-8")]
    assert says == [Path(extras.__file__)]
    with pytest.raises(MissingExtra, match=r"pip install 'errata-lm\[plots\]'"):
        extras.needed("errata.absent", "plots")


def test_the_version_is_that_of_the_distribution():
    (version,) = re.findall(r'^version = "(.+)"', PYPROJECT, flags=re.M)
    assert errata.__version__ == metadata.version(DISTRIBUTION) == version
    sources = [path for path in (ROOT / "src").rglob("*.py") if version in path.read_text(encoding="utf-8")]
    assert not sources


def test_a_source_folder_works_without_being_installed(tmp_path):
    hide = (
        "import importlib.metadata as m; real = m.version\n"
        "def version(name):\n    if name == 'errata-lm': raise m.PackageNotFoundError(name)\n    return real(name)\n"
        "m.version = version; import errata; print(errata.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "unknown"


# ---- the pages around the code ------------------------------------------------------------------------


def test_oldest_versions_are_the_lower_bounds_of_pyproject():
    declared = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, flags=re.M | re.S)[1].strip().splitlines()
    names = {re.match(r'\s*"([\w-]+)>=', line)[1]: line for line in declared}
    lines = oldest.constraints()
    for name, line in names.items():
        (bound,) = (found.split("==")[1] for found in lines if found.startswith(f"{name}=="))
        assert f'"{name}>={bound}' in line
    assert len(names) >= 11
    assert any(line.startswith("pytest==") for line in lines)


def test_the_contributing_guide_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([\w-]+)\b", text.replace("that `make`", ""))
    assert len(targets) >= 5
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    paths = re.findall(r"`((?:src|tests|docs)/[\w./]+)`", text) + re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text)
    assert len(paths) >= 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    for page, anchor in re.findall(r"\]\(([\w./]+)#([\w-]+)\)", text):
        titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
        assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_the_changelog_has_this_version_or_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.match(r"# Changelog\n", text)
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.M)
    assert headings[0] == "Unreleased"
    assert len(headings) == 1 or errata.__version__ in headings
