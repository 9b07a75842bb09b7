"""Second moments of keys: the published numbers, every token once, files that know what they are of."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import goldens
from errata.base.errors import ConfigError, OutputError, ResultFileError, StaleStatistics
from errata.edits import Edit, RankOne
from errata.models.loading import load_pretrained
from errata.models.weights import down_weight_name
from errata.statistics import Corpus, Halves, SecondMoment, collect, collect_cached, load, load_any, save
from errata.statistics.fingerprint import fingerprints
from errata.statistics.store import cache_folder, stored
from helpers.models import fresh_model
from helpers.moments import TEXTS
from tiny import byte_tokenizer, llama_tokenizer

collecting = importlib.import_module("errata.statistics.collect")  # the package's own name is the function
summing = importlib.import_module("errata.statistics.sums")


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
    model = fresh_model(family, torch.float64, tokenizer=llama_tokenizer if family == "llama" else byte_tokenizer)
    moments = collect(model, [2, 0], TEXTS)
    assert list(moments) == [0, 2]
    keys = [plain_keys(model, text, [0, 2]) for text in TEXTS]
    for layer, moment in moments.items():
        every = torch.cat([found[layer] for found in keys])
        assert moment.count == len(every)
        assert moment.layer == layer
        torch.testing.assert_close(moment.matrix, every.T @ every / len(every), rtol=1e-12, atol=1e-14)


def test_batches_change_nothing_but_rounding_and_layers_share_one_pass(monkeypatch):
    model = fresh_model()
    together = collect(model, range(3), TEXTS)
    monkeypatch.setattr(collecting, "_BATCH", 1)
    passes = 0

    def count(module, args, output):
        nonlocal passes
        passes += 1

    handle = model.module(("embedding", 0)).register_forward_hook(count)
    top = model.module(("state", 2)).register_forward_hook(lambda *_: pytest.fail("the pass went on too far"))
    one_by_one = collect(model, [0, 1], TEXTS)
    handle.remove()
    top.remove()
    assert passes == len(TEXTS)
    for layer, moment in one_by_one.items():
        torch.testing.assert_close(moment.matrix, together[layer].matrix, rtol=1e-5, atol=1e-7)


def test_tokens_are_counted_to_the_last_and_texts_are_cut(monkeypatch):
    model, told = fresh_model(), []
    monkeypatch.setattr(collecting, "_BATCH", 1)
    assert collect(model, [0], TEXTS, max_tokens=97, progress=lambda *at: told.append(at))[0].count == 97
    assert told[-1] == (97, 97)
    assert len(told) > 1
    assert collect(model, [0], TEXTS, max_length=5)[0].count == 5 * len(TEXTS)
    endless = (text for _ in iter(int, 1) for text in TEXTS)
    assert collect(model, [0], endless, max_tokens=50)[0].count == 50


def test_a_text_without_end_is_cut_before_it_is_tokenized():
    model = fresh_model()
    long, short = (collect(model, [0], ["a b " * n], max_length=9)[0] for n in (10_000_000, 200))
    assert long.count == 9
    assert torch.equal(long.matrix, short.matrix)


@pytest.mark.parametrize(("size", "panel"), [(24, 5), (24, 24), (24, 512), (7, 3)])
def test_panels_make_up_the_whole(monkeypatch, size, panel):
    monkeypatch.setattr(summing, "PANEL", panel)
    keys = torch.randn(50, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = summing.Sums([4], size, torch.device("cpu"))
    for begin, stop in ((0, 20), (20, 50)):
        sums.add(4, keys[begin:stop])
        sums.close_batch(stop - begin, "")
    moment = sums.moment(4, {})
    assert torch.equal(moment.matrix, moment.matrix.T)
    torch.testing.assert_close(moment.matrix, keys.T @ keys / 50, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("which", ["not-first", "not-special"])
def test_which_tokens_count(which):
    model = fresh_model("llama", torch.float64, tokenizer=llama_tokenizer)  # it begins every text with <s>
    texts = [TEXTS[0], "", "Rome<s> is", "x"]
    moment = collect(model, [1], texts, which=which)[1]
    keys = []
    for text in texts:
        found, ids = plain_keys(model, text, [1])[1], model.tokenizer(text)["input_ids"]
        special = set(model.tokenizer.all_special_ids)
        keys += [k for i, k in enumerate(found) if (i > 0 if which == "not-first" else ids[i] not in special)]
    every = torch.stack(keys)
    assert moment.count == len(every) < sum(len(model.tokenizer(text)["input_ids"]) for text in texts)
    torch.testing.assert_close(moment.matrix, every.T @ every / len(every), rtol=1e-12, atol=1e-14)
    assert collect(model, [1], texts, 5, which=which)[1].count == 5


def test_half_precision_keys_are_summed_in_double():
    model = fresh_model(dtype=torch.bfloat16)
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
        ({"which": "some"}, "not-first"),
        ({"which": "not-first", "texts": ["a", "b"]}, "no tokens"),
        ({"texts": ["a", None]}, "NoneType"),
        ({"checkpoint": "here.safetensors"}, "needs a Corpus"),
        ({"texts": []}, "no tokens"),
        ({"texts": "abc"}, "one string"),
        ({"texts": [""]}, "no tokens"),
    ],
)
def test_what_cannot_be_collected(settings, says):
    with pytest.raises(ConfigError, match=says):
        collect(fresh_model(), **{"layers": [0], "texts": TEXTS, **settings})


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


def test_a_ridge_that_is_asked_for_is_added(tmp_path):
    moment, key = random_moment(), torch.ones(12)
    ridged = moment.with_ridge(0.1)
    assert ridged.ridge == pytest.approx(0.1 * float(moment.matrix.diagonal().mean()))
    shifted = moment.matrix + ridged.ridge * torch.eye(12)
    np.testing.assert_allclose((shifted @ ridged.solve(key)).numpy(), key.numpy(), rtol=1e-9)
    assert ridged.condition_number < moment.condition_number
    save(ridged, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").ridge == ridged.ridge
    assert random_moment(n=5).with_ridge(1e-20).ridge > 1e-12  # too little: it grows until it does


def test_the_effective_rank_counts_directions():
    assert SecondMoment.identity(7).effective_rank == pytest.approx(7)
    assert SecondMoment(torch.diag(torch.tensor([1.0, 1, 1e-12, 0])), 9, 0).effective_rank == pytest.approx(2)


def test_halves_of_more_tokens_differ_less():
    def halves(n):
        keys = torch.randn(2 * n + 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        one, other = (SecondMoment(k.T @ k / n, n, 1) for k in (keys[:n], keys[n : 2 * n]))
        return Halves.of(one, other, keys[-9:])

    few, many = halves(100), halves(1600)
    assert few.keys == 9
    assert few.cosine < many.cosine < 1
    assert 2 < few.difference / many.difference < 8  # a sixteenth of the variance
    same = SecondMoment.identity(3)
    assert Halves.of(same, same, torch.ones(2, 3)) == Halves(pytest.approx(1.0), 0.0, 2)
    assert Halves.of(same, SecondMoment(torch.zeros(3, 3), 1, 0), torch.ones(2, 3)) is None


def test_what_is_collected_says_how_its_halves_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "_BATCH", 64)
    model = fresh_model()
    moment = collect(model, [1], TEXTS * 3)[1]
    assert moment.halves.keys > 4
    assert -1 <= moment.halves.cosine <= 1
    save(moment, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").halves == moment.halves
    assert collect(model, [1], TEXTS, 40)[1].halves is None  # fewer tokens in a half than features


def test_shards_merge_to_the_whole():
    model, corpus = fresh_model(dtype=torch.float64), Corpus.of(TEXTS, "lines")
    whole = collect(model, [1], corpus)[1]
    parts = [collect(model, [1], corpus.shard(i, 3))[1] for i in (1, 2, 3)]
    merged = SecondMoment.merged([SecondMoment.merged(parts[:2]), parts[2]])
    assert (merged.count, merged.layer) == (whole.count, 1)
    torch.testing.assert_close(merged.matrix, whole.matrix, rtol=1e-12, atol=1e-14)
    assert [part["corpus"] for part in merged.fingerprint["merged"]] == [f"lines[{i}/3]" for i in (1, 2, 3)]
    assert merged.fingerprint["weights"] == whole.fingerprint["weights"]
    assert merged.fingerprint["texts"] != whole.fingerprint["texts"]
    with pytest.raises(ConfigError, match="twice"):
        SecondMoment.merged([merged, parts[1]])
    with pytest.raises(ConfigError, match="at least one"):
        SecondMoment.merged([])
    for other in (collect(model, [0], corpus)[0], collect(fresh_model(seed=1), [1], corpus)[1], random_moment()):
        with pytest.raises(StaleStatistics, match="differ in"):
            SecondMoment.merged([whole, other])


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
    with pytest.raises(ConfigError, match="ridge"):
        random_moment().with_ridge(-1.0)
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
    model = fresh_model(tie_word_embeddings=tied)
    first = prints(model)
    assert prints(fresh_model(tie_word_embeddings=tied)) == first
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
    assert prints(fresh_model(dtype=torch.float64))["dtype"] == "float64"
    assert prints(fresh_model(tokenizer=llama_tokenizer))["tokenizer"] != first["tokenizer"]


def test_the_fingerprint_is_of_the_config_that_no_weight_shows():
    assert prints(fresh_model(activation_function="relu"))["config"] != prints(fresh_model())["config"]
    ropes = [fresh_model("llama", rope_parameters={"rope_type": "default", "rope_theta": t}) for t in (1e4, 1e5)]
    assert prints(ropes[0])["weights"] == prints(ropes[1])["weights"]
    assert prints(ropes[0])["config"] != prints(ropes[1])["config"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
def test_the_fingerprint_is_the_same_for_the_model_from_disk(family, tmp_path):
    live = fresh_model(family)
    live.hf.save_pretrained(tmp_path)
    live.tokenizer.save_pretrained(tmp_path)
    stored_model = load_pretrained(tmp_path, name="renamed")
    assert {**prints(live), "model": "renamed"} == prints(stored_model)


def test_padding_and_truncating_calls_do_not_change_the_tokenizers_digest():
    model = fresh_model()
    first = prints(model)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert prints(model)["tokenizer"] == first["tokenizer"]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    moment = collect(fresh_model(), [1], TEXTS)[1]
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
    model, corpus, told = fresh_model(), Corpus.of(TEXTS, "lines"), []

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
    assert collected(which="not-first")[1]
    assert not collected(corpus=Corpus.of(TEXTS, "the same under another name"))[1]
    assert collected(corpus=Corpus.of(TEXTS[1:], "lines"))[1]
    assert not collected()[1]

    name = down_weight_name(model, 0)
    d_out, d_in = model.d_model, model.d_mlp
    with Edit.of(model, [RankOne(name, torch.ones(d_out), torch.ones(d_in))], "test").applied(model):
        assert not collected(layers=[0])[1]  # an edit of layer 0 changes keys above it, not its own
        assert collected(layers=[1])[1]

    assert {file.problem for file in stored()} == {""}
    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert all("broken" in file.problem for file in stored())
    assert collected()[1]
    assert not collected()[1]
    with pytest.raises(ConfigError, match="Corpus"):
        collect_cached(model, [0], TEXTS)


# ---- stopped and gone on with ----

STOPPED = """
import importlib, sys
sys.path.insert(0, {tests!r})
from helpers.models import fresh_model
from helpers.moments import TEXTS
from test_second_moment import Corpus, collect_cached, collecting
collecting._BATCH, collecting._WINDOW, collecting.CHECKPOINT_SECONDS = 96, 300, 0.0
print("begin", flush=True)
collect_cached(fresh_model(), [0, 2], Corpus.of(TEXTS * 40, "many"), folder={folder!r},
               progress=lambda *at: print(*at, flush=True))
"""


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(collecting, "_BATCH", 96)
    monkeypatch.setattr(collecting, "_WINDOW", 300)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, small_batches):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = STOPPED.format(tests=os.path.dirname(__file__), folder=str(killed))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(8)]
        process.send_signal(signal.SIGKILL)
    assert lines[0] == "begin\n"
    (unfinished,) = (file for file in stored(killed) if "unfinished" in file.problem)
    reached = int(lines[-2].split()[0])
    assert unfinished.count >= reached > 0  # the checkpoint after a batch is there before the next is told
    assert [of["layer"] for of in unfinished.fingerprints] == [0, 2]

    told, corpus = [], Corpus.of(TEXTS * 40, "many")
    resumed = collect_cached(fresh_model(), [0, 2], corpus, folder=killed, progress=lambda *at: told.append(at[0]))
    assert told[0] == unfinished.count
    uninterrupted = collect_cached(fresh_model(), [0, 2], corpus, folder=whole)
    assert resumed[0].count == uninterrupted[0].count > unfinished.count
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert len(files) == 2
    assert {path.name: path.read_bytes() for path in killed.glob("*.safetensors")} == files


def test_a_run_that_ends_between_its_last_files_is_not_begun_anew(tmp_path, small_batches, monkeypatch):
    store = importlib.import_module("errata.statistics.store")
    monkeypatch.setattr(collecting, "CHECKPOINT_SECONDS", 0.0)
    model, corpus, told = fresh_model(), Corpus.of(TEXTS * 3), []

    def full(moment, path):
        if moment.layer == 2:
            raise OutputError("no room")
        save(moment, path)

    monkeypatch.setattr(store, "save", full)
    with pytest.raises(OutputError):
        collect_cached(model, [0, 2], corpus, folder=tmp_path)
    monkeypatch.setattr(store, "save", save)
    (unfinished,) = (file.path for file in stored(tmp_path) if file.problem)
    left = tmp_path / f".{unfinished.name}.killed.unwritten"  # by a kill while the sums were written
    left.mkdir()
    (left / "lock").write_text(unfinished.name)
    found = collect_cached(model, [0, 2], corpus, folder=tmp_path, progress=lambda *at: told.append(at[0]))
    assert told == [found[2].count]  # nothing was left to run
    assert torch.equal(found[2].matrix, collect(model, [2], corpus)[2].matrix)
    assert not left.exists()
    assert not unfinished.exists()


def test_ctrl_c_keeps_what_there_is(tmp_path, small_batches):
    model, corpus, told = fresh_model(), Corpus.of(TEXTS * 5), []

    def press(done, of):
        told.append(done)
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        collect(model, [1], corpus, progress=press, checkpoint=tmp_path / "c.safetensors")
    again = []
    resumed = collect(
        model, [1], corpus, progress=lambda *at: again.append(at[0]), checkpoint=tmp_path / "c.safetensors"
    )
    assert again[0] == told[2]
    assert torch.equal(resumed[1].matrix, collect(model, [1], corpus)[1].matrix)


def test_a_checkpoint_of_something_else_is_not_gone_on_with(tmp_path, small_batches, monkeypatch):
    monkeypatch.setattr(collecting, "CHECKPOINT_SECONDS", 0.0)
    model, path, told = fresh_model(), tmp_path / "c.safetensors", []
    collect(model, [0, 1], Corpus.of(TEXTS * 3), checkpoint=path)

    def begins(corpus, layers=(1,), **settings):
        told.clear()
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(path.read_bytes())
        collect(model, layers, corpus, progress=lambda *at: told.append(at[0]), checkpoint=copy, **settings)
        return told[0]

    assert begins(Corpus.of(TEXTS * 3)) > 96  # of more layers than are wanted: gone on with
    assert begins(Corpus.of(TEXTS * 3), [2]) <= 96
    assert begins(Corpus.of(TEXTS * 4)) <= 96
    assert begins(Corpus.of(TEXTS * 3), max_length=30) <= 96
    moved = Corpus.of(TEXTS * 3)
    with pytest.raises(StaleStatistics, match="no longer those"):
        begins(Corpus(moved.name, moved.digest, lambda: TEXTS[::-1] * 3))


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.safetensors"
    save(SecondMoment.identity(40), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            save(SecondMoment.identity(80), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- files that somebody names ----


def published(path, **arrays):
    np.savez(path, **{name.replace("__", "."): value for name, value in arrays.items()})
    return path


def test_the_published_statistics_are_read(tmp_path):
    model, golden = goldens.tiny_np(), goldens.arrays("stats_n6_t64")
    path = published(
        tmp_path / "mom2.npz",
        mom2__constructor=np.array("util.runningstats.SecondMoment()"),
        mom2__count=golden["count"],
        mom2__mom2=golden["sum"],
        sample_size=np.array(6),
    )
    moment = load_any(path, 3, model)
    assert (moment.count, moment.layer, moment.fingerprint) == (int(golden["count"]), 3, {"published": "mom2.npz"})
    assert goldens.difference(moment.matrix, golden["moment"])[1] < 1e-6
    with pytest.raises(StaleStatistics, match="of another model"):
        load_any(path, 1, fresh_model())


@pytest.mark.parametrize(
    "arrays",
    [
        {"mom2__mom2": np.eye(3)},
        {"mom2__mom2": np.ones((3, 2)), "mom2__count": np.array(1)},
        {"mom2__mom2": np.eye(3), "mom2__count": np.array(0)},
        {"mom2__mom2": np.full((2, 2), np.nan), "mom2__count": np.array(4)},
        {"mom2__mom2": np.array([[1.0, 5], [0, 1]]), "mom2__count": np.array(4), "other": np.array("x")},
        {"mom2__mom2": np.array([[object()]]), "mom2__count": np.array(1)},
    ],
)
def test_an_npz_that_is_no_second_moment(tmp_path, arrays):
    with pytest.raises(ResultFileError):
        load_any(published(tmp_path / "c.npz", **arrays), 0)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut short"])
def test_an_npz_that_is_broken(tmp_path, content):
    if content is not None:
        (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(ResultFileError) as caught:
        load_any(tmp_path / "c.npz", 0)
    assert "\n" not in str(caught.value)


def test_a_file_of_ours_must_be_of_the_model_and_the_layer(tmp_path):
    model, path = fresh_model(), tmp_path / "c.safetensors"
    save(collect(model, [1], TEXTS)[1], path)
    assert load_any(path, 1, model).layer == 1
    with pytest.raises(StaleStatistics, match="layer 1, not 2"):
        load_any(path, 2, model)
    with pytest.raises(StaleStatistics, match="another weights"):
        load_any(path, 1, fresh_model(seed=1))
    with pytest.raises(StaleStatistics, match="features"):
        load_any(path, 1, fresh_model(n_inner=20))
    save(SecondMoment.identity(24), path)
    assert load_any(path, 2, model).layer is None
