"""The golden numbers themselves: the model they were computed on, their size, and that no test of them is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import goldens


def test_tiny_np_is_the_model_of_the_goldens():
    forward, model = goldens.arrays("forward"), goldens.tiny_np()
    with torch.no_grad():
        logits = model.hf(torch.from_numpy(forward["input_ids"])[None]).logits[0].numpy()
    assert goldens.difference(logits[-1], forward["logits_last"])[1] < 2e-6
    assert np.allclose(logits[:, :16], forward["logit_first16_all_pos"], atol=1e-4)


def test_the_folder_stays_small():
    files = [path for path in goldens.GOLDENS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert max(path.stat().st_size for path in files) < 2e6


SKIPPED = {
    "the body": "def test(): pytest.skip('absent')",
    "a fixture": "@pytest.fixture\ndef it(): pytest.skip('absent')\n\ndef test(it): pass",
    "a mark": "@pytest.mark.skip(reason='absent')\ndef test(): pass",
    "the module": "pytest.importorskip('absent')\n\ndef test(): pass",
}


@pytest.mark.parametrize("source", SKIPPED.values(), ids=SKIPPED)
def test_a_skipped_golden_test_fails(source, tmp_path):
    for name, fails in (("test_a_goldens.py", True), ("test_a.py", False)):
        (tmp_path / name).write_text(f"import pytest\n\n{source}\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", os.devnull, "--rootdir", ".", name]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ("1 skipped" in done.stdout) != fails, done.stdout + done.stderr
        assert ("so a test of them is never skipped" in done.stdout) == fails
