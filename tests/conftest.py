"""Tests need no network and leave nothing in the user's home."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # tests that run beside each other have a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


SLOW = Path(__file__).with_name("slow.txt")


def pytest_collection_modifyitems(items):
    """Marks as slow the tests that `slow.txt` names: a file, a test of it, or one case of that."""
    named = {line for line in SLOW.read_text("utf-8").split("\n") if line and not line.startswith("#")}
    for item in items:
        case = item.nodeid.removeprefix("tests/")
        if named & {case, case.split("[")[0], case.split("::")[0]}:
            item.add_marker("slow")


def _failed_if_skipped(report) -> None:
    """Turns a skip into a failure."""
    if report.skipped:
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"golden numbers are part of the project, so a test of them is never skipped. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if item.path.stem.endswith("_goldens") or "goldens." in inspect.getsource(item.function):
        _failed_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if collector.path.stem.endswith("_goldens"):
        _failed_if_skipped(report)
    return report


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_HOME", str(tmp_path_factory.mktemp("errata-home")))
        yield


@pytest.fixture
def errata(monkeypatch, capsys, tmp_path):
    """The command line in this process, in an empty folder."""
    from helpers.command_line import in_process

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that serves files as the web does."""
    from helpers.web import running_server

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def worlds_built_once():
    """The atlas's world is built once a number and a seed."""
    from errata.atlas import records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "built", functools.cache(records.built))
        yield
