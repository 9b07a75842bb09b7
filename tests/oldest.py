"""Prints pip constraints that install the oldest core dependencies which `pyproject.toml` allows.

    python tests/oldest.py > oldest.txt

Tools that run the tests keep their versions of `constraints.txt`; pip chooses the rest.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("hypothesis==", "pluggy==", "pytest")


def lower_bounds() -> dict[str, str]:
    """Oldest allowed version of each core dependency."""
    block = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [\n")[1].split("\n]")[0]
    return dict(re.findall(r'^ *"([\w-]+)>=([\d.]+)', block, flags=re.M))


def constraints() -> list[str]:
    """Lines of the constraints file."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [f"{name}=={bound}" for name, bound in lower_bounds().items()] + [
        line for line in pins if line.startswith(TOOLS)
    ]


if __name__ == "__main__":
    print("\n".join(constraints()))
