"""Samples of published data sets, which are not part of the project: tests that read one are skipped without it."""

from __future__ import annotations

from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "shared" / "data"


def sample(name: str) -> Path:
    """Path of `NAME_sample.json`; skips the test if the file does not exist."""
    path = SAMPLES / f"{name}_sample.json"
    if not path.is_file():
        pytest.skip(f"the samples of published data sets are not in {SAMPLES}")
    return path
