"""Second moments of keys: the published numbers, every token once, files that know what they are of."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import goldens
from errata.base.errors import ConfigError, ResultFileError, StaleStatistics
from errata.edits import Edit, RankOne
from errata.models.loading import load_pretrained
from errata.models.weights import down_weight_name
from errata.statistics import Corpus, SecondMoment, collect, collect_cached, load, save
from errata.statistics.collect import fingerprints
from errata.statistics.store import cache_folder
from tiny import TEXT, byte_tokenizer, llama_tokenizer, tiny

TEXTS = [line[:80] for line in TEXT.splitlines() if line]


def model_of(family="gpt2", dtype=torch.float32, seed=0, tokenizer=byte_tokenizer, **changes):
    return load_pretrained((tiny(family, dtype=dtype, seed=seed, **changes), tokenizer()), name=family)


def plain_keys(model, text, layers):
    """Keys `[t, d]` of every token of one text, read with torch's own hooks."""
    found = {}
    with torch.no_grad():
        handles = [
            model.module(("key", layer)).register_forward_pre_hook(
                lambda module, args, layer=layer: found.__setitem__(layer, args[0].reshape(-1, args[0].shape[-1]))
            )
            for layer in layers
        ]
        model.hf(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return found


# ---- collecting ----


def test_the_published_numbers():
    model, info, golden = goldens.tiny_np(), goldens.info("stats_info"), goldens.arrays("stats_n6_t64")
    case = info["n6_t64"]
    texts = [info["texts"][i] for i in case["sample_order"]]
    ours = collect(model, [3], texts, max_length=case["batch_tokens"])[3]
    assert ours.count == case["count"] == int(golden["count"])
    assert goldens.difference(ours.matrix, golden["moment"])[1] < 2e-6
    assert goldens.difference(ours.matrix * ours.count, golden["sum"])[1] < 2e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_every_token_counts_once_and_padding_never(family):
    model = model_of(family, torch.float64, tokenizer=llama_tokenizer if family == "llama" else byte_tokenizer)
    moments = collect(model, [2, 0], TEXTS, batch_size=3)
    assert list(moments) == [0, 2]
    keys = [plain_keys(model, text, [0, 2]) for text in TEXTS]
    for layer, moment in moments.items():
        every = torch.cat([found[layer] for found in keys])
        assert moment.count == len(every)
        assert moment.layer == layer
        torch.testing.assert_close(moment.matrix, every.T @ every / len(every), rtol=1e-12, atol=1e-14)


def test_batches_change_nothing_but_rounding_and_layers_share_one_pass():
    model = model_of()
    together = collect(model, range(3), TEXTS, batch_size=8)
    passes = 0

    def count(module, args, output):
        nonlocal passes
        passes += 1

    handle = model.module(("embedding", 0)).register_forward_hook(count)
    top = model.module(("state", 2)).register_forward_hook(lambda *_: pytest.fail("the pass went on too far"))
    one_by_one = collect(model, [0, 1], TEXTS, batch_size=1)
    handle.remove()
    top.remove()
    assert passes == len(TEXTS)
    for layer, moment in one_by_one.items():
        torch.testing.assert_close(moment.matrix, together[layer].matrix, rtol=1e-5, atol=1e-7)


def test_tokens_are_counted_to_the_last_and_texts_are_cut():
    model, told = model_of(), []
    assert collect(model, [0], TEXTS, max_tokens=37, batch_size=1, progress=lambda *at: told.append(at))[0].count == 37
    assert told[-1] == (37, 37)
    assert collect(model, [0], TEXTS, max_length=5)[0].count == 5 * len(TEXTS)
    endless = (text for _ in iter(int, 1) for text in TEXTS)
    assert collect(model, [0], endless, max_tokens=50)[0].count == 50


def test_half_precision_keys_are_summed_in_double():
    model = model_of(dtype=torch.bfloat16)
    moment = collect(model, [1], TEXTS)[1]
    every = torch.cat([plain_keys(model, text, [1])[1] for text in TEXTS]).double()
    assert moment.matrix.dtype == torch.float64
    # products of bfloat16 numbers are exact in float32; what is left is noise between batch shapes
    torch.testing.assert_close(moment.matrix, every.T @ every / len(every), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": []}, "no layer"),
        ({"layers": [3]}, "layers 0 to 2"),
        ({"layers": [-1]}, "layers 0 to 2"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 97}, "reads 1 to 96"),
        ({"batch_size": 0}, "batch_size"),
        ({"texts": []}, "no tokens"),
        ({"texts": "abc"}, "one string"),
        ({"texts": [""]}, "no tokens"),
    ],
)
def test_what_cannot_be_collected(settings, says):
    with pytest.raises(ConfigError, match=says):
        collect(model_of(), **{"layers": [0], "texts": TEXTS, **settings})


# ---- solving ----


def random_moment(d=12, n=200, seed=0):
    keys = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SecondMoment(keys.T @ keys / n, n, 1)


def test_solve_is_the_inverse_times_the_key():
    moment = random_moment()
    keys = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    wanted = np.linalg.solve(moment.matrix.numpy(), keys.double().numpy().T).T
    np.testing.assert_allclose(moment.solve(keys).numpy(), wanted, rtol=1e-11)
    np.testing.assert_allclose(moment.solve(keys[0]).numpy(), wanted[0], rtol=1e-11)
    assert moment.ridge == 0.0
    assert moment.condition_number == pytest.approx(np.linalg.cond(moment.matrix.numpy()), rel=1e-9)


def test_the_identity_leaves_keys_as_they_are():
    key = torch.randn(6, dtype=torch.float64)
    assert torch.equal(SecondMoment.identity(6).solve(key), key)
    assert SecondMoment.identity(6).condition_number == 1.0


@pytest.mark.parametrize("n", [5, 11])
def test_a_singular_one_gets_a_ridge_and_says_so(n):
    moment = random_moment(n=n)
    key = torch.ones(12)
    solved = moment.solve(key)
    assert 0 < moment.ridge <= 1e-6 * float(moment.matrix.diagonal().mean())
    shifted = moment.matrix + moment.ridge * torch.eye(12)
    np.testing.assert_allclose((shifted @ solved).numpy(), key.numpy(), rtol=1e-4)
    assert np.isfinite(moment.condition_number)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(2, 3),
        torch.ones(0, 0),
        torch.tensor([[1.0, float("nan")], [0.0, 1.0]]),
        torch.tensor([[1.0, 2.0], [0, 1]]),
    ],
)
def test_what_is_no_second_moment(matrix):
    with pytest.raises(ConfigError):
        SecondMoment(matrix, 1, 0)


def test_what_cannot_be_solved():
    with pytest.raises(ConfigError, match="do not fit"):
        random_moment().solve(torch.ones(5))
    with pytest.raises(ConfigError, match="over more text"):
        SecondMoment(torch.zeros(3, 3), 0, 0).solve(torch.ones(3))
    with pytest.raises(ConfigError, match="over more text"):
        SecondMoment(-torch.eye(3), 0, 0).solve(torch.ones(3))


# ---- what the numbers depend on, and files ----


def prints(model, layer=1, corpus="c", digest="d", max_tokens=10, max_length=10):
    return fingerprints(model, [layer], corpus, digest, max_tokens, max_length)[layer]


def touched(model, name):
    with torch.no_grad():
        model.weight(name).view(-1)[0] += 1
    return prints(model)


@pytest.mark.parametrize("tied", [False, True])
def test_the_fingerprint_is_of_what_lies_below_the_key_and_of_nothing_else(tied):
    model = model_of(tie_word_embeddings=tied)
    first = prints(model)
    assert prints(model_of(tie_word_embeddings=tied)) == first
    above = [
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
        "transformer.ln_f.weight",
    ]
    above += ["transformer.h.2.mlp.c_fc.weight"] + ([] if tied else ["lm_head.weight"])
    for name in above:
        assert touched(model, name) == first, name
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_proj.bias"):
        before = prints(model)
        assert touched(model, name) != before, name
    assert prints(model_of(dtype=torch.float64))["dtype"] == "float64"
    assert prints(model_of(tokenizer=llama_tokenizer))["tokenizer"] != first["tokenizer"]


def test_padding_and_truncating_calls_do_not_change_the_tokenizers_digest():
    model = model_of()
    first = prints(model)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert prints(model)["tokenizer"] == first["tokenizer"]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    moment = collect(model_of(), [1], TEXTS)[1]
    save(moment, tmp_path / "c.safetensors")
    for fingerprint in (None, moment.fingerprint):
        loaded = load(tmp_path / "c.safetensors", fingerprint)
        assert torch.equal(loaded.matrix, moment.matrix)
        assert (loaded.count, loaded.layer, loaded.fingerprint) == (moment.count, 1, moment.fingerprint)
    with pytest.raises(StaleStatistics, match=r"another dtype, texts,"):
        load(tmp_path / "c.safetensors", {**moment.fingerprint, "dtype": "float16", "texts": "0"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: save_file({"matrix": torch.eye(3)}, path),
        lambda path: save_file({}, path, metadata={"errata": json.dumps({"kind": "second moment", "version": 1})}),
        lambda path: save_file({}, path, metadata={"errata": json.dumps({"kind": "second moment", "version": 9})}),
        lambda path: save_file({}, path, metadata={"errata": json.dumps({"kind": "edit", "version": 1})}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save(random_moment(), path)
    damage(path)
    with pytest.raises(ResultFileError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_the_cache_is_used_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path))
    model, corpus, told = model_of(), Corpus.of(TEXTS, "lines"), []

    def collected(model=model, layers=(0, 1), corpus=corpus, **settings):
        told.clear()
        moments = collect_cached(model, layers, corpus, progress=lambda *at: told.append(at), **settings)
        return moments, bool(told)

    first, anew = collected()
    assert anew
    assert len(list(cache_folder().iterdir())) == 2
    again, anew = collected()
    assert not anew
    assert all(torch.equal(again[layer].matrix, first[layer].matrix) for layer in (0, 1))
    plain = collect(model, [1], corpus)[1]
    assert torch.equal(plain.matrix, first[1].matrix) or torch.allclose(plain.matrix, first[1].matrix)
    assert plain.fingerprint == first[1].fingerprint
    assert collected(layers=[1, 2])[1]  # layer 2 is new
    assert collected(max_tokens=20)[1]
    assert collected(max_length=20)[1]
    assert collected(corpus=Corpus.of(TEXTS[1:], "lines"))[1]
    assert not collected()[1]

    name = down_weight_name(model, 0)
    d_out, d_in = model.d_model, model.d_mlp
    with Edit.of(model, [RankOne(name, torch.ones(d_out), torch.ones(d_in))], "test").applied(model):
        assert not collected(layers=[0])[1]  # an edit of layer 0 changes keys above it, not its own
        assert collected(layers=[1])[1]

    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert collected()[1]
    assert not collected()[1]
    with pytest.raises(ConfigError, match="Corpus"):
        collect_cached(model, [0], TEXTS)


# ---- texts ----


def test_a_corpus_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("One line\nand its next.\n\n\n  \nAnother é.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Third."}\n\n{"text": "Fourth.", "id": 1}\n', encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Fifth."}'))
    corpus = Corpus.from_files(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz")
    wanted = ["One line\nand its next.", "Another é.", "Third.", "Fourth.", "Fifth."]
    assert list(corpus) == wanted
    assert list(corpus) == wanted  # again
    assert corpus.name == "a.txt, b.jsonl, c.jsonl.gz"
    same = Corpus.from_files(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz", name="mine")
    assert same.digest == corpus.digest
    (tmp_path / "a.txt").write_text("Else.")
    assert Corpus.from_files(tmp_path / "a.txt").digest != corpus.digest
    assert Corpus.of(["ab"]).digest != Corpus.of(["a", "b"]).digest


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"x", "of no type"),
        ("a.txt", None, "no file"),
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1}', "line 2"),
        ("a.jsonl", b'{"text": 1}', "is not text"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.txt.gz", b"plain", "compression"),
    ],
)
def test_files_that_are_no_corpus(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        list(Corpus.from_files(path))


def test_a_corpus_needs_a_file():
    with pytest.raises(ConfigError, match="at least one file"):
        Corpus.from_files()
    with pytest.raises(ConfigError, match="one string"):
        Corpus.of("abc")
