"""Corruptions: what is drawn, against numpy by hand; what it is measured on; and its short forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import goldens
from errata.base import budgets
from errata.base.errors import ConfigError, FactError
from errata.models.loading import load_pretrained
from errata.tracing.corruption import Corruption
from errata.tracing.noise import Disturbance, measure, subject_sigma
from tiny import WIDTH, byte_tokenizer, llama_tokenizer, tiny

SUBJECTS = ["Rome", "Dante Alighieri", "The Space Needle"]


def make(family: str = "gpt2", **hints):
    hf = tiny(family, layers=2, dtype=torch.float64)
    if hints:
        hf.config.errata = hints
    return load_pretrained((hf, byte_tokenizer()), name=family)


@pytest.fixture(scope="module")
def model():
    return make()


def normal(samples: int, tokens: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randn(samples, tokens, WIDTH)


def table_of(model) -> np.ndarray:
    """The embedding of every token, by hand."""
    return model.hf.get_input_embeddings().weight.detach().numpy()


# ---- what is drawn ----------------------------------------------------------------------------------------


def test_gaussian_noise_is_the_published_codes(model):
    measured = measure(Corruption(level=0.1), model)
    assert np.array_equal(measured.draw(10, 4, 1).numpy(), 0.1 * np.random.RandomState(1).randn(10, 4, WIDTH))
    sigma = subject_sigma(model, SUBJECTS)
    assert np.array_equal(
        measure(Corruption(multiple=2.0), model, SUBJECTS).draw(3, 2, 7).numpy(), 2 * sigma * normal(3, 2, 7)
    )


def test_uniform_noise_is_the_published_codes(model):
    drawn = measure(Corruption("uniform", level=0.2), model).draw(10, 4, 1).numpy()
    assert np.array_equal(drawn, 0.2 * np.random.RandomState(1).uniform(-1, 1, (10, 4, WIDTH)))
    measured = measure(Corruption("uniform"), model, SUBJECTS)
    assert measured.level == 3 * subject_sigma(model, SUBJECTS)
    assert 0.99 * measured.level < float(measured.draw(50, 10, 1).abs().max()) < measured.level


def test_multivariate_noise_has_mean_and_covariance_of_the_vocabulary(model, monkeypatch):
    monkeypatch.setitem(budgets.TOKENS["record"], "cpu", 100)  # several parts
    table = table_of(model)[: len(model.tokenizer)]
    measured = measure(Corruption("multivariate"), model)
    assert (measured.measured_on, measured.measured_tokens) == ("vocabulary", len(table))
    np.testing.assert_allclose(measured.mean.numpy(), table.mean(0), rtol=1e-12)
    np.testing.assert_allclose((measured.root @ measured.root).numpy(), np.cov(table.T), rtol=1e-10, atol=1e-14)
    drawn = measured.draw(3, 2, 5).numpy()
    np.testing.assert_allclose(drawn, table.mean(0) + normal(3, 2, 5) @ measured.root.numpy(), rtol=1e-12)
    many = measured.draw(1000, 40, 1).reshape(-1, WIDTH).numpy()
    np.testing.assert_allclose(many.mean(0), table.mean(0), atol=0.01)
    np.testing.assert_allclose(np.cov(many.T), np.cov(table.T), atol=0.004)


def test_student_noise_scales_the_gaussian_by_chi_square_of_the_next_seed(model):
    gauss = measure(Corruption("multivariate"), model)
    student = measure(Corruption("student", degrees=5), model)
    mean = gauss.mean.numpy()
    factor = np.sqrt((5 - 2) / np.random.RandomState(2).chisquare(5, 12).reshape(3, 4, 1))
    want = mean + factor * (gauss.draw(3, 4, 1).numpy() - mean)
    np.testing.assert_allclose(student.draw(3, 4, 1).numpy(), want, rtol=1e-12, atol=1e-15)
    # The published code draws 1,000 and takes the first: fewer drawn are the same ones.
    assert np.array_equal(
        np.random.RandomState(2).chisquare(5, 1000)[:12], np.random.RandomState(2).chisquare(5, size=12)
    )
    many = measure(Corruption("student", degrees=8), model).draw(1000, 40, 1).reshape(-1, WIDTH).numpy()
    np.testing.assert_allclose(np.cov(many.T), np.cov(table_of(model).T), atol=0.006)
    assert np.isfinite(student.draw(2, 2, 2**32 - 1).numpy()).all()


def test_a_covariance_without_full_rank_has_a_root():
    model = make()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[:, 3:] = 0.25
    measured = measure(Corruption("multivariate"), model)
    drawn = measured.draw(20, 5, 1)
    assert torch.linalg.matrix_rank(measured.root, tol=1e-6) == 3
    np.testing.assert_allclose(drawn[..., 3:].numpy(), 0.25, atol=1e-7)
    assert drawn[..., :3].std() > 0.1


def test_embeddings_that_are_no_numbers_are_refused():
    model = make()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[5, 1] = torch.nan
    with pytest.raises(ConfigError, match="hold NaN"):
        measure(Corruption("multivariate"), model)


def test_a_disturbance_without_measures_draws_nothing():
    with pytest.raises(ConfigError, match="make it by measure"):
        Disturbance(Corruption("multivariate"), WIDTH).draw(1, 1, 1)


# ---- what it is measured on -------------------------------------------------------------------------------


def test_subjects_go_before_the_hint_and_the_hint_before_the_own_subject():
    plain, hinted = make(), make(subject_sigma=0.5)
    corruption = Corruption(multiple=2.0)
    given = measure(corruption, hinted, SUBJECTS, own="Paris")
    assert (given.measured_on, given.sigma) == ("subjects", subject_sigma(hinted, SUBJECTS))
    by_hint = measure(corruption, hinted, own="Paris")
    assert (by_hint.measured_on, by_hint.sigma, by_hint.level) == ("hint", 0.5, 1.0)
    own = measure(corruption, plain, own="Paris")
    assert (own.measured_on, own.sigma) == ("own subject", subject_sigma(plain, ["Paris"]))
    with pytest.raises(ConfigError, match="name at least one"):
        measure(corruption, plain)
    with pytest.raises(ConfigError, match="put it in a list"):
        measure(corruption, plain, "Rome")
    with pytest.raises(FactError, match="no tokens"):
        measure(corruption, plain, ["Rome", ""])
    with pytest.raises(ConfigError, match="greater than zero"):
        measure(corruption, make(subject_sigma=-1.0))


def test_sigma_is_over_all_numbers_of_all_tokens(model, monkeypatch):
    rows = [row for subject in SUBJECTS for row in model.tokenizer(subject)["input_ids"]]
    want = np.std(table_of(model)[rows], ddof=1)
    assert subject_sigma(model, SUBJECTS) == pytest.approx(want, rel=1e-12)
    monkeypatch.setitem(budgets.TOKENS["record"], "cpu", 3)
    assert subject_sigma(model, (subject for subject in SUBJECTS)) == pytest.approx(want, rel=1e-12)
    measured = measure(Corruption(), model, SUBJECTS)
    assert measured.measured_tokens == len(rows)


def test_many_subjects_are_measured_instead_of_the_vocabulary(model):
    corruption = Corruption("multivariate")
    few = ["Rome", "Rome"]
    assert measure(corruption, model, few).measured_on == "vocabulary"
    many = [*SUBJECTS, "Danielle Darrieux", "LeBron James", "Microsoft", "Florence", "Eiffel Tower", "Bill Gates"]
    ids = [i for subject in many for i in model.tokenizer(subject)["input_ids"]]
    assert len(set(ids)) > WIDTH
    measured = measure(corruption, model, many)
    assert (measured.measured_on, measured.measured_tokens) == ("subjects", len(ids))
    np.testing.assert_allclose(measured.mean.numpy(), table_of(model)[ids].mean(0), rtol=1e-12)


def test_the_module_is_run_where_it_scales_its_weight():
    scaled = load_pretrained((tiny("gemma3", layers=2, dtype=torch.float64), llama_tokenizer()), name="gemma3")
    table = table_of(scaled) * WIDTH**0.5
    measured = measure(Corruption("multivariate"), scaled)
    np.testing.assert_allclose(measured.mean.numpy(), table.mean(0), rtol=1e-9)
    rows = scaled.tokenizer("Rome")["input_ids"][1:]  # without the start token, which is never corrupted
    assert subject_sigma(scaled, ["Rome"]) == pytest.approx(np.std(table[rows], ddof=1), rel=1e-9)


def test_rows_that_are_no_tokens_are_not_measured():
    hf = tiny("gpt2", layers=2, dtype=torch.float64)
    padded = load_pretrained((hf, byte_tokenizer(300)), name="padded")
    tokens = len(padded.tokenizer)
    assert tokens < padded.vocab_size
    with torch.no_grad():
        hf.get_input_embeddings().weight[tokens:] = 1e6
    assert float(measure(Corruption("multivariate"), padded).mean.abs().max()) < 1


@pytest.mark.parametrize("name", ["s3", "u2", "0.1", "u=0.1", "m", "t5", "s3!+1"])
def test_settings_say_what_was_measured(model, name):
    corruption = Corruption.parse(name)
    measured = measure(corruption, model, SUBJECTS)
    settings = json.loads(json.dumps(measured.settings))
    assert Corruption(**settings["corruption"]) == corruption
    assert settings["noise"] == measured.level
    assert (settings["sigma"] is None) == (corruption.multiple is None)
    assert measured.draw(2, 3, 1).shape == (2, 3, WIDTH)
    assert measured.draw(2, 3, 1).dtype == torch.float64
    assert torch.equal(measured.draw(2, 3, 1), measured.draw(2, 3, 1))
    assert not torch.equal(measured.draw(2, 3, 1), measured.draw(2, 3, 2))


def test_three_sigma_is_the_published_one():
    info = goldens.info("trace_info")
    measured = measure(Corruption.parse("s3"), goldens.tiny_np(), info["embedding_std_subjects"])
    assert measured.sigma == pytest.approx(info["embedding_std_3subjects"], rel=1e-6)
    assert measured.level == 3 * measured.sigma


# ---- the value and its short forms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("s3", Corruption()),
        ("s", Corruption(multiple=1)),
        (" s2.5 ", Corruption(multiple=2.5)),
        ("u3", Corruption("uniform")),
        ("u=0.1", Corruption("uniform", level=0.1)),
        ("m", Corruption("multivariate")),
        ("t", Corruption("student")),
        ("t5", Corruption("student", degrees=5)),
        ("0.1", Corruption(level=0.1)),
        (".025", Corruption(level=0.025)),
        ("1e-5", Corruption(level=1e-5)),
        ("s3!", Corruption(replace=True)),
        ("m:replace", Corruption("multivariate", replace=True)),
        ("0.1+1", Corruption(level=0.1, after=1)),
        ("t5!+2", Corruption("student", degrees=5, replace=True, after=2)),
    ],
)
def test_short_forms(text, want):
    found = Corruption.parse(text)
    assert found == want
    assert Corruption.parse(found.name) == found
    assert str(found) == found.name
    assert Corruption(**found.as_dict()) == found
    assert hash(found) == hash(want)


def test_names_are_short():
    assert [str(Corruption.parse(text)) for text in ("s3.0", "u=.10", "t:replace", "00.1+01", "1e-07")] == [
        "s3",
        "u=0.1",
        "t3!",
        "0.1+1",
        "1e-07",
    ]


@pytest.mark.parametrize(
    "text", ["", "x", "u", "m3", "s=3", "=0.1", "t=5", "s-3", "0.1?", "3s", "nan", "inf", "s3+", "+1", "!", "s٣", "u="]
)
def test_other_forms_are_refused_with_those_there_are(text):
    with pytest.raises(ConfigError, match=r"s3 \(gaussian, 3σ\)"):
        Corruption.parse(text)


@pytest.mark.parametrize("text", ["0", "s0", "u=0.0", "t2", "t0", "1e9"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(ConfigError, match=r"greater than zero|only above 2"):
        Corruption.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "laplace"}, "kind of noise is one of gaussian, uniform"),
        ({"kind": ["gaussian"]}, "kind of noise"),
        ({"multiple": None}, "greater than zero"),
        ({"multiple": float("nan")}, "greater than zero"),
        ({"multiple": "3"}, "greater than zero"),
        ({"level": 0.0}, "greater than zero"),
        ({"level": True}, "greater than zero"),
        ({"kind": "multivariate", "level": 0.1}, "no level"),
        ({"kind": "student", "multiple": 2.0}, "no multiple"),
        ({"kind": "student", "degrees": 2}, "only above 2"),
        ({"kind": "student", "degrees": float("inf")}, "only above 2"),
        ({"degrees": 5}, "belong to student"),
        ({"replace": 1}, "True or False"),
        ({"after": -1}, "counts tokens"),
        ({"after": 1.0}, "counts tokens"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Corruption(**fields)


def test_a_level_goes_before_a_multiple():
    assert Corruption(level=0.1) == Corruption(multiple=None, level=0.1) == Corruption(multiple=5.0, level=0.1)
    assert Corruption("student").multiple is None
