"""Averages over many facts: Figures 2 and 7 of the paper as numbers.

AIE of a role and layer is the mean over facts of the indirect effect of the sites in that role. Where a fact has
several tokens in a role (middle subject, further), its sites count as their mean. ATE is the mean total effect.

`averaging="reference"` averages like the published notebook. A token can have two roles: a subject of one token is a
first and a last subject token, and the last token can be the first after the subject too. All tokens of a role count
equally, however many a fact has. AIE is the mean of P*,clean[o] over the tokens less the mean of P*[o] over all facts.
Its normal interval takes the standard deviation of P*,clean[o] over the tokens (dividing by their number) and n, the
number of facts. No fact is left out for its total effect.

Every mean has two 95 % intervals: the normal one, mean ± 1.96·std/√n over facts, which the paper draws, and the
bootstrap's, from the 2.5th to the 97.5th percentile of the mean over facts drawn with replacement. All means share
the same draws. Below two facts there is no interval.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from errata.base.arguments import checked
from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.base.settings_diff import differing, flat
from errata.tracing import average_files
from errata.tracing.corruption import MEASURED
from errata.tracing.means import COLUMNS, PLACE, SCALARS, SCOPES, Array, Best, Mean, places_of, plain
from errata.tracing.result import ROLES, CausalTrace

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# Why a trace is left out.
UNKNOWN, NO_EFFECT = "answer is not the object", "no effect"

_BARS = ("state", "severed_attention", "severed_mlp")

Averaging = Literal["facts", "reference"]


@dataclass(frozen=True, eq=False)
class AverageEffects:
    """Mean effects over facts. Probabilities and their differences, as fractions.

    Attributes:
        means: means of "clean", P[o]; "corrupted", P*[o]; "total_effect", ATE.
        sites: for each part its columns "mean" (AIE), "low", "high", "boot_low", "boot_high" and "facts" (how many
            facts the number is over), each `[roles, layers]` with rows in the order of `ROLES`. NaN where no fact
            was traced, and where an interval would be over fewer than two.
        best: for each part, the best site of each fact among the subject's tokens ("subject") and all from there on
            ("all"). It is sought in noise, so its mean effect is above the best AIE even without any effect.
        left_out: how many traces were left out, by reason.
        criteria: selection of facts and way of averaging: `averaging`, `min_effect`, `known_only`, `resamples`, `seed`.
        model: name of the model.
        fingerprint: sha256 of the model's weights.
        settings: settings that the traces share.
        versions: versions of the libraries that traced.
    """

    means: Mapping[str, Mean]
    sites: Mapping[str, Mapping[str, Array]]
    best: Mapping[str, Mapping[str, Best]]
    left_out: Mapping[str, int]
    criteria: Mapping[str, Any]
    model: str
    fingerprint: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def facts(self) -> int:
        """Number of facts that the means are over."""
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
    def mean(self) -> dict[str, Array]:
        """AIE of each part, `[roles, layers]`."""
        return {part: columns["mean"] for part, columns in self.sites.items()}

    @property
    def interval(self) -> dict[str, Array]:
        """Half widths of each part's normal intervals, `[roles, layers]`."""
        return {part: (columns["high"] - columns["low"]) / 2 for part, columns in self.sites.items()}

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of facts that have each role, in the first part, at the layer where most were traced."""
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
        """AIE of the last subject token's state, without and with severed modules, after Figure 3 of the paper.

        Raises:
            ConfigError: if the states, or both kinds of severed ones, were not traced at that token.
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.severed import severed_figure

        row = ROLES.index("subject_last")
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
        """One row for each part, role and layer: part, role, layer, mean, low, high, boot_low, boot_high, facts.

        Raises:
            MissingExtra: if pandas is not installed.
        """
        rows = [place for part, values in self.mean.items() for place in places_of(part, values.shape[1])]
        columns: dict[str, Any] = dict(zip(PLACE, zip(*rows, strict=True), strict=True))
        for name in COLUMNS:
            columns[name] = np.concatenate([of[name].reshape(-1) for of in self.sites.values()])
        return needed("pandas", "tables").DataFrame(columns)

    def save(self, path: str | Path) -> None:
        """Write .json, .csv or .parquet atomically, by the path's ending. All three hold everything.

        Raises:
            ConfigError: if the ending is another.
            MissingExtra: if pandas, or for .parquet pyarrow, is not installed; .json needs neither.
            OutputError: if the file cannot be written.
        """
        average_files.write(path, vars(self), self.to_frame)

    @classmethod
    def load(cls, path: str | Path) -> AverageEffects:
        """Saved averages, of any of the three formats.

        Raises:
            ResultFileError: if the file is missing, cut short or no averages of ours.
            MissingExtra: if what its format needs is not installed.
        """
        return cls(**average_files.read(path))


@checked(traces=["CausalTrace"])
def average_effects(
    traces: Iterable[CausalTrace],
    *,
    averaging: Averaging = "facts",
    min_effect: float | None = None,
    known_only: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> AverageEffects:
    """Average traces of one model that have the same settings. They are read once, one at a time, and not kept.

    A site that was not traced (NaN) does not count.

    Args:
        traces: of any facts; of each, what it restored is all that matters.
        averaging: "facts", in which each fact counts once in a role; "reference": as the published notebook does.
        min_effect: traces with a total effect below this are left out, for where nothing was lost nothing can come
            back; −1 keeps them all. None: 0.01, or −1 for averaging="reference".
        known_only: whether traces whose answer is not the fact's object are left out. Facts that name no object stay.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ConfigError: if no trace is left, or they differ in model, weights, settings, parts or layers; a level of
            noise and a σ that were measured on each fact's own subject may differ.
    """
    if averaging not in get_args(Averaging):
        raise ConfigError(f"averaging is {averaging!r}: it is one of {', '.join(get_args(Averaging))}")
    if min_effect is None:
        min_effect = 0.01 if averaging == "facts" else -1.0
    if resamples < 1 or not 0 <= seed < 2**32 or not -1 <= min_effect <= 1:
        raise ConfigError("resamples are at least 1, a seed is from 0 to 2**32 - 1, and min_effect from -1 to 1")
    left_out = {UNKNOWN: 0, NO_EFFECT: 0}
    first: CausalTrace | None = None
    shared: dict[str, Any] = {}
    versions: dict[str, set[str]] = {}
    scalars: list[list[float]] = []
    effects: dict[str, list[Array]] = {}
    bests: dict[tuple[str, str], list[tuple[float, str, int]]] = {}
    for trace in traces:
        settings = _settings(trace)
        if first is None:
            first, shared = trace, settings
            effects = {part: [] for part in trace.restored}
            bests = {(part, scope): [] for part in trace.restored for scope in SCOPES}
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
            if averaging == "facts":
                effects[part].append(np.stack([_nanmean(effect[roles == role]) for role in ROLES]))
            else:
                effects[part].append(_sums(trace.restored[part], *trace.subject))
            for scope, end in zip(SCOPES, (trace.subject[1] + 1, len(roles)), strict=True):
                bests[part, scope].append(_best(effect, trace.roles, range(trace.subject[0], end)))
    if first is None:
        raise ConfigError("averages need at least one trace, and there is none")
    if not scalars:
        reasons = ", ".join(f"{count} for {reason!r}" for reason, count in left_out.items() if count)
        raise ConfigError(f"averages need at least one trace, and all are left out: {reasons}. Trace other facts")

    draws = _draws(len(scalars), resamples, seed)
    return AverageEffects(
        means=dict(zip(SCALARS, _means(np.array(scalars), draws), strict=True)),
        sites={
            part: _statistics(np.stack(of), draws)
            if averaging == "facts"
            else _pooled(np.stack(of), np.array(scalars)[:, 1], draws)
            for part, of in effects.items()
        },
        best={
            part: {scope: _counted(bests[part, scope], of[0].shape[-1], draws) for scope in SCOPES}
            for part, of in effects.items()
        },
        left_out=left_out,
        criteria={
            "averaging": averaging,
            "min_effect": min_effect,
            "known_only": known_only,
            "resamples": resamples,
            "seed": seed,
        },
        model=first.model,
        fingerprint=first.fingerprint,
        settings=shared,
        versions={library: ", ".join(sorted(found)) for library, found in versions.items()},
    )


# ---- which traces belong together -------------------------------------------------------------------------


def _require_alike(first: CausalTrace, other: CausalTrace) -> None:
    """Two traces of one model, made alike."""
    ours, theirs = _compared(first), _compared(other)
    if names := differing(ours, theirs):
        said = "; ".join(f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in names)
        raise ConfigError(
            f"the traces of {first.fact.text!r} and {other.fact.text!r} differ ({said}), and a mean over both would "
            "say nothing: average those of one model that were traced with the same settings"
        )


def _compared(trace: CausalTrace) -> dict[str, Any]:
    """Settings that two traces must share, by name; for `corruption`, each of its fields."""
    settings = _settings(trace)
    if settings.get("sigma") is not None:
        settings = {name: value for name, value in settings.items() if name not in MEASURED}
    return {
        "model": trace.model,
        "fingerprint": trace.fingerprint,
        **{f"layers of {part}": values.shape[1] for part, values in trace.restored.items()},
        **flat(settings),
    }


def _settings(trace: CausalTrace) -> dict[str, Any]:
    """Settings in the form that a file gives back: tuples are lists."""
    return json.loads(json.dumps(dict(trace.settings)))


# ---- statistics -------------------------------------------------------------------------------------------


def _nanmean(rows: Array) -> Array:
    """Mean over the first axis of what is no NaN; NaN where nothing is."""
    there = np.isfinite(rows)
    return _quotient(np.where(there, rows, 0.0).sum(0), there.sum(0))


def _quotient(total: Array, count: Array) -> Array:
    """NaN where the count is zero."""
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _best(effect: Array, roles: Sequence[str], tokens: range) -> tuple[float, str, int]:
    """Effect, role and layer of the best site of some tokens; NaN where none was traced."""
    found = np.where(np.isfinite(effect[tokens]), effect[tokens], -np.inf)
    token, layer = np.unravel_index(int(found.argmax()), found.shape)
    best = float(found[token, layer])
    return best if np.isfinite(best) else np.nan, roles[tokens[int(token)]], int(layer)


def _counted(sites: Sequence[tuple[float, str, int]], layers: int, draws: Array) -> Best:
    [effect] = _means(np.array([[value] for value, _, _ in sites]), draws)
    traced = [(role, layer) for value, role, layer in sites if np.isfinite(value)]
    roles, places = Counter(role for role, _ in traced), Counter(layer for _, layer in traced)
    return Best(effect, tuple(roles[role] for role in ROLES), tuple(places[layer] for layer in range(layers)))


def _draws(facts: int, resamples: int, seed: int) -> Array:
    """Count of each fact in each resample, `[resamples, facts]`."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(facts, size=facts), minlength=facts) for _ in range(resamples)]).astype(
        np.float64
    )


def _statistics(values: Array, draws: Array) -> dict[str, Array]:
    """The columns of the long table for values `[facts, ...]`, in which NaN does not count."""
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    facts = there.sum(0)
    mean = _quotient(filled.sum(0), facts)
    deviation = np.where(there, values - mean, 0.0)
    half = 1.96 * np.sqrt(_quotient(_quotient((deviation**2).sum(0), facts - 1), facts))

    flat = (len(values), -1)
    means = _quotient(draws @ filled.reshape(flat), draws @ there.reshape(flat).astype(np.float64))
    return _columns(mean, half, means, facts)


def _sums(restored: Array, first: int, last: int) -> Array:
    """Number, sum and sum of squares of P*,clean[o] of a fact's tokens in each role of the published notebook.

    `[3, roles, layers]`, from `[tokens, layers]`. A prompt that ends with its subject has no last token.
    """
    end = len(restored) - 1
    tokens = {
        "subject_first": range(first, first + 1),
        "subject_middle": range(first + 1, last),
        "subject_last": range(last, last + 1),
        "after_subject": range(last + 1, min(last + 2, end + 1)),
        "further": range(last + 2, end),
        "last": range(max(last + 1, end), end + 1),
    }
    there = np.isfinite(restored)
    filled = np.where(there, restored, 0.0)
    return np.stack([[of[list(tokens[role])].sum(0) for role in ROLES] for of in (there, filled, filled**2)])


def _pooled(sums: Array, corrupted: Array, draws: Array) -> dict[str, Array]:
    """Columns of the long table as the published notebook has them, of `_sums` and P*[o] of all facts."""
    counts, totals, squares = sums.swapaxes(0, 1)
    facts = (counts > 0).sum(0)
    score = _quotient(totals.sum(0), counts.sum(0))
    mean = score - corrupted.mean()
    variance = _quotient(squares.sum(0), counts.sum(0)) - score**2
    half = np.where(facts > 1, 1.96 * np.sqrt(np.maximum(variance, 0.0) / len(sums)), np.nan)

    flat = (len(sums), -1)
    means = _quotient(draws @ totals.reshape(flat), draws @ counts.reshape(flat)) - (draws @ corrupted)[:, None] / len(
        sums
    )
    return _columns(mean, half, means, facts)


def _columns(mean: Array, half: Array, resampled: Array, facts: Array) -> dict[str, Array]:
    """The columns of the long table, the bootstrap's from means `[resamples, sites]`."""
    boot = np.full((2, resampled.shape[1]), np.nan)
    several = facts.reshape(-1) > 1
    if several.any():  # a rare site can be missing from a resample, hence nan
        boot[:, several] = np.nanquantile(resampled[:, several], [0.025, 0.975], axis=0)
    boot_low, boot_high = boot.reshape(2, *mean.shape)
    columns = (mean, mean - half, mean + half, boot_low, boot_high, facts)
    return dict(zip(COLUMNS, columns, strict=True))


def _means(values: Array, draws: Array) -> list[Mean]:
    """One mean a column of `[facts, columns]`."""
    columns = {name: plain(column) for name, column in _statistics(values, draws).items()}
    return [Mean(*row) for row in zip(*(columns[name] for name in COLUMNS), strict=True)]
