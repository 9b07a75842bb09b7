"""Tests need no network and leave nothing in the user's home."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_HOME", str(tmp_path_factory.mktemp("errata-home")))
        yield
