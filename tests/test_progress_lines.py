"""Signs of life of long commands: lines where there is no terminal, none where there are bars."""

from __future__ import annotations

import re
import sys
import time

import pytest

from errata.cli import app, progress_lines, show


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(progress_lines, "EVERY", 0.05)


@pytest.fixture
def slow(monkeypatch):
    """A command that takes its time."""

    def run(work) -> str:
        monkeypatch.setattr(app, "app", lambda standalone_mode: work())
        monkeypatch.setattr(sys, "argv", ["errata", "sweep", "--out", "x"])
        with pytest.raises(SystemExit):
            app.main()

    return run


def test_every_command_says_that_it_runs_and_how_far_it_has_come(slow, capsys):
    def work() -> None:
        time.sleep(0.12)
        with show.progress("sweeping", "edits") as bar:
            time.sleep(0.12)
            bar(3, 30)
            time.sleep(0.12)
            bar(4, None)
            time.sleep(0.12)
        time.sleep(0.12)

    slow(work)
    said = [re.sub(r" \(\d+:\d\d min\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert list(dict.fromkeys(said)) == [
        "errata sweep: running",
        "errata sweep: sweeping",
        "errata sweep: sweeping: 3 of 30 edits",
        "errata sweep: sweeping: 4 edits",
    ]
    assert said[0] == said[-1]
    time.sleep(0.12)
    assert not capsys.readouterr().err  # it ends with the command


def test_on_a_terminal_there_are_bars_and_no_lines(slow, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    slow(lambda: time.sleep(0.12))
    assert not capsys.readouterr().err


def test_short_commands_say_nothing(slow, capsys, monkeypatch):
    monkeypatch.setattr(progress_lines, "EVERY", 60)
    slow(lambda: None)
    assert not capsys.readouterr().err
