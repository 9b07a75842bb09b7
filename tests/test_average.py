"""Averages over traces: against loops over sites, with gaps, refusals, and files of three formats."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import numpy as np
import pandas
import pytest

from errata.base.errors import ConfigError, OutputError, ResultFileError
from errata.base.facts import Fact
from errata.tracing.average import NO_EFFECT, UNKNOWN, AverageEffects, average_effects
from errata.tracing.result import ROLES
from helpers.traces import SETTINGS, made, random_traces

ENDINGS = ("json", "csv", "parquet")


# ---- numbers ----------------------------------------------------------------------------------------------


def test_means_and_intervals_are_those_of_a_loop_over_sites():
    traces = random_traces()
    found = average_effects(traces)
    for part in ("state", "mlp"):
        for r, role in enumerate(ROLES):
            for layer in range(5):
                per_fact = []
                for trace in traces:
                    values = [
                        trace.restored[part][i, layer] - trace.corrupted
                        for i, its in enumerate(trace.roles)
                        if its == role and not np.isnan(trace.restored[part][i, layer])
                    ]
                    if values:
                        per_fact.append(sum(values) / len(values))
                columns = {name: found.sites[part][name][r, layer] for name in found.sites[part]}
                half = 1.96 * np.std(per_fact, ddof=1) / len(per_fact) ** 0.5
                assert columns["facts"] == len(per_fact) > 2
                assert columns["mean"] == pytest.approx(np.mean(per_fact), rel=1e-12)
                assert columns["low"] == pytest.approx(np.mean(per_fact) - half, rel=1e-12)
                assert columns["high"] == pytest.approx(np.mean(per_fact) + half, rel=1e-12)
                assert found.interval[part][r, layer] == pytest.approx(half, rel=1e-9)
                assert columns["boot_low"] < columns["mean"] < columns["boot_high"]
    assert found.facts == 40
    for name in ("clean", "corrupted", "total_effect"):
        values = [getattr(trace, name) for trace in traces]
        assert getattr(found, name) == pytest.approx(np.mean(values), rel=1e-12)
        assert found.means[name].high - found.means[name].mean == pytest.approx(1.96 * np.std(values, ddof=1) / 40**0.5)
        assert found.means[name].boot_low < np.mean(values) < found.means[name].boot_high


def test_the_bootstrap_is_percentiles_of_means_of_facts_drawn_with_replacement():
    traces = random_traces(facts=12, layers=1, gaps=0.3, parts=("state",))
    found = average_effects(traces, resamples=50, seed=3)
    rng = np.random.default_rng(3)
    draws = [rng.integers(12, size=12) for _ in range(50)]
    clean = [np.mean([traces[i].clean for i in draw]) for draw in draws]
    assert found.means["clean"].boot_low == pytest.approx(np.quantile(clean, 0.025), rel=1e-12)
    assert found.means["clean"].boot_high == pytest.approx(np.quantile(clean, 0.975), rel=1e-12)
    # A role that some facts do not have, and so some resamples neither.
    last = ROLES.index("subject_first")
    values = [
        np.nanmean([np.nan, *(t.restored["state"][i, 0] - t.corrupted for i, r in enumerate(t.roles) if r == ROLES[0])])
        if ROLES[0] in t.roles and np.isfinite(t.restored["state"][t.roles.index(ROLES[0]), 0])
        else np.nan
        for t in traces
    ]
    assert 2 <= np.isfinite(values).sum() < 8
    drawn = [np.array(values)[draw] for draw in draws]
    means = [np.nanmean(of) for of in drawn if np.isfinite(of).any()]
    assert found.sites["state"]["boot_low"][last, 0] == pytest.approx(np.quantile(means, 0.025), rel=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, facts, layers = 0.3, 80, 600  # every layer is an experiment of its own
    traces = [made(rng.normal(truth, 0.2, (1, layers)), corrupted=0.0) for _ in range(facts)]
    columns = {
        name: values[ROLES.index("subject_last")] for name, values in average_effects(traces).sites["state"].items()
    }
    for low, high in (("low", "high"), ("boot_low", "boot_high")):
        covered = np.mean((columns[low] < truth) & (truth < columns[high]))
        assert 0.92 < covered < 0.97
    np.testing.assert_allclose(columns["boot_low"], columns["low"], atol=0.012)


def test_one_token_subjects_are_last_and_several_tokens_of_a_role_are_their_mean():
    one = made([[0.3], [0.2], [0.4], [0.6], [0.7]], corrupted=0.0)
    long = made([[0.1], [0.2], [0.4], [0.8], [0.9]], (0, 3), corrupted=0.0)
    found = average_effects([one, long])
    table = dict(zip(ROLES, found.mean["state"][:, 0], strict=True))
    assert found.counts == (1, 1, 2, 1, 1, 2)
    assert table == pytest.approx(
        {
            "subject_first": 0.1,
            "subject_middle": 0.3,
            "subject_last": (0.3 + 0.8) / 2,
            "after_subject": 0.2,
            "further": 0.5,
            "last": 0.8,
        }
    )
    assert np.isnan(found.interval["state"][0]).all()  # of one fact


def test_sites_that_were_not_traced_do_not_count():
    gap = np.nan
    found = average_effects(
        [
            made([[0.5, gap], [gap, gap], [0.3, 0.2]], (0, 1), corrupted=0.0),
            made([[0.7, gap], [0.4, gap], [0.5, gap]], (0, 1), corrupted=0.0),
        ]
    )
    last = ROLES.index("subject_last")
    assert found.sites["state"]["facts"][last].tolist() == [1, 0]
    assert found.mean["state"][last, 0] == 0.4
    assert np.isnan(found.mean["state"][last, 1])
    assert found.counts == (2, 0, 1, 0, 0, 2)
    assert found.mean["state"][ROLES.index("last")].tolist() == [0.4, 0.2]
    assert found.facts == 2


def test_the_best_site_of_each_fact():
    found = average_effects(
        [
            made([[0.0, 0.9], [0.1, 0.3], [0.5, 0.2], [0.2, 0.6]], (1, 2), corrupted=0.0),
            made([[0.1, 0.2], [0.4, 0.8], [0.2, 0.1]], (1, 1), corrupted=0.0),
            made([[np.nan, np.nan], [0.7, 0.8]], (0, 0), corrupted=0.0),
        ]
    )
    subject, everywhere = found.best["state"]["subject"], found.best["state"]["all"]
    assert (subject.effect.mean, subject.effect.facts) == (pytest.approx((0.5 + 0.8) / 2), 2)
    assert subject.roles == (0, 0, 2, 0, 0, 0)
    assert subject.layers == (1, 1)
    assert (everywhere.effect.mean, everywhere.effect.facts) == (pytest.approx((0.6 + 0.8 + 0.8) / 3), 3)
    assert everywhere.roles == (0, 0, 1, 0, 0, 2)
    assert everywhere.layers == (0, 3)
    assert everywhere.effect.low < everywhere.effect.mean < everywhere.effect.high


def test_traces_are_read_once_and_a_seed_decides_the_intervals():
    traces = random_traces(10)
    again, same, other = (average_effects(iter(traces), seed=seed) for seed in (0, 0, 1))
    for name in ("boot_low", "boot_high"):
        assert np.array_equal(again.sites["mlp"][name], same.sites["mlp"][name], equal_nan=True)
        assert not np.array_equal(again.sites["mlp"][name], other.sites["mlp"][name], equal_nan=True)


def test_a_thousand_facts_take_seconds():
    rng = np.random.default_rng(0)
    parts = ("state", "mlp", "attention")
    traces = [made({part: rng.uniform(0, 1, (8, 48)) for part in parts}, (1, 3)) for _ in range(1000)]
    begin = time.process_time()
    found = average_effects(traces)
    assert time.process_time() - begin < 10
    assert found.counts == (1000,) * 6


def test_reference_averages_are_those_of_the_published_notebook():
    """One subject of one token, one fact below 0.01, one prompt whose last token is the first after the subject."""
    traces = [
        made([[0.2], [0.3], [0.6], [0.5]], (0, 0), clean=0.9, corrupted=0.1),
        made([[0.0], [0.4], [0.1], [0.3], [0.6], [0.2], [0.1], [0.2], [0.8]], (1, 4), clean=0.205, corrupted=0.2),
        made([[0.5], [0.3], [0.7]], (0, 1), clean=0.6, corrupted=0.3),
    ]
    found = average_effects(traces, averaging="reference")
    scores = {
        "subject_first": (0.2, 0.4, 0.5),
        "subject_middle": (0.1, 0.3),
        "subject_last": (0.2, 0.6, 0.3),
        "after_subject": (0.3, 0.2, 0.7),
        "further": (0.6, 0.1, 0.2),
        "last": (0.5, 0.8, 0.7),
    }
    for row, role in enumerate(ROLES):
        mean, std = np.mean(scores[role]), np.std(scores[role])
        columns = {name: column[row, 0] for name, column in found.sites["state"].items()}
        assert columns["mean"] == pytest.approx(mean - 0.2, abs=1e-12)
        if columns["facts"] > 1:
            assert columns["high"] - columns["mean"] == pytest.approx(1.96 * std / 3**0.5, rel=1e-9)
            assert columns["boot_low"] <= columns["mean"] <= columns["boot_high"]
    assert found.sites["state"]["mean"][:, 0] == pytest.approx([1 / 6, 0, 1 / 6, 0.2, 0.1, 7 / 15])
    assert found.counts == (3, 1, 3, 3, 2, 3)
    assert found.total_effect == pytest.approx(1.705 / 3 - 0.2)
    assert {"averaging": "reference", "min_effect": -1.0}.items() <= found.criteria.items()
    ours = average_effects(traces, min_effect=-1)
    assert ours.mean["state"][:, 0] == pytest.approx([0.2, 0, 0.5 / 3, 0.1, 0.225, 1.4 / 3])
    assert average_effects(traces, averaging="reference", min_effect=0.01).facts == 2
    with pytest.raises(ConfigError, match="facts, reference"):
        average_effects(traces, averaging="tokens")


def test_reference_averages_of_random_traces_are_those_of_the_notebooks_loop():
    traces = [trace for trace in random_traces(gaps=0) if trace.subject[1] + 1 < len(trace.tokens)]
    found = average_effects(traces, averaging="reference")
    for part in ("state", "mlp"):
        rows = [[] for _ in ROLES]
        for trace in traces:
            scores, (first, last_subject) = trace.restored[part], trace.subject
            after, last = last_subject + 1, len(scores) - 1
            rows[0] += [scores[first]]
            rows[1] += list(scores[first + 1 : last_subject])
            rows[2] += [scores[last_subject]]
            rows[3] += [scores[after]]
            rows[4] += list(scores[after + 1 : last])
            rows[5] += [scores[last]]
        want = np.stack([np.mean(row, 0) for row in rows]) - np.mean([trace.corrupted for trace in traces])
        error = 1.96 * np.stack([np.std(row, 0) for row in rows]) / len(traces) ** 0.5
        np.testing.assert_allclose(found.mean[part], want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.interval[part], error, rtol=1e-9)


# ---- what is left out and what is refused -----------------------------------------------------------------


def test_traces_without_effect_or_knowledge_are_left_out_and_counted():
    traces = [
        made([[0.5]], known=True),
        made([[0.9]], known=False),
        made([[0.9]], known=False, corrupted=0.895),
        made([[0.9]], corrupted=0.895),
        made([[0.9]], corrupted=0.95),
        made([[0.7]], known=None),
    ]
    found = average_effects(traces)
    assert found.left_out == {UNKNOWN: 2, NO_EFFECT: 2}
    assert found.facts == 2
    assert found.mean["state"][2, 0] == pytest.approx(0.5)
    assert average_effects(traces, known_only=False).facts == 3
    everything = average_effects(traces, known_only=False, min_effect=-1)
    assert (everything.facts, everything.left_out) == (6, {UNKNOWN: 0, NO_EFFECT: 0})
    with pytest.raises(ConfigError, match=r"all are left out: 2 for 'answer is not the object', 1 for 'no effect'"):
        average_effects(traces[1:4])
    with pytest.raises(ConfigError, match="at least one"):
        average_effects([])


@pytest.mark.parametrize("arguments", [{"resamples": 0}, {"seed": -1}, {"min_effect": 2.0}, {"min_effect": np.nan}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="resamples are at least 1"):
        average_effects([made([[0.5]])], **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model: 'm' and 'other'"),
        ({"fingerprint": "g"}, "fingerprint: 'f' and 'g'"),
        ({"settings": {**SETTINGS, "window": 4}}, "window: 10 and 4"),
        ({"settings": {**SETTINGS, "severed": True}}, "severed: None and True"),
        (
            {"settings": {**SETTINGS, "corruption": {"kind": "gaussian", "multiple": 2.0}}},
            r"corruption\.multiple: 3\.0 and 2\.0",
        ),
        ({"settings": {**SETTINGS, "sigma": None}}, "noise: None and 0.3"),
        ({"restored": {"state": np.ones((1, 3))}}, "layers of state: 2 and 3"),
        ({"restored": {"state": np.ones((1, 2)), "mlp": np.ones((1, 2))}}, "layers of mlp: None and 2"),
    ],
)
@pytest.mark.parametrize("left_out", [False, True])
def test_traces_that_were_not_made_alike_are_refused(changes, message, left_out):
    first = made([[0.5, 0.6]], known=False if left_out else None)
    other = made(**{"restored": [[0.5, 0.6]], **changes, "fact": Fact("Oslo", "{} is in")})
    with pytest.raises(ConfigError, match=rf"'Rome is in' and 'Oslo is in' differ \({message}"):
        average_effects([first, other])


def test_a_level_measured_on_each_fact_may_differ_and_is_then_not_carried():
    other = {**SETTINGS, "noise": 0.6, "sigma": 0.2, "layers": [0, 1]}  # a list, as from a file
    found = average_effects([made([[0.5]]), made([[0.5]], settings=other, versions={"torch": "2.10"})])
    assert found.settings == {
        "samples": 10,
        "corruption": {"kind": "gaussian", "multiple": 3.0},
        "window": 10,
        "layers": [0, 1],
    }
    assert found.versions == {"torch": "2.10, 2.9"}
    assert (found.model, found.fingerprint) == ("m", "f")
    assert average_effects([made([[0.5]])]).settings["noise"] == 0.3


# ---- tables and files -------------------------------------------------------------------------------------


def equal(one: AverageEffects, other: AverageEffects) -> None:
    """Everything is the same, numbers to the last bit."""
    assert list(one.sites) == list(other.sites)
    for part, columns in one.sites.items():
        for name, values in columns.items():
            assert values.dtype == other.sites[part][name].dtype
            np.testing.assert_array_equal(values, other.sites[part][name], strict=True)
    for field in ("means", "best", "left_out", "criteria", "model", "fingerprint", "settings", "versions", "counts"):
        assert getattr(one, field) == getattr(other, field), field


def test_the_table_is_long():
    found = average_effects(random_traces(parts=("mlp", "state")))
    frame = found.to_frame()
    assert list(frame) == ["part", "role", "layer", "mean", "low", "high", "boot_low", "boot_high", "facts"]
    assert len(frame) == 2 * len(ROLES) * 5
    row = frame[(frame.part == "state") & (frame.role == "further") & (frame.layer == 3)].iloc[0]
    assert row["mean"] == found.mean["state"][ROLES.index("further"), 3]
    assert row["high"] == found.sites["state"]["high"][ROLES.index("further"), 3]
    assert frame.facts.dtype == np.int64


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_give_everything_back(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    traces = [
        *random_traces(gaps=0.5, parts=("state", "mlp", "attention")),
        made({p: np.ones((1, 5)) for p in ("state", "mlp", "attention")}, known=False),
    ]
    for found in (average_effects(traces), average_effects(traces[:1])):  # of one fact: no intervals
        found.save(path)
        equal(AverageEffects.load(path), found)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_are_to_be_read_by_others(tmp_path):
    found = average_effects(random_traces(gaps=0.5))
    for ending in ENDINGS:
        found.save(tmp_path / f"a.{ending}")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (content["kind"], content["version"], content["roles"]) == ("average effects", 1, list(ROLES))
    assert content["means"]["total_effect"] == asdict(found.means["total_effect"])
    assert content["sites"]["mlp"]["mean"][2][1] == found.mean["mlp"][2, 1]
    by_csv = pandas.read_csv(tmp_path / "a.csv")
    assert json.loads(by_csv.pop("errata").dropna().item())["settings"]["window"] == 10
    pandas.testing.assert_frame_equal(by_csv, found.to_frame(), rtol=1e-12)
    by_parquet = pandas.read_parquet(tmp_path / "a.parquet")
    assert by_parquet.attrs["errata"]["settings"]["window"] == 10
    pandas.testing.assert_frame_equal(by_parquet, found.to_frame(), check_exact=True)


def test_rows_may_have_been_sorted(tmp_path):
    found = average_effects(random_traces())
    found.save(tmp_path / "a.csv")
    head, *rows = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "a.csv").write_text("\n".join([head, *sorted(rows), ""]), encoding="utf-8")
    equal(AverageEffects.load(tmp_path / "a.csv"), found)


def test_a_csv_of_an_earlier_version_is_read(tmp_path):
    found = average_effects(random_traces())
    found.save(tmp_path / "a.csv")
    header = pandas.read_csv(tmp_path / "a.csv")["errata"].dropna().item()
    table = found.to_frame().to_csv(index=False, lineterminator="\n")
    (tmp_path / "old.csv").write_text(f"# errata: {header}\n{table}", encoding="utf-8")
    equal(AverageEffects.load(tmp_path / "old.csv"), found)


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files_are_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    average_effects(random_traces(5)).save(path)
    whole = path.read_bytes()
    lengths = [0, 1, 8, 20, len(whole) // 3, len(whole) // 2, len(whole) - 99, len(whole) - 9, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ResultFileError, match="not a whole file of averages"):
            AverageEffects.load(path)
    path.write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(ResultFileError):
        AverageEffects.load(path)


def test_other_files_are_refused(tmp_path):
    found = average_effects(random_traces(5))
    with pytest.raises(ResultFileError, match="there are no averages"):
        AverageEffects.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"one of \.json, \.csv, \.parquet"):
        found.save(tmp_path / "a.xlsx")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OutputError):
        found.save(tmp_path / "folder.json")
    found.to_frame().to_csv(tmp_path / "foreign.csv")
    found.to_frame().to_parquet(tmp_path / "foreign.parquet")
    (tmp_path / "foreign.json").write_text("[1, 2]")
    for ending in ENDINGS:
        with pytest.raises(ResultFileError, match="not a whole file of averages"):
            AverageEffects.load(tmp_path / f"foreign.{ending}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(kind="causal trace"), "of the kind 'causal trace'"),
        (lambda content: content.update(version=2), "format 2, newer"),
        (lambda content: content.update(roles=["first"]), "its roles are others"),
        (lambda content: content.pop("fingerprint"), "fingerprint"),
        (lambda content: content["sites"].pop("mlp"), "do not fit together"),
        (lambda content: content["sites"]["mlp"]["low"].pop(), "not of one size"),
        (lambda content: content["sites"]["mlp"].update(mean="x"), "not a whole file of averages"),
        (lambda content: content["means"]["clean"].pop("low"), "low"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    average_effects(random_traces(5)).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ResultFileError, match=message):
        AverageEffects.load(path)
