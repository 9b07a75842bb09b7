"""Second moments in the .npz format of the authors of ROME.

They hold the sum of k kᵀ under "mom2.mom2" and the number of tokens under "mom2.count". Only the file names identify
model, layer and text, so the user must know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from errata.base.arrays import read_arrays
from errata.base.errors import ResultFileError
from errata.base.parsing import taking_apart
from errata.statistics.second_moment import SecondMoment

MAX_BYTES = 16 * 2**30  # of an array; keys of 32,768 features take half of that in float64


def load_published(path: str | Path, layer: int | None) -> SecondMoment:
    """The second moment in a file of that format; the caller says that it is of `layer`.

    Raises:
        ResultFileError: if the file is missing, cut short, or holds no second moment.
    """
    path = Path(path)
    arrays = read_arrays(path, lambda name: name.rsplit(".", 1)[-1] in ("mom2", "count"), MAX_BYTES)
    sums, count = (_entry(arrays, name) for name in ("mom2", "count"))
    if (
        sums is None
        or count is None
        or sums.ndim != 2
        or sums.shape[0] != sums.shape[1]
        or count.size != 1
        or sums.dtype.kind not in "fiu"
        or count.dtype.kind not in "fiu"
    ):
        raise ResultFileError(
            f"{path} holds no second moment: that is a square matrix 'mom2.mom2' and a number 'mom2.count'"
        )
    number = float(count.reshape(-1)[0])
    if not 1 <= number < 2**63:  # NaN is neither
        raise ResultFileError(f"{path} is of {number:g} tokens, so there is no mean in it. Fetch or make it again")
    tokens = int(number)
    with taking_apart(path, "a whole second moment"):
        return SecondMoment(torch.from_numpy(sums.astype(np.float64)) / tokens, tokens, layer, {"published": path.name})


def _entry(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """The array whose dotted name ends so; the shortest, if there are several."""
    return arrays.get(min((key for key in arrays if key.rsplit(".", 1)[-1] == name), key=len, default=""))
