"""`errata stats` as a user has it: what is collected, told, kept, listed and merged."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from errata.base.errors import ConfigError, ErrataError, StaleStatistics
from errata.cli.stats import stats
from errata.statistics import collect, load
from errata.statistics.store import cache_folder
from helpers.models import fresh_model
from helpers.moments import TEXTS as LINES

TEXTS = [line.strip() for line in LINES]  # as a file gives them back

app = typer.Typer()
app.command()(stats)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command in an empty folder and home; a model and a file of texts lie there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    model = fresh_model()
    model.hf.save_pretrained("gpt")
    model.tokenizer.save_pretrained("gpt")
    (tmp_path / "lines.txt").write_text("\n\n".join(TEXTS))

    def call(*arguments: str, code: int = 0):
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    return call


def test_layers_are_collected_in_one_go_and_found_again(run, tmp_path):
    ask = ("--model", "gpt", "--layers", "0-1", "--corpus", "lines.txt")
    told = run(*ask, "--json")
    assert [each["layer"] for each in told["second_moments"]] == [0, 1]
    assert told["model"] == "gpt"
    assert told["corpus"] == "lines.txt"
    plain = collect(fresh_model(), [0, 1], TEXTS)
    assert {each["tokens"] for each in told["second_moments"]} == {plain[0].count}
    assert told["second_moments"][1]["condition_number"] == pytest.approx(plain[1].condition_number, rel=1e-3)
    assert told["second_moments"][1]["effective_rank"] == pytest.approx(plain[1].effective_rank, rel=1e-3)
    before = {path: path.stat().st_mtime_ns for path in cache_folder().iterdir()}
    assert len(before) == 2
    shown = run(*ask)
    assert "of 24" in shown
    assert {path: path.stat().st_mtime_ns for path in cache_folder().iterdir()} == before


def test_copies_and_a_ridge(run, tmp_path):
    ask = ("--model", "gpt", "--corpus", "lines.txt", "--json")
    told = run(*ask, "--layers", "1", "--ridge", "0.01", "--out", "c.safetensors")
    copy = load("c.safetensors")
    assert copy.asked_ridge == 0.01
    assert told["second_moments"][0]["ridge"] == pytest.approx(0.01 * float(copy.matrix.diagonal().mean()))
    assert all(load(path).asked_ridge == 0 for path in cache_folder().iterdir())
    run(*ask, "--layers", "2,0", "--out", "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["layer0.safetensors", "layer2.safetensors"]


def test_shards_are_merged(run):
    for part in ("1/2", "2/2"):
        run(
            "--model",
            "gpt",
            "--layers",
            "1",
            "--corpus",
            "lines.txt",
            "--shard",
            part,
            "--out",
            f"{part[0]}.safetensors",
        )
    told = run("--merge", "1.safetensors", "--merge", "2.safetensors", "--out", "whole.safetensors", "--json")
    whole = collect(fresh_model(), [1], TEXTS)[1]
    assert told["second_moments"][0]["tokens"] == whole.count
    torch.testing.assert_close(load("whole.safetensors").matrix, whole.matrix, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="twice"):
        run("--merge", "1.safetensors", "--merge", "1.safetensors", "--out", "x.safetensors")
    run("--model", "gpt", "--layers", "0", "--corpus", "lines.txt", "--out", "0.safetensors")
    with pytest.raises(StaleStatistics, match="layer"):
        run("--merge", "1.safetensors", "--merge", "0.safetensors", "--out", "x.safetensors")


def test_the_list_says_what_is_used_and_why_not(run):
    assert "nothing is stored" in run("--list")
    ask = ("--model", "gpt", "--corpus", "lines.txt", "--json")
    run(*ask, "--layers", "1")
    run(*ask, "--layers", "0", "--tokens", "50")
    (cache_folder() / "broken.safetensors").write_bytes(b"x")

    def reasons(*arguments):
        return {
            (each["layers"] or ["-"])[0]: each["unused_because"]
            for each in run("--list", "--json", *arguments)["files"]
        }

    assert reasons() == {1: None, 0: None, "-": "broken, or no second moment of ours"}
    assert reasons("--model", "gpt")[0] is None
    assert reasons("--model", "gpt", "--corpus", "lines.txt") == {
        1: None,
        0: "another max_tokens",
        "-": "broken, or no second moment of ours",
    }
    assert reasons("--model", "gpt", "--corpus", "lines.txt", "--tokens", "50", "--which", "not-first")[1] == (
        "another max_tokens, which"
    )
    fresh_model(seed=1).hf.save_pretrained("gpt")
    assert reasons("--model", "gpt")[1] == "another weights"
    assert "not used: another weights" in run("--list", "--model", "gpt")
    fresh_model(layers=1).hf.save_pretrained("gpt")
    assert reasons("--model", "gpt")[1] == "the model has no such layer"


def test_the_atlas_brings_its_layer_and_its_corpus(run):
    told = run("--tokens", "300", "--json")
    assert told["model"] == told["corpus"] == "atlas"
    assert [each["tokens"] for each in told["second_moments"]] == [300]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--layers", "1-9"), "layers 0 to 2"),
        (("--layers", "2-1"), "the lower one comes first"),
        (("--layers", "one"), "write 3, 3-5 or 2,4-6"),
        (("--layers", "1-"), "write 3, 3-5 or 2,4-6"),
        ((), "give --layers"),
        (("--layers", "0,1", "--out", "c.safetensors"), "name a folder"),
        (("--layers", "0", "--ridge", "0.1"), "give --out"),
        (("--layers", "0", "--shard", "1"), "like 1/4"),
        (("--layers", "0", "--shard", "5/4"), "part 5 of 4"),
        (("--layers", "0", "--corpus", "none.txt"), "no file or folder"),
        (("--layers", "0", "--corpus", "empty.txt"), "no tokens"),
        (("--layers", "0", "--field", "body", "--corpus", "a.jsonl"), 'field "body"'),
        (("--layers", "0"), "--download"),
        (("--merge", "a.safetensors"), "give --out"),
        (("--merge", "a.safetensors", "--out", "b.safetensors"), "no file a.safetensors"),
    ],
)
def test_what_is_refused(run, tmp_path, arguments, says):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ErrataError, match=says) as caught:
        run("--model", "gpt", *arguments)
    assert "\n" not in str(caught.value)
    assert not cache_folder().exists() or not list(cache_folder().iterdir())
