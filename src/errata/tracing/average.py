"""Averages over many facts: Figures 2 and 7 of the paper as numbers.

AIE of a role and layer is the mean over facts of the indirect effect of the sites in that role. Where a fact has
several tokens in a role (middle subject, further), its sites count as their mean. ATE is the mean total effect.

Every mean has two 95 % intervals: the normal one, mean ± 1.96·std/√n over facts, which the paper draws, and the
bootstrap's, from the 2.5th to the 97.5th percentile of the mean over facts drawn with replacement. All means share
the same draws. Below two facts there is no interval.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from errata.base.errors import ConfigError, ResultFileError
from errata.base.extras import needed
from errata.base.files import write_text, written_whole
from errata.tracing.corruption import MEASURED
from errata.tracing.result import ROLES, CausalTrace

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

KIND = "average effects"
FORMAT = 1
ENDINGS = (".json", ".csv", ".parquet")

# Why a trace is left out.
UNKNOWN, NO_EFFECT = "answer is not the object", "no effect"

_COMMENT = "# errata: "
_COLUMNS = ("mean", "low", "high", "boot_low", "boot_high", "facts")
_PLACE = ("part", "role", "layer")
_SCALARS = ("clean", "corrupted", "total_effect")
_SCOPES = ("subject", "all")
_BARS = ("state", "severed_attention", "severed_mlp")

_Array = NDArray[Any]


@dataclass(frozen=True)
class Mean:
    """A mean over facts: its normal and bootstrap 95 % intervals, and how many facts it is over.

    Intervals are None below two facts, and the mean is below one.
    """

    mean: float | None
    low: float | None
    high: float | None
    boot_low: float | None
    boot_high: float | None
    facts: int


@dataclass(frozen=True)
class Best:
    """The site of each fact that restores most, over facts.

    Attributes:
        effect: its indirect effect.
        roles: how many facts have it in each role, in the order of `ROLES`.
        layers: how many facts have it in each layer.
    """

    effect: Mean
    roles: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AverageEffects:
    """Mean effects over facts. Probabilities and their differences, as fractions.

    Attributes:
        means: of "clean", P[o]; "corrupted", P*[o]; "total_effect", ATE.
        sites: for each part its columns "mean" (AIE), "low", "high", "boot_low", "boot_high" and "facts" (how many
            facts the number is over), each `[roles, layers]` with rows in the order of `ROLES`. NaN where no fact
            was traced, and where an interval would be over fewer than two.
        best: for each part, the best site of each fact among the subject's tokens ("subject") and all from there on
            ("all"). It is sought in noise, so its mean effect is above the best AIE even without any effect.
        left_out: how many traces were left out, by reason.
        criteria: what was left out and how intervals were made: `min_effect`, `known_only`, `resamples`, `seed`.
        model: name of the model.
        fingerprint: of the model's weights.
        settings: of the traces, as far as they share them.
        versions: of the libraries that traced.
    """

    means: Mapping[str, Mean]
    sites: Mapping[str, Mapping[str, _Array]]
    best: Mapping[str, Mapping[str, Best]]
    left_out: Mapping[str, int]
    criteria: Mapping[str, Any]
    model: str
    fingerprint: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def facts(self) -> int:
        """How many facts the means are over."""
        return self.means["total_effect"].facts

    @property
    def clean(self) -> float:
        """Mean of P[o]."""
        return self._scalar("clean")

    @property
    def corrupted(self) -> float:
        """Mean of P*[o]."""
        return self._scalar("corrupted")

    @property
    def total_effect(self) -> float:
        """ATE, the mean of P[o] − P*[o]."""
        return self._scalar("total_effect")

    @property
    def mean(self) -> dict[str, _Array]:
        """AIE of each part, `[roles, layers]`."""
        return {part: columns["mean"] for part, columns in self.sites.items()}

    @property
    def interval(self) -> dict[str, _Array]:
        """Half widths of each part's normal intervals, `[roles, layers]`."""
        return {part: (columns["high"] - columns["low"]) / 2 for part, columns in self.sites.items()}

    @property
    def counts(self) -> tuple[int, ...]:
        """Facts that have each role, in the first part, at the layer that most were traced at."""
        return tuple(next(iter(self.sites.values()))["facts"].max(1).tolist())

    def _scalar(self, name: str) -> float:
        value = self.means[name].mean
        return float("nan") if value is None else value

    # ---- pictures -------------------------------------------------------------------------------------

    def figure(self) -> Figure:
        """AIE of each part as maps, roles by layers, after Figure 2 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.averages import average_figure

        return average_figure(self.mean, ROLES, counts=self.counts, window=self._window, title=self._title)

    def lines(self) -> Figure:
        """AIE of each part with its normal intervals as lines over layers, after Figure 7 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.lines import lines_figure

        low, high = ({part: of[end] for part, of in self.sites.items()} for end in ("low", "high"))
        return lines_figure(self.mean, low, high, ROLES, window=self._window, title=self._title)

    def severed(self) -> Figure:
        """AIE of the last subject token's state, as it is and with modules severed, after Figure 3 of the paper.

        Raises:
            ConfigError: if the states, or both kinds of severed ones, were not traced at that token.
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.severed import severed_figure

        row = ROLES.index("last subject")
        traced = {part: of for part, of in self.sites.items() if of["facts"][row].any()}
        bars = {part: traced[part] for part in _BARS if part in traced}
        if "state" not in bars or len(bars) < 2:
            raise ConfigError(
                "bars of severed states stand beside those of the states at the last subject token, and what was "
                f"traced there is {', '.join(traced) or 'nothing'}: trace with parts={','.join(_BARS)}"
            )
        mean, low, high = ({part: of[name][row] for part, of in bars.items()} for name in ("mean", "low", "high"))
        return severed_figure(mean, low, high, title=f"{self._title}\nat the last subject token")

    def plot(self, path: str | Path, kind: Literal["maps", "lines", "severed"] = "maps") -> None:
        """Write `figure()`, `lines()` or `severed()` as PNG, SVG or PDF, by the path's ending.

        Raises:
            ConfigError: if the ending or the kind is another, or what the kind shows was not traced.
            OutputError: if the file cannot be written.
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.drawing import require_ending, save

        require_ending(path)
        figures = {"maps": self.figure, "lines": self.lines, "severed": self.severed}
        if kind not in figures:
            raise ConfigError(f"averages are drawn as {', '.join(figures)}, not as {kind!r}: choose one of them")
        save(figures[kind](), path)

    @property
    def _window(self) -> int | None:
        return self.settings.get("window")

    @property
    def _title(self) -> str:
        return f"{self.model}: {self.facts:,} facts, ATE {100 * self.total_effect:.1f} percentage points"

    # ---- tables and files -----------------------------------------------------------------------------

    def to_frame(self) -> pandas.DataFrame:
        """One row a part, role and layer: part, role, layer, mean, low, high, boot_low, boot_high, facts.

        Raises:
            MissingExtra: if pandas is not installed.
        """
        places = [place for part, values in self.mean.items() for place in _places(part, values.shape[1])]
        columns: dict[str, Any] = dict(zip(_PLACE, zip(*places, strict=True), strict=True))
        for name in _COLUMNS:
            columns[name] = np.concatenate([of[name].reshape(-1) for of in self.sites.values()])
        return needed("pandas", "tables").DataFrame(columns)

    def save(self, path: str | Path) -> None:
        """Write .json, .csv or .parquet, by the path's ending, whole or not at all. All three hold everything.

        Raises:
            ConfigError: if the ending is another.
            MissingExtra: if pandas, or for .parquet pyarrow, is not installed; .json needs neither.
            OutputError: if the file cannot be written.
        """
        ending = Path(path).suffix.lower()
        if ending == ".json":
            sites = {part: {name: _plain(of[name]) for name in _COLUMNS} for part, of in self.sites.items()}
            write_text(path, _dumps({**self._header(), "sites": sites}))
        elif ending == ".csv":
            table = self.to_frame().to_csv(index=False, lineterminator="\n")
            write_text(path, f"{_COMMENT}{_dumps(self._header())}\n{table}")
        elif ending == ".parquet":
            needed("pyarrow", "tables")
            frame = self.to_frame()
            frame.attrs["errata"] = self._header()
            with written_whole(path) as temporary:
                frame.to_parquet(temporary, engine="pyarrow", index=False)
        else:
            raise ConfigError(
                f"averages cannot be written to {Path(path).name!r}: the ending tells the format, "
                f"so give it one of {', '.join(ENDINGS)}"
            )

    @classmethod
    def load(cls, path: str | Path) -> AverageEffects:
        """Saved averages, of any of the three formats.

        Raises:
            ResultFileError: if the file is missing, cut short or no averages of ours.
            MissingExtra: if what its format needs is not installed.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if not path.is_file() or ending not in ENDINGS:
            raise ResultFileError(f"there are no averages at {path}. Give a saved file: {', '.join(ENDINGS)}")
        try:
            header, sites = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[ending](path)
            return cls._from(header, sites)
        except _Newer as error:
            raise ResultFileError(f"{path} is of {error}. Upgrade errata") from None
        except _BROKEN as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ResultFileError(
                f"{path} holds no averages of ours, or no longer whole ones ({reason}). Average the traces again"
            ) from error

    def _header(self) -> dict[str, Any]:
        """All but the tables, ready for JSON."""
        return {
            "kind": KIND,
            "version": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "criteria": dict(self.criteria),
            "left_out": dict(self.left_out),
            "roles": list(ROLES),
            "layers": {part: values.shape[1] for part, values in self.mean.items()},
            "means": {name: asdict(mean) for name, mean in self.means.items()},
            "best": {part: {scope: asdict(best) for scope, best in of.items()} for part, of in self.best.items()},
        }

    @classmethod
    def _from(cls, header: dict[str, Any], sites: Mapping[str, Mapping[str, _Array]]) -> AverageEffects:
        """From a header and the sites' columns.

        Raises:
            KeyError, TypeError, ValueError: if they are not as they should be.
        """
        if not sites or not list(sites) == list(header["best"]) == list(header["layers"]):
            raise ValueError("its parts do not fit together")
        for part, columns in sites.items():
            if {columns[name].shape for name in _COLUMNS} != {(len(ROLES), header["layers"][part])}:
                raise ValueError(f"the columns of {part!r} are not of one size")
        return cls(
            means={name: Mean(**header["means"][name]) for name in _SCALARS},
            sites=sites,
            best={
                part: {
                    scope: Best(Mean(**of[scope]["effect"]), tuple(of[scope]["roles"]), tuple(of[scope]["layers"]))
                    for scope in _SCOPES
                }
                for part, of in header["best"].items()
            },
            left_out=dict(header["left_out"]),
            criteria=dict(header["criteria"]),
            model=str(header["model"]),
            fingerprint=str(header["fingerprint"]),
            settings=dict(header["settings"]),
            versions=dict(header["versions"]),
        )


def average_effects(
    traces: Iterable[CausalTrace],
    *,
    min_effect: float = 0.01,
    known_only: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> AverageEffects:
    """Average traces of one model that were made alike. They are read once, one at a time, and not kept.

    A site that was not traced (NaN) does not count.

    Args:
        traces: of any facts; of each, what it restored is all that matters.
        min_effect: traces with a total effect below this are left out, for where nothing was lost nothing can come
            back; −1 keeps them all.
        known_only: whether traces whose answer is not the fact's object are left out. Facts that name no object stay.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: if no trace is left, or they differ in model, weights, settings, parts or layers; a level of
            noise and a σ that were measured on each fact's own subject may differ.
    """
    if resamples < 1 or not 0 <= seed < 2**32 or not -1 <= min_effect <= 1:
        raise ConfigError("resamples are at least 1, a seed is from 0 to 2**32 - 1, and min_effect from -1 to 1")
    left_out = {UNKNOWN: 0, NO_EFFECT: 0}
    first: CausalTrace | None = None
    shared: dict[str, Any] = {}
    versions: dict[str, set[str]] = {}
    scalars: list[list[float]] = []
    effects: dict[str, list[_Array]] = {}
    bests: dict[tuple[str, str], list[tuple[float, str, int]]] = {}
    for trace in traces:
        settings = _settings(trace)
        if first is None:
            first, shared = trace, settings
            effects = {part: [] for part in trace.restored}
            bests = {(part, scope): [] for part in trace.restored for scope in _SCOPES}
        _require_alike(first, trace)
        if known_only and trace.known is False:
            left_out[UNKNOWN] += 1
            continue
        if not trace.total_effect >= min_effect:
            left_out[NO_EFFECT] += 1
            continue
        shared = {name: value for name, value in shared.items() if name in settings and settings[name] == value}
        for library, version in trace.versions.items():
            versions.setdefault(library, set()).add(version)
        scalars.append([trace.clean, trace.corrupted, trace.total_effect])
        roles = np.array(trace.roles)
        for part in effects:
            effect = trace.indirect_effect(part)
            effects[part].append(np.stack([_nanmean(effect[roles == role]) for role in ROLES]))
            for scope, end in zip(_SCOPES, (trace.subject[1] + 1, len(roles)), strict=True):
                bests[part, scope].append(_best(effect, trace.roles, range(trace.subject[0], end)))
    if first is None:
        raise ConfigError("averages need at least one trace, and there is none")
    if not scalars:
        reasons = ", ".join(f"{count} for {reason!r}" for reason, count in left_out.items() if count)
        raise ConfigError(f"averages need at least one trace, and all are left out: {reasons}. Trace other facts")

    draws = _draws(len(scalars), resamples, seed)
    return AverageEffects(
        means=dict(zip(_SCALARS, _means(np.array(scalars), draws), strict=True)),
        sites={part: _statistics(np.stack(of), draws) for part, of in effects.items()},
        best={
            part: {scope: _counted(bests[part, scope], of[0].shape[1], draws) for scope in _SCOPES}
            for part, of in effects.items()
        },
        left_out=left_out,
        criteria={"min_effect": min_effect, "known_only": known_only, "resamples": resamples, "seed": seed},
        model=first.model,
        fingerprint=first.fingerprint,
        settings=shared,
        versions={library: ", ".join(sorted(found)) for library, found in versions.items()},
    )


# ---- which traces belong together -------------------------------------------------------------------------


def _require_alike(first: CausalTrace, other: CausalTrace) -> None:
    """Two traces of one model, made alike."""
    ours, theirs = _compared(first), _compared(other)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        said = "; ".join(f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in differing)
        raise ConfigError(
            f"the traces of {first.fact.text!r} and {other.fact.text!r} differ ({said}), and a mean over both would "
            "say nothing: average those of one model that were traced with the same settings"
        )


def _compared(trace: CausalTrace) -> dict[str, Any]:
    """What two traces must have in common, by name; for `corruption`, each of its fields."""
    settings = _settings(trace)
    if settings.get("sigma") is not None:
        settings = {name: value for name, value in settings.items() if name not in MEASURED}
    compared = {
        "model": trace.model,
        "fingerprint": trace.fingerprint,
        **{f"layers of {part}": values.shape[1] for part, values in trace.restored.items()},
        **settings,
    }
    flat: dict[str, Any] = {}
    for name, value in compared.items():
        flat |= {f"{name}.{inner}": of for inner, of in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _settings(trace: CausalTrace) -> dict[str, Any]:
    """As they are once they have been in a file: tuples are lists."""
    return json.loads(json.dumps(dict(trace.settings)))


# ---- statistics -------------------------------------------------------------------------------------------


def _nanmean(rows: _Array) -> _Array:
    """Mean over the first axis of what is no NaN; NaN where nothing is."""
    there = np.isfinite(rows)
    return _quotient(np.where(there, rows, 0.0).sum(0), there.sum(0))


def _quotient(total: _Array, count: _Array) -> _Array:
    """NaN where the count is zero."""
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _best(effect: _Array, roles: Sequence[str], tokens: range) -> tuple[float, str, int]:
    """Effect, role and layer of the best site of some tokens; NaN where none was traced."""
    found = np.where(np.isfinite(effect[tokens]), effect[tokens], -np.inf)
    token, layer = np.unravel_index(int(found.argmax()), found.shape)
    best = float(found[token, layer])
    return best if np.isfinite(best) else np.nan, roles[tokens[int(token)]], int(layer)


def _counted(sites: Sequence[tuple[float, str, int]], layers: int, draws: _Array) -> Best:
    [effect] = _means(np.array([[value] for value, _, _ in sites]), draws)
    traced = [(role, layer) for value, role, layer in sites if np.isfinite(value)]
    roles, places = Counter(role for role, _ in traced), Counter(layer for _, layer in traced)
    return Best(effect, tuple(roles[role] for role in ROLES), tuple(places[layer] for layer in range(layers)))


def _draws(facts: int, resamples: int, seed: int) -> _Array:
    """How often each resample holds each fact, `[resamples, facts]`."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(facts, size=facts), minlength=facts) for _ in range(resamples)]).astype(
        np.float64
    )


def _statistics(values: _Array, draws: _Array) -> dict[str, _Array]:
    """The columns of the long table for values `[facts, ...]`, in which NaN does not count."""
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    facts = there.sum(0)
    mean = _quotient(filled.sum(0), facts)
    deviation = np.where(there, values - mean, 0.0)
    half = 1.96 * np.sqrt(_quotient(_quotient((deviation**2).sum(0), facts - 1), facts))

    flat = (len(values), -1)
    means = _quotient(draws @ filled.reshape(flat), draws @ there.reshape(flat).astype(np.float64))
    boot = np.full((2, means.shape[1]), np.nan)
    several = facts.reshape(-1) > 1
    if several.any():  # a rare site can be missing from a resample, hence nan
        boot[:, several] = np.nanquantile(means[:, several], [0.025, 0.975], axis=0)
    boot_low, boot_high = boot.reshape(2, *mean.shape)
    columns = (mean, mean - half, mean + half, boot_low, boot_high, facts)
    return dict(zip(_COLUMNS, columns, strict=True))


def _means(values: _Array, draws: _Array) -> list[Mean]:
    """One mean a column of `[facts, columns]`."""
    columns = {name: _plain(column) for name, column in _statistics(values, draws).items()}
    return [Mean(*row) for row in zip(*(columns[name] for name in _COLUMNS), strict=True)]


# ---- files ------------------------------------------------------------------------------------------------


class _Newer(Exception):
    """A file of a later format."""


# What readers raise on files that are damaged or something else.
_BROKEN = (csv.Error, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError)


def _plain(values: _Array) -> Any:
    """An array as lists, with None for NaN, which JSON does not have."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _places(part: str, layers: int) -> list[tuple[str, str, int]]:
    return [(part, role, layer) for role in ROLES for layer in range(layers)]


def _checked(header: Any) -> dict[str, Any]:
    """A header of averages, of a format and with roles that are known."""
    if header["kind"] != KIND:
        raise ValueError(f"it is of the kind {header['kind']!r}")
    if header["version"] > FORMAT:
        raise _Newer(f"format {header['version']}, newer than the {FORMAT} that this errata reads")
    if header["roles"] != list(ROLES):
        raise ValueError("its roles are others")
    return header


def _array(column: str, values: Any) -> _Array:
    return np.array(values, dtype=np.int64 if column == "facts" else np.float64)


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, _Array]]]:
    content = _checked(json.loads(path.read_text(encoding="utf-8")))
    parts = content["sites"].items()
    return content, {part: {name: _array(name, table[name]) for name in _COLUMNS} for part, table in parts}


def _read_csv(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, _Array]]]:
    comment, _, table = path.read_text(encoding="utf-8").partition("\n")
    if not comment.startswith(_COMMENT):
        raise ValueError(f"its first line does not begin with {_COMMENT.strip()!r}")
    if not table.endswith("\n"):  # else a number cut short would pass
        raise ValueError("its last line has no end")
    header = _checked(json.loads(comment.removeprefix(_COMMENT)))
    rows = list(csv.DictReader(io.StringIO(table)))
    places = [(row["part"], row["role"], int(row["layer"])) for row in rows]
    return header, _arrays(header, places, {name: [float(row[name] or "nan") for row in rows] for name in _COLUMNS})


def _read_parquet(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, _Array]]]:
    needed("pyarrow", "tables")
    frame = needed("pandas", "tables").read_parquet(path, engine="pyarrow")
    header = _checked(frame.attrs["errata"])
    places = list(zip(*(frame[name].tolist() for name in _PLACE), strict=True))
    return header, _arrays(header, places, {name: frame[name].tolist() for name in _COLUMNS})


def _arrays(
    header: dict[str, Any], places: Sequence[tuple[str, str, int]], columns: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, _Array]]:
    """Each part's columns `[roles, layers]` from a long table with its rows in any order."""
    row = {place: index for index, place in enumerate(places)}
    wanted = {part: _places(part, layers) for part, layers in header["layers"].items()}
    if len(row) != len(places) or set(row) != {place for of in wanted.values() for place in of}:
        raise ValueError("rows are missing, or there are others")
    return {
        part: {
            name: _array(name, [columns[name][row[place]] for place in of]).reshape(len(ROLES), -1) for name in _COLUMNS
        }
        for part, of in wanted.items()
    }
