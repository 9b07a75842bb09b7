"""Averages in files: JSON, CSV with its header in a first comment line, Parquet with it in the schema's metadata.

All three hold everything and preserve the numbers bit for bit.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from errata.base.errors import ConfigError, ResultFileError
from errata.base.extras import needed
from errata.base.files import content, write_text, written_whole
from errata.base.parsing import format_of, instance_of, load_json, taking_apart
from errata.base.roles import current
from errata.tracing.means import COLUMNS, PLACE, SCALARS, SCOPES, Array, Best, Mean, places_of, plain
from errata.tracing.result import ROLES

if TYPE_CHECKING:
    import pandas

KIND = "average effects"
FORMAT = 1
ENDINGS = (".json", ".csv", ".parquet")

_COLUMN = "errata"  # of a CSV: the header, in one of its rows, so that any reader of CSV can read the file
_COMMENT = "# errata: "  # where earlier versions have it, before the table


def write(path: str | Path, averages: Mapping[str, Any], to_frame: Callable[[], pandas.DataFrame]) -> None:
    """Write averages atomically; see `AverageEffects.save`.

    Args:
        path: the file; its ending says which format.
        averages: the fields of `AverageEffects`, by name.
        to_frame: gives the long table of the sites.
    """
    ending = Path(path).suffix.lower()
    if ending == ".json":
        sites = {part: {name: plain(of[name]) for name in COLUMNS} for part, of in averages["sites"].items()}
        write_text(path, _dumps({**_header(averages), "sites": sites}))
    elif ending == ".csv":
        frame = to_frame()
        frame[_COLUMN] = [_dumps(_header(averages)), *[None] * (len(frame) - 1)]
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    elif ending == ".parquet":
        needed("pyarrow", "tables")
        frame = to_frame()
        frame.attrs["errata"] = _header(averages)
        with written_whole(path) as temporary:
            frame.to_parquet(temporary, engine="pyarrow", index=False)
    else:
        raise ConfigError(
            f"averages cannot be written to {Path(path).name!r}: the ending tells the format, "
            f"so give it one of {', '.join(ENDINGS)}"
        )


def read(path: str | Path) -> dict[str, Any]:
    """The fields of saved averages by name, of any of the three formats; as `AverageEffects.load`."""
    path = Path(path)
    ending = path.suffix.lower()
    if not path.is_file() or ending not in ENDINGS:
        raise ResultFileError(f"there are no averages at {path}. Give a saved file: {', '.join(ENDINGS)}")
    with taking_apart(path, "a whole file of averages", advice="Average the traces again"):
        content(path, "averages")  # which tells of a file that is too large, or may not be read
        header, sites = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[ending](path)
        return _fields(header, sites)


def _header(averages: Mapping[str, Any]) -> dict[str, Any]:
    """All but the tables, ready for JSON."""
    return {
        "kind": KIND,
        "version": FORMAT,
        **{name: averages[name] for name in ("model", "fingerprint")},
        **{name: dict(averages[name]) for name in ("settings", "versions", "criteria", "left_out")},
        "roles": list(ROLES),
        "layers": {part: columns["mean"].shape[1] for part, columns in averages["sites"].items()},
        "means": {name: asdict(mean) for name, mean in averages["means"].items()},
        "best": {part: {scope: asdict(best) for scope, best in of.items()} for part, of in averages["best"].items()},
    }


def _fields(header: _Header, sites: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    """From a header and the sites' columns.

    Raises:
        KeyError, ValueError: if they are not as they should be.
    """
    if not sites or not list(sites) == list(header["best"]) == list(header["layers"]):
        raise ValueError("its parts do not fit together")
    for part, columns in sites.items():
        if {columns[name].shape for name in COLUMNS} != {(len(ROLES), header["layers"][part])}:
            raise ValueError(f"the columns of {part!r} are not of one size")
    fields: dict[str, Any] = {name: value for name, value in header.items() if name not in ("kind", "roles", "layers")}
    return {
        **fields,
        "means": {name: header["means"][name] for name in SCALARS},
        "sites": sites,
        "best": {part: {scope: of[scope] for scope in SCOPES} for part, of in header["best"].items()},
    }


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Header(TypedDict):
    """Header of averages: everything besides the averages of sites."""

    kind: str
    model: str
    fingerprint: str
    settings: dict[str, Any]
    versions: dict[str, str]
    criteria: dict[str, Any]
    left_out: dict[str, int]
    roles: list[str]
    layers: dict[str, int]
    means: dict[str, Mean]
    best: dict[str, dict[str, Best]]


def _checked(header: Any) -> _Header:
    """A header of averages, of a format and with roles that are known."""
    header = current(header)
    if header["kind"] != KIND:
        raise ValueError(f"it is of the kind {header['kind']!r}")
    if format_of(header) > FORMAT:
        raise ResultFileError(
            f"the averages are of format {header['version']}, newer than the {FORMAT} that this "
            "errata reads. Upgrade errata"
        )
    if header["roles"] != list(ROLES):
        raise ValueError("its roles are others")
    return instance_of(header, _Header)


def _array(column: str, values: Any) -> Array:
    return np.array(values, dtype=np.int64 if column == "facts" else np.float64)


def _read_json(path: Path) -> tuple[_Header, dict[str, dict[str, Array]]]:
    content = load_json(path.read_bytes())
    parts = content.pop("sites").items()
    return _checked(content), {part: {name: _array(name, table[name]) for name in COLUMNS} for part, table in parts}


def _read_csv(path: Path) -> tuple[_Header, dict[str, dict[str, Array]]]:
    table = path.read_text(encoding="utf-8")
    if not table.endswith("\n"):  # else a number cut short would pass
        raise ValueError("its last line has no end")
    told = ""
    if table.startswith(_COMMENT):
        first, _, table = table.partition("\n")
        told = first.removeprefix(_COMMENT)
    rows = list(csv.DictReader(io.StringIO(table)))
    told = told or next((row[_COLUMN] for row in rows if row.get(_COLUMN)), "")
    if not told:
        raise ValueError(f"it has no column {_COLUMN!r} with what the averages are of")
    header = _checked(load_json(told))
    places = [(row["part"], current(row["role"]), int(row["layer"])) for row in rows]
    return header, _arrays(header, places, {name: [float(row[name] or "nan") for row in rows] for name in COLUMNS})


def _read_parquet(path: Path) -> tuple[_Header, dict[str, dict[str, Array]]]:
    needed("pyarrow", "tables")
    frame = needed("pandas", "tables").read_parquet(path, engine="pyarrow")
    header = _checked(dict(frame.attrs["errata"]))
    places = [current(place) for place in zip(*(frame[name].tolist() for name in PLACE), strict=True)]
    return header, _arrays(header, places, {name: frame[name].tolist() for name in COLUMNS})


def _arrays(
    header: _Header, places: Sequence[tuple[str, str, int]], columns: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Array]]:
    """Each part's columns `[roles, layers]` from a long table with its rows in any order."""
    row = {place: index for index, place in enumerate(places)}
    wanted = {part: places_of(part, layers) for part, layers in header["layers"].items()}
    if len(row) != len(places) or set(row) != {place for of in wanted.values() for place in of}:
        raise ValueError("rows are missing, or there are others")
    return {
        part: {
            name: _array(name, [columns[name][row[place]] for place in of]).reshape(len(ROLES), -1) for name in COLUMNS
        }
        for part, of in wanted.items()
    }
