"""Two pretrained models, from the folder that `make test-real` names in ERRATA_REAL_MODELS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext" / "valid.txt"


def _folder(name: str) -> Path:
    root = os.environ.get("ERRATA_REAL_MODELS")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs the pretrained model {name}: run `make test-real`")
    return Path(root) / name


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct: Llama's architecture, 30 layers, a tokenizer that adds no start token."""
    import errata

    return errata.load_model(_folder("smollm2"))


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M (base): 18 layers, a tokenizer that adds `<bos>`."""
    import errata

    return errata.load_model(_folder("gemma3"))


@pytest.fixture(scope="session")
def wikitext() -> list[str]:
    """Paragraphs of Wikipedia text."""
    if not TEXT.is_file():
        pytest.skip(f"needs ordinary text: there is no {TEXT}")
    return [line for line in TEXT.read_text().splitlines() if len(line) > 100]
