"""Second moments that the authors of ROME published, and others keep in their format: .npz.

They hold the sum of k kᵀ under "mom2.mom2" and the number of tokens under "mom2.count". Of which model, layer and text
they are stands in their names alone, so that whoever uses one must know.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from errata.base.errors import ResultFileError
from errata.statistics.second_moment import SecondMoment


def load_published(path: str | Path, layer: int | None) -> SecondMoment:
    """The second moment in a file of that format, said to be of `layer`.

    Raises:
        ResultFileError: if the file is missing, cut short, or holds no second moment.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultFileError(f"there is no file {path}. Give the path of a second moment (.npz)")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            sums = _entry(stored, "mom2")
            count = _entry(stored, "count")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ResultFileError(f"{path} is no whole .npz of numbers ({error}). Fetch it again") from error
    if sums is None or count is None or sums.ndim != 2 or sums.shape[0] != sums.shape[1] or count.size != 1:
        raise ResultFileError(
            f"{path} holds no second moment: that is a square matrix 'mom2.mom2' and a number 'mom2.count'"
        )
    tokens = int(count.reshape(-1)[0])
    if tokens < 1:
        raise ResultFileError(f"{path} is of {tokens} tokens, so there is no mean in it. Fetch or make it again")
    try:
        return SecondMoment(torch.from_numpy(sums.astype(np.float64)) / tokens, tokens, layer, {"published": path.name})
    except ValueError as error:  # ConfigError is one
        raise ResultFileError(f"{path} is a broken second moment: {error}") from error


def _entry(stored: np.lib.npyio.NpzFile, name: str) -> np.ndarray | None:
    """The array whose dotted name ends so; the shortest, if there are several."""
    found = sorted((key for key in stored.files if key.rsplit(".", 1)[-1] == name), key=len)
    return stored[found[0]] if found else None
