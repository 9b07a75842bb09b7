"""Token roles have one spelling; earlier spellings are read for a while: settings with a warning, files without."""

from __future__ import annotations

import json

import numpy as np
import pytest

import errata
from errata.base.roles import EARLIER, current, current_setting
from errata.tracing.result import ROLES
from helpers.models import shared_model

FACT = errata.Fact("Rome", "{} is in")


def test_roles_have_one_spelling():
    assert set(EARLIER.values()) <= {*ROLES}
    assert not set(EARLIER) & {*ROLES}
    assert errata.TraceConfig(tokens=ROLES).tokens == ROLES


@pytest.mark.parametrize(("earlier", "now"), EARLIER.items())
def test_settings_in_an_earlier_spelling_are_read_with_a_warning(earlier, now):
    with pytest.warns(DeprecationWarning, match=f"write '{now}' for '{earlier}'"):
        assert current_setting(earlier) == now
    if now in ("subject_first", "subject_last", "after_subject"):
        with pytest.warns(DeprecationWarning, match="one spelling now"):
            assert errata.RomeConfig(fact_token=earlier).fact_token == now
    with pytest.warns(DeprecationWarning, match="one spelling now"):
        assert errata.TraceConfig(tokens=(earlier, "last")).tokens == (now, "last")


def test_files_in_an_earlier_spelling_are_read_without_one(tmp_path):
    trace = errata.trace(shared_model(), FACT, samples=1, parts="state", tokens=("subject_last", "last"))
    file = tmp_path / "t.jsonl"
    trace.save(file)
    file.write_text(file.read_text("utf-8").replace("subject_last", "last subject"), "utf-8")
    assert "last subject" in file.read_text("utf-8")
    [again] = errata.load_traces(file)
    assert again.settings == trace.settings
    mean = errata.average_effects([trace], min_effect=-1)
    for ending in ("json", "csv"):
        file = tmp_path / f"a.{ending}"
        mean.save(file)
        text = file.read_text("utf-8")
        for earlier, now in EARLIER.items():
            if earlier != "subject_first_after":
                text = text.replace(now, earlier)
        assert "first after" in text
        file.write_text(text, "utf-8")
        loaded = type(mean).load(file)
        for name, values in mean.sites["state"].items():
            np.testing.assert_array_equal(loaded.sites["state"][name], values)


def test_only_roles_are_changed():
    value = {"a": ["last subject", 3, None], "last subject": ("x",)}
    assert current(value) == {"a": ["subject_last", 3, None], "last subject": ("x",)}
    assert json.dumps(current_setting("last")) == '"last"'
