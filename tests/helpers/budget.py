"""Sizes of random tests: all examples in `make test-all`, a fifth of them in `make test`."""

from __future__ import annotations

import os

FULL = os.environ.get("ERRATA_TESTS") == "all"


def examples(count: int) -> int:
    """Number of examples of a random test in this run."""
    return count if FULL else max(20, count // 5)
