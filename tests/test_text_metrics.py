"""Numbers about texts against the published code's, against formulas written out, and against plain forward passes."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from nltk.tokenize import NLTKWordTokenizer, word_tokenize
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

import goldens
from errata.base import budgets
from errata.base.errors import ConfigError, FactError, MissingExtra, ResultFileError
from errata.metrics import text as text_module
from errata.metrics.text import as_scored, essence_perplexity, generation_entropy, ngram_entropy, perplexity, words
from errata.metrics.tfidf import TfIdf
from errata.models.model import Model
from helpers.models import TOKENIZERS, shared_model
from tiny import POSITIONS, TEXT, llama_tokenizer

LONG = " ".join(TEXT.split()) * 2


# ---- words and their entropies ----------------------------------------------------------------------------


def test_words_and_entropies_are_the_published_code_s():
    golden = goldens.info("counterfact")["ngram_entropy"]
    assert [words(text) for text in golden["strings"]] == golden["tokens"]
    for text, wanted in zip(golden["strings"], golden["each"], strict=True):
        assert generation_entropy([text]) == pytest.approx(wanted, abs=1e-12)
    assert generation_entropy(golden["strings"]) == pytest.approx(golden["mean"], abs=1e-12)
    several = golden["multi_sentence"]
    assert words(several["text"], preserve_line=True) == several["tokens"]
    entropy = generation_entropy([several["text"]], preserve_line=True)
    assert entropy == pytest.approx(several["value_preserve_line"], abs=1e-12)


def test_each_sentence_ends_in_a_full_stop_of_its_own():
    text = "It is tall. It is in Paris."
    assert words(text) == ["It", "is", "tall", ".", "It", "is", "in", "Paris", "."]
    assert words(text, preserve_line=True) == ["It", "is", "tall.", "It", "is", "in", "Paris", "."]
    assert ngram_entropy("So it is. So it is.", 1) == pytest.approx(2, abs=1e-12)  # four words, each twice
    assert ngram_entropy("So it is. So it is.", 1, preserve_line=True) > 2.1


@functools.cache
def trained():
    """Splitters that know abbreviations as Punkt's trained English model does, without that model's file."""
    knows = PunktParameters()
    knows.abbrev_types |= {"dr", "mr", "u.s", "p.m", "st", "etc"}
    return PunktSentenceTokenizer(knows), NLTKWordTokenizer()


@pytest.mark.parametrize(
    ("text", "whole", "apart"),
    [
        ("Dr. Smith met Mr. Jones in Rome.", ["Dr.", "Mr."], ["Dr", ".", "Mr", "."]),
        ("She lives in St. Louis. He does not.", ["St."], ["St", "."]),
        ("At 5 p.m. they left the U.S. for good.", ["p.m.", "U.S."], ["p.m", ".", "U.S", "."]),
    ],
)
def test_without_training_an_abbreviation_loses_its_full_stop(text, whole, apart, monkeypatch):
    untrained, entropy = words(text), generation_entropy([text])
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "_splitters", trained)
        aware, aware_entropy = words(text), generation_entropy([text])
    assert Counter(aware) - Counter(untrained) == Counter(whole)
    assert Counter(untrained) - Counter(aware) == Counter(apart)
    assert abs(entropy - aware_entropy) < 0.4  # bits, for a text as short as one sentence


def test_without_abbreviations_training_changes_nothing(monkeypatch):
    text = 'The needle is tall! "It is in Paris." Is it? It cost $3.50, they say... He left; she stayed.'
    untrained = words(text)
    monkeypatch.setattr(text_module, "_splitters", trained)
    assert words(text) == untrained
    assert len(untrained) > 25


def test_words_are_word_tokenize_s_where_its_model_is_installed():
    text = "The needle is tall. It isn't in Paris! Is it? They can't say."
    try:
        wanted = word_tokenize(text)
    except LookupError:
        pytest.skip("NLTK's trained model of English is not installed")
    assert words(text) == wanted


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_entropy_is_its_formula(n):
    tokens = words(LONG)
    grams = [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    p = np.array(list(Counter(grams).values())) / len(grams)
    assert ngram_entropy(LONG, n) == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-12)


def test_all_runs_different_is_the_largest_entropy():
    text = " ".join(f"w{i}" for i in range(33))
    assert ngram_entropy(text, 2) == pytest.approx(5, abs=1e-12)
    assert generation_entropy([text]) == pytest.approx(5 / 3 + 2 * math.log2(31) / 3, abs=1e-12)


def test_texts_of_too_few_words_count_with_zero():
    assert [ngram_entropy(text, 2) for text in ("", " \n", "one", "one two")] == [0, 0, 0, 0]
    assert generation_entropy(["", "one two three"]) == pytest.approx(1 / 6, abs=1e-15)
    assert math.isnan(generation_entropy([]))


def test_what_is_no_list_or_no_length_is_refused():
    with pytest.raises(FactError, match="brackets"):
        generation_entropy("one text")
    with pytest.raises(ConfigError, match="n is 0"):
        ngram_entropy("one two", 0)


def test_without_nltk_the_extra_is_named(monkeypatch):
    text_module._splitters.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(MissingExtra, match=r"errata-lm\[evaluation\]"):
        words("a b")


# ---- TF-IDF -----------------------------------------------------------------------------------------------


def test_tfidf_is_the_published_code_s(tmp_path):
    golden = goldens.info("counterfact")["tfidf"]
    np.save(tmp_path / "idf.npy", np.array(golden["idf"]))
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(golden["vocab"], indent=1))
    fitted, loaded = TfIdf.fit(golden["docs"]), TfIdf.load(tmp_path)
    assert fitted.vocabulary == golden["vocab"]
    np.testing.assert_allclose(fitted.idf, golden["idf"], rtol=0, atol=1e-14)
    for tfidf in (fitted, loaded):
        for one, other, wanted in golden["pairs"]:
            assert tfidf.similarity(one, other) == pytest.approx(wanted, abs=1e-9)
    one, _, _ = golden["pairs"][1]
    assert loaded.reference_score(one.split(" ", 3), golden["docs"]) == pytest.approx(golden["pairs"][1][2], abs=1e-9)


DOCS = ["the cat sat on the mat", "the dog sat", "a bird sang of the mat"]


def test_similarity_is_the_cosine_written_out():
    tfidf = TfIdf.fit(DOCS)

    def vector(text):
        known = [word for word in text.lower().split() if word in tfidf.vocabulary]
        holding = [sum(word in doc.split() for doc in DOCS) for word in tfidf.vocabulary]
        return np.array(
            [
                known.count(word) * (math.log((1 + len(DOCS)) / (1 + df)) + 1)
                for word, df in zip(tfidf.vocabulary, holding, strict=True)
            ]
        )

    one, other = "The cat and the other CAT sat", "the mat the dog sat on"
    a, b = vector(one), vector(other)
    wanted = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert tfidf.similarity(one, other) == pytest.approx(wanted, abs=1e-12)
    assert tfidf.similarity(other, one) == tfidf.similarity(one, other)
    assert tfidf.similarity("the cat sang", "sang the cat") == pytest.approx(1, abs=1e-12)


def test_texts_with_nothing_in_them_have_nothing_in_common():
    tfidf = TfIdf.fit(DOCS)
    assert tfidf.similarity("", "the cat") == 0
    assert tfidf.similarity("zzz qqq", "zzz qqq") == 0
    assert tfidf.similarity("dog", "cat") == 0
    assert math.isnan(tfidf.reference_score([], DOCS))
    assert math.isnan(tfidf.reference_score(DOCS, []))
    with pytest.raises(FactError, match="brackets"):
        tfidf.reference_score("the cat", DOCS)


def test_the_digest_tells_words_and_weights_apart():
    tfidf = TfIdf.fit(DOCS)
    words_ = list(tfidf.vocabulary)
    swapped = {word: place for place, word in enumerate([words_[1], words_[0], *words_[2:]])}
    heavier = tfidf.idf.copy()
    heavier[0] = np.nextafter(heavier[0], 9)
    digests = {TfIdf(*pair).digest for pair in ((swapped, tfidf.idf), (tfidf.vocabulary, heavier))}
    assert len(digests | {tfidf.digest}) == 3
    shuffled = dict(reversed(tfidf.vocabulary.items()))
    assert TfIdf(shuffled, tfidf.idf).digest == TfIdf.fit(DOCS).digest == tfidf.digest


@pytest.mark.parametrize(
    ("idf", "vocabulary", "reason"),
    [
        (np.ones(3), {"a": 0, "b": 1}, "shape"),
        (np.ones((2, 1)), {"a": 0, "b": 1}, "shape"),
        (np.array([1.0, np.nan]), {"a": 0, "b": 1}, "finite"),
        (np.array([1.0, np.inf]), {"a": 0, "b": 1}, "finite"),
        (np.array([1.0, 0.0]), {"a": 0, "b": 1}, "positive"),
        (np.array([1, 2]), {"a": 0, "b": 1}, "numbers"),
        (np.ones(2), {"a": 0, "b": 2}, "gap"),
        (np.ones(2), {"a": 0, "b": "1"}, "valid integer"),
        (np.ones(2), {"a": 0, "b": 0}, "gap"),
        (np.ones(0), {}, "gap"),
        (np.ones(2), ["a", "b"], "dictionary"),
        (np.array([{}, {}]), {"a": 0, "b": 1}, "not numbers"),
    ],
)
def test_a_broken_pair_of_files_is_refused(tmp_path, idf, vocabulary, reason):
    np.save(tmp_path / "idf.npy", idf)
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ResultFileError, match=reason):
        TfIdf.load(tmp_path)


@pytest.mark.parametrize("name", ["idf.npy", "tfidf_vocab.json"])
def test_a_missing_or_cut_file_is_refused(tmp_path, name):
    np.save(tmp_path / "idf.npy", np.ones(2, np.float32))
    (tmp_path / "tfidf_vocab.json").write_text('{"a": 0, "b": 1}')
    assert TfIdf.load(tmp_path).idf.dtype == np.float64
    whole = (tmp_path / name).read_bytes()
    for cut in (whole[:-3], b"", b"PK\x03\x04"):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(ResultFileError, match="again"):
            TfIdf.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ResultFileError, match=name):
        TfIdf.load(tmp_path)


def test_texts_without_words_give_no_tfidf():
    with pytest.raises(ConfigError, match="2 texts"):
        TfIdf.fit(["", "a !"])
    with pytest.raises(FactError, match="brackets"):
        TfIdf.fit("the cat")


# ---- perplexity -------------------------------------------------------------------------------------------


def by_hand(model: Model, text: str, window: int, stride: int) -> tuple[float, int]:
    """Each token by a pass of its own over the beginning of the first window that holds it."""
    ids = model.tokenizer(text)["input_ids"]
    before = [i for i in ids[:1] if i == model.tokenizer.bos_token_id and model.tokenizer.unk_token]
    own, room = ids[len(before) :], window - len(before)
    total, count = 0.0, 0
    for place in range(0 if before else 1, len(own)):
        windows = (min(room + k * stride, len(own)) for k in range(len(own)))
        end = next(end for end in windows if end > place)
        seen = before + own[max(0, end - room) : place]
        with torch.no_grad():
            logits = model.hf(torch.tensor([seen])).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[own[place]])
        count += 1
    return total, count


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("window", "stride"), [(40, 13), (16, 14), (7, 1), (90, 45)])
def test_perplexity_is_that_of_a_plain_loop(tokenizer, window, stride):
    model = shared_model("llama" if tokenizer == "llama" else "gpt2", torch.float64, TOKENIZERS[tokenizer])
    text = LONG[:230]
    got = perplexity(model, text, window=window, stride=stride)
    total, count = by_hand(model, text, window, stride)
    assert got.n_tokens == count
    assert got.total == pytest.approx(total, rel=1e-12)
    assert got.mean == got.total / count
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-12)


def test_by_default_windows_are_the_model_s_and_half_of_them_is_new():
    model = shared_model(dtype=torch.float64)
    assert perplexity(model, LONG) == perplexity(model, LONG, window=POSITIONS, stride=POSITIONS // 2)
    assert perplexity(model, LONG).total != perplexity(model, LONG, window=POSITIONS, stride=POSITIONS - 1).total


def test_a_text_that_fits_is_one_pass():
    model = shared_model("gemma3", torch.float64, llama_tokenizer)
    text = LONG[:60]
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model.hf(ids, labels=ids).loss
    got = perplexity(model, text)
    assert got.n_tokens == ids.shape[1] - 1
    assert got.mean == pytest.approx(float(loss), rel=1e-6)


def test_texts_are_read_each_by_itself_and_summed():
    model, texts = shared_model(dtype=torch.float64), ["Rome is the capital of Italy.", LONG, "x", "", "Paris"]
    each = [perplexity(model, text) for text in texts if len(model.tokenizer(text)["input_ids"]) > 1]
    together = perplexity(model, texts)
    assert together.total == pytest.approx(sum(one.total for one in each), rel=1e-12)
    assert together.n_tokens == sum(one.n_tokens for one in each)


def test_what_is_read_together_changes_nothing(monkeypatch):
    model = shared_model(dtype=torch.float32)
    texts = [LONG, LONG[:50], "Rome is"]
    wanted, shapes, forward = perplexity(model, texts, window=30, stride=10), [], model.forward
    monkeypatch.setattr(model, "forward", lambda b, **k: shapes.append(tuple(b.input_ids.shape)) or forward(b, **k))
    monkeypatch.setattr(budgets, "LOGITS", 70 * model.vocab_size)
    got = perplexity(model, texts, window=30, stride=10)
    assert all(rows * width <= 70 for rows, width in shapes)
    assert len(shapes) > 5
    assert got.n_tokens == wanted.n_tokens
    assert got.total == pytest.approx(wanted.total, rel=1e-6)


def test_logits_of_few_bits_are_scored_in_float32():
    model, text = shared_model(dtype=torch.bfloat16), LONG[:60]
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logs = model.hf(ids).logits[0, :-1].double().log_softmax(-1)
    wanted = -float(logs.gather(1, ids[0, 1:, None]).sum())
    assert perplexity(model, text).total == pytest.approx(wanted, rel=1e-6)


def test_windows_that_cannot_be_are_refused():
    model = shared_model("llama", torch.float64, llama_tokenizer)
    for window, stride, reason in ((POSITIONS + 1, None, "more than"), (8, 7, "go on by 7"), (8, 0, "go on by 0")):
        with pytest.raises(ConfigError, match=reason):
            perplexity(model, LONG, window=window, stride=stride)
    assert perplexity(model, LONG[:40], window=8, stride=6).n_tokens > 10  # one place is the BOS's
    with pytest.raises(ConfigError, match="go on by 1"):
        perplexity(model, LONG, window=2)
    with pytest.raises(FactError, match="nothing to foretell"):
        perplexity(shared_model(dtype=torch.float64), ["", "x"])
    with pytest.raises(FactError, match="nothing to foretell"):
        perplexity(shared_model(dtype=torch.float64), [])


def test_an_end_of_text_that_the_text_holds_is_scored():
    model = shared_model(dtype=torch.float64)
    text = "<|endoftext|>Rome is in Italy."
    assert perplexity(model, text).n_tokens == len(model.tokenizer(text)["input_ids"]) - 1


# ---- essence ----------------------------------------------------------------------------------------------


def test_essence_is_the_published_code_s_and_right_by_default():
    golden = goldens.info("counterfact")["essence"]
    model, n = goldens.tiny_np(), golden["n_tokens"]
    published = essence_perplexity(model, [golden["text"]], golden["max_input_length"], reference=True)
    assert published == pytest.approx(golden["perplexity"], rel=2e-6)
    assert essence_perplexity(model, [golden["text"]]) == pytest.approx(published ** (n / (n - 1)), rel=1e-9)


def test_essence_is_the_loss_of_the_beginning():
    model = shared_model(dtype=torch.float64)
    texts = ["The Space Needle is located in the city of Seattle.", LONG]
    for length in (20, 90, POSITIONS + 50):
        ids = torch.tensor([model.tokenizer(" ".join(texts))["input_ids"][: min(length, POSITIONS)]])
        with torch.no_grad():
            loss = model.hf(ids, labels=ids).loss
        assert essence_perplexity(model, texts, length) == pytest.approx(float(loss.exp()), rel=1e-6)


def test_essence_of_too_little_is_none():
    model = shared_model(dtype=torch.float64)
    for reference in (False, True):
        for texts in ([], [""], ["x"]):
            assert math.isnan(essence_perplexity(model, texts, reference=reference))
        assert math.isnan(essence_perplexity(model, [LONG], 1, reference=reference))
    assert math.isnan(essence_perplexity(shared_model("llama", torch.float64, llama_tokenizer), []))  # a BOS alone
    with pytest.raises(FactError, match="brackets"):
        essence_perplexity(model, "text")
    with pytest.raises(ConfigError, match="1 or more"):
        essence_perplexity(model, [LONG], 0)


def test_a_perplexity_beyond_numbers_is_infinite():
    assert text_module.Surprise(1e6, 10).perplexity == math.inf
    assert math.isnan(text_module.Surprise(0.0, 0).perplexity)


def test_generated_texts_are_scored_in_nfkd_form_and_references_as_they_are():
    texts, references = ["Zu\u0308rich Z\u00fcrich \ufb01ne"], ["Z\u00fcrich is fine"]
    assert as_scored(texts) == ["Zu\u0308rich Zu\u0308rich fine"]
    tfidf = TfIdf.fit(["Z\u00fcrich is fine", "Zu\u0308rich is", "fine is"])
    # "Zürich" in two code points for ü is the words "zu" and "rich": of three words "fine" alone is shared.
    weight = {word: float(tfidf.idf[place]) for word, place in tfidf.vocabulary.items()}
    generated = {"zu": 2 * weight["zu"], "rich": 2 * weight["rich"], "fine": weight["fine"]}
    reference = {word: weight[word] for word in ("z\u00fcrich", "is", "fine")}
    norms = math.hypot(*generated.values()) * math.hypot(*reference.values())
    found = tfidf.reference_score(as_scored(texts), references)
    assert found == pytest.approx(weight["fine"] ** 2 / norms)
    assert found < tfidf.reference_score(["Z\u00fcrich Z\u00fcrich fine"], references)
