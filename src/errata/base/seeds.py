"""Independent random streams, distinguished by name, from one integer seed."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: object) -> int:
    """A seed in [0, 2^63) for the stream called `names`, the same on every machine and run."""
    words = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
