"""Numpy arrays from untrusted .npy and .npz files: never unpickled, never larger than allowed.

The first bytes of a file give the array's size, which is checked before memory is allocated.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from errata.base.errors import ResultFileError
from errata.base.parsing import taking_apart

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 2**30


def read_array(path: str | Path, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The array of a .npy file.

    Raises:
        ResultFileError: if the file is missing, cut short, something else, or larger than `max_bytes`.
    """
    path = Path(path)
    with taking_apart(path, "a whole array of numbers (.npy)", advice="Fetch it again"):
        if not path.is_file():
            raise ResultFileError(f"there is no file {path}. Give the path of an array (.npy)")
        with path.open("rb") as file:
            return _array(file, path, path.stat().st_size, max_bytes)


def read_arrays(path: str | Path, wanted: Callable[[str], bool], max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Arrays of a .npz file whose names are wanted, by name.

    Raises:
        ResultFileError: if the file is missing, cut short, something else, encrypted or packed in a way that Python
            does not unpack, or an array is larger than `max_bytes`.
    """
    path = Path(path)
    with taking_apart(path, "a whole .npz of numbers", advice="Fetch it again"):
        if not path.is_file():
            raise ResultFileError(f"there is no file {path}. Give the path of arrays (.npz)")
        found = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name != member.filename and wanted(name):
                    with archive.open(member) as file:
                        found[name] = _array(file, path, member.file_size, max_bytes)
        return found


def _array(file: IO[bytes], path: Path, size: int, max_bytes: int) -> np.ndarray:
    """The array that begins here, in a file or archive's member of `size` bytes."""
    import numpy as np

    major, _ = np.lib.format.read_magic(file)
    if major not in (1, 2):
        raise ValueError(f"its format {major} is none of numbers")
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject or dtype.kind not in "biufc":
        raise ValueError(f"it holds {dtype}, not numbers")
    needed = math.prod(shape) * dtype.itemsize
    if needed > max_bytes:
        raise ResultFileError(
            f"{path} announces an array of {needed / 1e9:,.0f} GB, and such are read up to {max_bytes / 1e9:,.0f} GB"
        )
    if needed > size:
        raise ValueError("it is cut short")
    data = file.read(needed)
    if len(data) < needed:
        raise ValueError("it is cut short")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()
