"""The command line as a user has it, in a process of its own or in this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

FACT = ["--subject", "Arthur Conan Doyle", "--prompt", "The native language of {} is"]


def errata(*arguments: str, cwd=None) -> subprocess.CompletedProcess:

    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "errata.cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=500, check=False)


def in_process(monkeypatch, capsys, *arguments: str) -> subprocess.CompletedProcess:
    """The same without the seconds of a new interpreter."""
    from errata.cli.app import main

    monkeypatch.setattr(sys, "argv", ["errata", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code or 0
    said = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, said.out, said.err)


def refused(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert re.match(r"error: ", lines[0])
    assert message in lines[0]
