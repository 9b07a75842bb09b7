"""Made-up traces, as far as averages read them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from errata.base.facts import Fact
from errata.tracing.result import CausalTrace

SETTINGS = {
    "samples": 10,
    "noise": 0.3,
    "sigma": 0.1,
    "corruption": {"kind": "gaussian", "multiple": 3.0},
    "window": 10,
    "layers": (0, 1),
}


class StandIn(SimpleNamespace):
    """As much of a trace as averages need."""


StandIn.__name__ = "CausalTrace"


def made(restored, subject=(0, 0), clean=0.9, corrupted=0.1, **changes):
    """A trace as far as averages see it: `restored` is an array for the part "state", or one for each part."""
    if not isinstance(restored, dict):
        restored = {"state": np.asarray(restored, dtype=float)}
    tokens = tuple("abcdefghijkl"[: len(next(iter(restored.values())))])
    fields = {
        "fact": Fact("Rome", "{} is in"),
        "tokens": tokens,
        "subject": subject,
        "clean": clean,
        "corrupted": corrupted,
        "restored": restored,
        "settings": SETTINGS,
        "model": "m",
        "fingerprint": "f",
        "versions": {"torch": "2.9"},
        "known": None,
        **changes,
    }
    return StandIn(
        **fields,
        roles=CausalTrace.roles.fget(SimpleNamespace(**fields)),
        total_effect=clean - corrupted,
        indirect_effect=lambda part: restored[part] - corrupted,
    )


def random_traces(facts=40, layers=5, seed=0, gaps=0.2, parts=("state", "mlp")):
    """Traces of random sizes with random gaps."""
    rng = np.random.default_rng(seed)

    def one():
        tokens = int(rng.integers(2, 9))
        first = int(rng.integers(0, tokens))
        last = int(rng.integers(first, tokens))
        restored = {}
        for part in parts:
            values = rng.uniform(0, 1, (tokens, layers))
            values[rng.uniform(size=values.shape) < gaps] = np.nan
            restored[part] = values
        return made(restored, (first, last), float(rng.uniform(0.5, 1)), float(rng.uniform(0, 0.4)))

    return [one() for _ in range(facts)]
