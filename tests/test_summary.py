"""Intervals against closed forms, plain loops and simulated samples whose truth is known."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, harmonic_mean, stdev

import numpy as np
import pytest

from errata.base.errors import ConfigError
from errata.base.seeds import derive
from errata.metrics import summary
from errata.metrics.summary import Estimate, estimate, harmonic_score, paired, paired_harmonic

METHODS = ("normal", "bootstrap")
NAN = math.nan


def shares(records: int, seed: int = 0) -> dict[str, np.ndarray]:
    """ES, PS and NS that depend on each other, as they do in records."""
    rng = np.random.default_rng(seed)
    ease = rng.random(records)
    return {
        "es": (rng.random(records) < 0.6 + 0.4 * ease).astype(float),
        "ps": rng.binomial(2, 0.3 + 0.6 * ease) / 2,
        "ns": rng.binomial(10, 0.9 - 0.5 * ease) / 10,
    }


def s_of(columns) -> float:
    return harmonic_mean([float(np.nanmean(column)) for column in columns])


def resamples(records: int, seed: int = 0):
    """The same draws, one record after the other."""
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    for _ in range(summary.RESAMPLES):
        yield rng.integers(records, size=records)


# ---- one number -------------------------------------------------------------------------------------------


def test_normal_is_its_closed_form():
    values = [0.25, 1.0, 0.5, 0.75, 0.0, 1.0]
    half = 1.96 * stdev(values) / math.sqrt(6)
    got = estimate(values)
    assert (got.mean, got.low, got.high) == pytest.approx((fmean(values), fmean(values) - half, fmean(values) + half))
    assert (got.count, got.missing) == (6, 0)


def test_bootstrap_is_that_of_a_double_loop(monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 500)
    values = np.random.default_rng(1).exponential(size=40)
    means = [fmean(values[i] for i in drawn) for drawn in resamples(40, seed=3)]
    got = estimate(values, "bootstrap", seed=3)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-12)
    assert got.mean == pytest.approx(values.mean(), rel=1e-14)


def test_bootstrap_of_many_is_the_normal_interval_and_keeps_its_memory(monkeypatch):
    sizes = []
    bincount = np.bincount
    monkeypatch.setattr(np, "bincount", lambda x, **k: sizes.append(len(x)) or bincount(x, **k))
    values = np.random.default_rng(2).normal(0.3, 2, size=5_000)
    normal, bootstrap = estimate(values), estimate(values, "bootstrap")
    width = normal.high - normal.low
    assert abs(bootstrap.low - normal.low) < 0.03 * width
    assert abs(bootstrap.high - normal.high) < 0.03 * width
    assert sum(sizes) == summary.RESAMPLES * 5_000
    assert max(sizes) <= summary._DRAWN_AT_ONCE


def test_bootstrap_of_skewed_values_is_not_symmetric():
    got = estimate(np.random.default_rng(0).exponential(size=30) ** 2, "bootstrap")
    assert got.high - got.mean > 1.15 * (got.mean - got.low)


def test_a_seed_is_a_set_of_draws():
    values = np.random.default_rng(5).random(30)
    assert estimate(values, "bootstrap", seed=1) == estimate(values, "bootstrap", seed=1)
    assert estimate(values, "bootstrap", seed=1) != estimate(values, "bootstrap", seed=2)
    assert estimate(values, "normal", seed=1) == estimate(values, "normal", seed=2)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_there_are_left_out_and_counted(method):
    values = [0.1, 0.9, 0.4, 0.6]
    got = estimate([NAN, 0.1, 0.9, None, 0.4, NAN, 0.6], method)
    wanted = estimate(values, method)
    assert got == Estimate(wanted.mean, wanted.low, wanted.high, 4, 3)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_have_no_interval(method):
    nothing, one, same = estimate([], method), estimate([0.5, NAN], method), estimate([0.5, 0.5], method)
    assert (nothing.count, one.count, one.missing, one.mean) == (0, 1, 1, 0.5)
    assert all(map(math.isnan, (nothing.mean, nothing.low, nothing.high, one.low, one.high)))
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    overflown = estimate([5.0, 7.0, 1e200], method)  # finite, and its variance is not
    assert method != "normal" or (math.isnan(overflown.low) and math.isnan(overflown.high))
    infinite = estimate([1.0, math.inf, 2.0], method)
    assert infinite.mean == math.inf
    assert math.isnan(infinite.low)


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth_nineteen_times_of_twenty(method, monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 1000)
    rng, runs = np.random.default_rng(7), 500
    hits = 0
    for _ in range(runs):
        got = estimate(rng.binomial(10, 0.7, size=60) / 10, method)
        hits += got.low <= 0.7 <= got.high
    assert abs(hits / runs - 0.95) < 0.03  # three standard errors


# ---- S ----------------------------------------------------------------------------------------------------


def test_s_is_the_harmonic_mean_of_means():
    columns = shares(200)
    for method in METHODS:
        got = harmonic_score(columns, method)
        assert got.mean == pytest.approx(s_of(columns.values()), rel=1e-14)
        assert got.low < got.mean < got.high
        assert (got.count, got.missing) == (200, 0)


def test_normal_interval_of_s_is_the_delta_method_with_covariance():
    columns = shares(300)
    table = np.array(list(columns.values()))
    step, means = 1e-6, table.mean(1)
    slope = [
        (harmonic_mean(means + step * np.eye(3)[j]) - harmonic_mean(means - step * np.eye(3)[j])) / (2 * step)
        for j in range(3)
    ]
    half = 1.96 * math.sqrt(slope @ np.cov(table) @ np.array(slope) / 300)
    got = harmonic_score(columns)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=1e-7)
    alone = 1.96 * math.sqrt(sum(s**2 * v for s, v in zip(slope, table.var(1, ddof=1), strict=True)) / 300)
    assert abs(half / alone - 1) > 0.01  # the covariance is felt


def test_bootstrap_of_s_draws_whole_records(monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 400)
    columns = shares(50, seed=4)
    drawn = [s_of([column[rows] for column in columns.values()]) for rows in resamples(50)]
    got = harmonic_score(columns, "bootstrap")
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), rel=1e-12)


def test_records_without_some_prompts_count_in_the_other_columns(monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 400)
    columns = shares(80, seed=6)
    columns["ps"][::3] = NAN
    for column in columns.values():
        column[[5, 7]] = NAN
    bootstrap, normal = harmonic_score(columns, "bootstrap"), harmonic_score(columns)
    kept = {name: np.delete(column, [5, 7]) for name, column in columns.items()}
    drawn = [s_of([column[rows] for column in kept.values()]) for rows in resamples(78)]
    assert (bootstrap.low, bootstrap.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), rel=1e-12)
    assert normal.mean == bootstrap.mean == pytest.approx(s_of(columns.values()))
    assert (normal.count, normal.missing) == (78, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("absent", [0.0, 0.5])
def test_intervals_of_s_cover_the_truth(method, absent, monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 600)
    truth = s_of(shares(2_000_000, seed=99).values())
    rng, runs, hits = np.random.default_rng(8), 400, 0
    for run in range(runs):
        columns = shares(120, seed=1000 + run)
        columns["ps"][rng.random(120) < absent] = NAN
        got = harmonic_score(columns, method)
        hits += got.low <= truth <= got.high
    assert abs(hits / runs - 0.95) < 0.033  # three standard errors


@pytest.mark.parametrize("method", METHODS)
def test_s_is_zero_with_one_mean_and_undefined_with_one_column(method):
    assert harmonic_score({"es": [0, 0, 0], "ps": [1, 1, 0], "ns": [1, 0.5, 0]}, method) == Estimate(0, 0, 0, 3)
    gone = harmonic_score({"es": [1, 0, 1], "ps": [NAN] * 3, "ns": [1, 0.5, 0]}, method)
    assert math.isnan(gone.mean)
    assert math.isnan(gone.low)
    rare = harmonic_score({"es": [1, 0, 1], "ps": [NAN, 1, NAN], "ns": [1, 0.5, 0]}, method)
    assert rare.mean == pytest.approx(harmonic_mean([2 / 3, 1, 0.5]))
    assert math.isnan(rare.high)


def test_a_column_that_a_draw_may_miss_still_has_an_interval():
    columns = {"es": [1, 0, 1, 1], "ps": [0.5, 1, NAN, NAN], "ns": [1, 0.5, 0.2, 0.9]}
    got = harmonic_score(columns, "bootstrap")
    assert 0 <= got.low < got.mean < got.high <= 1


# ---- two editors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_difference_is_over_the_same_records(method):
    one = {70_007: 0.9, 10: 0.5, 1000: 0.7, 9: 0.1, 4: NAN, 5: None}
    other = {10: 0.4, 1000: 0.9, 70_007: 0.3, 4: 0.5, 8: 0.0, 5: 0.2}
    got = paired(one, other, method)
    wanted = estimate([0.5 - 0.4, 0.7 - 0.9, 0.9 - 0.3], method)
    assert (got.mean, got.low, got.high) == pytest.approx((wanted.mean, wanted.low, wanted.high))
    assert (got.count, got.missing) == (3, 4)
    assert paired(one, dict(reversed(other.items())), method) == got


def test_pairing_is_sharper_than_two_intervals():
    rng = np.random.default_rng(3)
    ease = rng.random(200)
    one, other = (dict(enumerate(ease + rng.normal(shift, 0.05, 200))) for shift in (0.02, 0.0))
    difference = paired(one, other)
    assert difference.low > 0
    assert estimate(list(one.values())).low < estimate(list(other.values())).high
    assert paired(other, one).mean == pytest.approx(-difference.mean)


def by_case(columns):
    """Case ids that a set does not keep in order."""
    return {name: {7919 * i: value for i, value in enumerate(column.tolist())} for name, column in columns.items()}


def test_normal_difference_of_s_is_the_delta_method():
    one, other = shares(250, seed=1), shares(250, seed=2)
    table = np.array([*one.values(), *other.values()])
    means, step = table.mean(1), 1e-6

    def difference(m):
        return harmonic_mean(m[:3]) - harmonic_mean(m[3:])

    slope = np.array([(difference(means + step * e) - difference(means - step * e)) / (2 * step) for e in np.eye(6)])
    got = paired_harmonic(by_case(one), by_case(other))
    assert got.mean == pytest.approx(s_of(one.values()) - s_of(other.values()))
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * math.sqrt(slope @ np.cov(table) @ slope / 250), rel=1e-6)


def test_bootstrap_difference_of_s_draws_the_same_records_for_both(monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 400)
    one, other = shares(60, seed=1), shares(60, seed=2)
    drawn = [s_of([c[rows] for c in one.values()]) - s_of([c[rows] for c in other.values()]) for rows in resamples(60)]
    got = paired_harmonic(by_case(one), by_case(other), "bootstrap")
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_an_editor_does_not_differ_from_itself(method):
    one = by_case(shares(40))
    turned = {name: one[name] for name in reversed(one)}
    got = paired_harmonic(one, turned, method)
    assert (got.mean, got.low, got.high) == pytest.approx((0, 0, 0), abs=1e-15)


def test_what_one_editor_lacks_counts_for_neither():
    one, other = by_case(shares(40, seed=1)), by_case(shares(40, seed=2))
    wanted = paired_harmonic(
        {name: {k: v for k, v in column.items() if k > 2 * 7919} for name, column in one.items()},
        {name: {k: v for k, v in column.items() if k > 2 * 7919} for name, column in other.items()},
    )
    for column in one.values():
        column[0] = NAN
        del column[7919]
    for column in other.values():
        del column[2 * 7919]
    got = paired_harmonic(one, other)
    assert (got.mean, got.low, got.high) == (wanted.mean, wanted.low, wanted.high)
    assert (got.count, got.missing) == (37, 3)


# ---- refusals ---------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="choose from normal, bootstrap"):
        estimate([1.0, 2.0], "bca")
    with pytest.raises(ConfigError, match="not columns of numbers"):
        harmonic_score({"es": [1, 2], "ps": [1]})
    with pytest.raises(ConfigError, match="not columns of numbers"):
        estimate(["many"])
    with pytest.raises(ConfigError, match="nothing to take"):
        harmonic_score({})
    with pytest.raises(ConfigError, match="nothing to take"):
        estimate([[1.0], [2.0]])
    with pytest.raises(ConfigError, match="below 0"):
        harmonic_score({"es": [1, -0.5]})
    with pytest.raises(ConfigError, match="in common"):
        paired({1: 1.0}, {2: 1.0})
    with pytest.raises(ConfigError, match="same columns"):
        paired_harmonic({"es": {1: 1.0}}, {"ps": {1: 1.0}})


def test_the_level_is_the_normal_s():
    assert NormalDist().cdf(1.96) - NormalDist().cdf(-1.96) == pytest.approx(
        (summary.LEVELS[1] - summary.LEVELS[0]) / 100, abs=1e-4
    )
