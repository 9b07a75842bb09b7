"""Progress lines of a long command, at least one a minute, where standard error is not a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

EVERY = 60.0  # seconds

_stages: list[str] = []  # what is under way, and how far it has come; the innermost last


@contextlib.contextmanager
def stage(what: str) -> Iterator[list[str]]:
    """Context in which the lines show this text. The last item of the yielded list can be replaced."""
    _stages.append(what)
    try:
        yield _stages
    finally:
        _stages.pop()


@contextlib.contextmanager
def lines(command: str) -> Iterator[None]:
    """Context with a line every minute on standard error; none on a terminal, which shows progress bars instead."""
    if sys.stderr.isatty():
        yield
        return
    done, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(EVERY):
            minutes, seconds = divmod(int(time.monotonic() - begun), 60)
            text = _stages[-1] if _stages else "running"
            with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
                print(f"{command}: {text} ({minutes}:{seconds:02} min)", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
