"""Means over records with 95 % intervals: of one editor, and of the difference between two.

There are two kinds of intervals. `normal` is the paper's: mean ± 1.96·std/√n over records; for S, the harmonic mean of
the means of ES, PS and NS, that of its linear approximation at the means (the delta method), with the columns'
covariance over records. `bootstrap`: from the 2.5th to the 97.5th percentile over 10,000 sets of records drawn with
replacement, all numbers of a record together.

NaN and None mark numbers that a record does not have; each mean is over the records that have the number. Scales are
those of the values: fractions in, fractions out. An interval is NaN where a mean is over fewer than two records, or
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from errata.base.errors import ConfigError
from errata.base.seeds import derive

Method = Literal["normal", "bootstrap"]
Values = Sequence[float | None] | NDArray[Any]
ByCase = Mapping[int, float | None]

RESAMPLES = 10_000
LEVELS = (2.5, 97.5)  # percentiles

_DRAWN_AT_ONCE = 2**20  # records, over all resamples of a step

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]


@dataclass(frozen=True)
class Estimate:
    """A mean over records with its 95 % interval; NaN where undefined.

    Attributes:
        mean: the number: a mean, or S of means.
        low, high: the ends of its interval.
        count: how many records it is over.
        missing: how many have nothing to count, and are left out.
    """

    mean: float
    low: float
    high: float
    count: int
    missing: int = 0

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def estimate(values: Values, method: Method = "normal", seed: int = 0) -> Estimate:
    """The mean of one number for each record.

    Args:
        values: `[records]`; NaN or None where a record has none.
        method: the way to the interval.
        seed: seed of the resamples.

    Raises:
        ConfigError: if the method is unknown, or the values are not a list of numbers.
    """
    return _summarised(_table([values]), *_MEAN, method, seed)


def harmonic_score(columns: Mapping[str, Values], method: Method = "normal", seed: int = 0) -> Estimate:
    """S: the harmonic mean of the columns' means; 0 if one of them is 0, NaN if one is.

    Args:
        columns: such as ES, PS and NS, each `[records]` in the same order; none negative.
        method: the way to the interval.
        seed: seed of the resamples.

    Raises:
        ConfigError: if there are no columns, they differ in length or hold a negative number, or the method is unknown.
    """
    table = _table(list(columns.values()))
    _require_shares(table)
    return _summarised(table, _harmonic, _harmonic_slope, method, seed)


def paired(one: ByCase, other: ByCase, method: Method = "normal", seed: int = 0) -> Estimate:
    """The mean difference of two editors, `one` − `other`, over the records that both have a number for.

    Args:
        one, other: the numbers by case id. A case that only one of them has is missing.
        method: the way to the interval.
        seed: seed of the resamples.

    Raises:
        ConfigError: if they have no case in common, or the method is unknown.
    """
    first, second = _side_by_side({"": one}, {"": other})
    return _summarised(first - second, *_MEAN, method, seed)


def paired_harmonic(
    one: Mapping[str, ByCase], other: Mapping[str, ByCase], method: Method = "normal", seed: int = 0
) -> Estimate:
    """The difference of S between two editors, `one` − `other`, over the same records.

    Args:
        one, other: for each column, such as ES, PS and NS, the numbers by case id. One that only one of them has is
            missing for both, so that both are measured on the same prompts.
        method: the way to the interval.
        seed: seed of the resamples.

    Raises:
        ConfigError: if the columns differ, no case is in common, a number is negative, or the method is unknown.
    """
    if set(one) != set(other):
        raise ConfigError(f"{', '.join(one)} and {', '.join(other)} cannot be compared: both need the same columns")
    first, second = _side_by_side(one, other)
    _require_shares(table := np.hstack([first, second]))
    half = len(one)

    def difference(means: Array) -> Array:
        return _harmonic(means[..., :half]) - _harmonic(means[..., half:])

    def slope(means: Array) -> Array:
        return np.concatenate([_harmonic_slope(means[:half]), -_harmonic_slope(means[half:])])

    return _summarised(table, difference, slope, method, seed)


# ---- from lists to tables `[records, columns]` ------------------------------------------------------------


def _table(columns: Sequence[Values]) -> Array:
    try:
        table = np.array([list(column) for column in columns], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"these are not columns of numbers, one a record and as many in each: {error}") from error
    if table.ndim != 2:
        raise ConfigError("there is nothing to take a mean of: give columns of numbers, one a record")
    return table.T


def _side_by_side(one: Mapping[str, ByCase], other: Mapping[str, ByCase]) -> tuple[Array, Array]:
    """Two tables over all cases that there are, NaN wherever one of them has nothing."""
    theirs = [set[int]().union(*columns.values()) for columns in (one, other)]
    if not theirs[0] & theirs[1]:
        raise ConfigError("the two have no record in common, so there is no difference: compare runs over the same")
    cases = sorted(theirs[0] | theirs[1])
    first, second = (
        _table([[columns[name].get(case, math.nan) for case in cases] for name in one]) for columns in (one, other)
    )
    both = ~np.isnan(first) & ~np.isnan(second)
    return np.where(both, first, math.nan), np.where(both, second, math.nan)


def _require_shares(table: Array) -> None:
    if (table < 0).any():
        raise ConfigError(f"a harmonic mean is of shares, and {np.nanmin(table):g} is below 0")


# ---- from means to numbers: each function with its slope at the means `[columns]` -------------------------


def _only(means: Array) -> Array:
    return means[..., 0]


_MEAN: tuple[Curve, Curve] = _only, np.ones_like


def _harmonic(means: Array) -> Array:
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1 / means).sum(-1)


def _harmonic_slope(means: Array) -> Array:
    """0 where S is 0: then a column is 0 in every record, and no other moves S."""
    rise = _harmonic(means) ** 2 / len(means)
    return np.divide(rise, means**2, out=np.zeros_like(means), where=means > 0)


# ---- intervals --------------------------------------------------------------------------------------------


def _summarised(table: Array, curve: Curve, slope: Curve, method: Method, seed: int) -> Estimate:
    """A function of the means of columns `[records, columns]`."""
    if method not in get_args(Method):
        raise ConfigError(f"there is no interval {method!r}: choose from {', '.join(get_args(Method))}")
    there = ~np.isnan(table)
    kept = there.any(1)
    missing, table, there = int((~kept).sum()), table[kept], there[kept]
    records, each = len(table), there.sum(0)
    if not each.all():
        return Estimate(math.nan, math.nan, math.nan, records, missing)
    filled = np.where(there, table, 0.0)
    means = filled.sum(0) / each
    mean = float(curve(means))
    if each.min() < 2 or not np.isfinite(means).all():
        return Estimate(mean, math.nan, math.nan, records, missing)
    if method == "normal":
        # What each record adds to the number; a column that few records have moves more with each of them.
        moved = np.where(there, table - means, 0.0) * (records / each) @ slope(means)
        with np.errstate(over="ignore", invalid="ignore"):  # a variance may overflow where the numbers do not
            half = 1.96 * float(moved.std(ddof=1)) / records**0.5
        if not math.isfinite(half):
            return Estimate(mean, math.nan, math.nan, records, missing)
        return Estimate(mean, mean - half, mean + half, records, missing)
    drawn = curve(_resampled(filled, there, seed))
    low, high = np.nanpercentile(drawn, LEVELS)  # a column that few records have may be in none that were drawn
    return Estimate(mean, float(low), float(high), records, missing)


def _resampled(filled: Array, there: NDArray[np.bool_], seed: int) -> Array:
    """Means of resampled records, `[resamples, columns]`; NaN where none of them has the column."""
    records = len(filled)
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    both = np.hstack([filled, there])
    sums = np.empty((RESAMPLES, both.shape[1]))
    step = max(1, _DRAWN_AT_ONCE // records)
    for begin in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - begin)
        places = rng.integers(records, size=(rows, records)) + np.arange(rows)[:, None] * records
        often = np.bincount(places.ravel(), minlength=rows * records).reshape(rows, records)
        sums[begin : begin + rows] = often.astype(np.float64) @ both
    totals, counts = np.hsplit(sums, 2)
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
