"""Damaged and hostile files: whatever stands in a file that is read, only the package's own errors come out.

Each example takes a whole file of a format and changes its bytes, cuts it short, or puts other values into its JSON.
ERRATA_FUZZ=N tries N examples a format (and other ones each time) instead of the few of the ordinary suite.
"""

from __future__ import annotations

import csv
import errno
import functools
import gzip
import io
import json
import os
import pickle
import struct
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.base.display import unformulated
from errata.base.errors import ErrataError, OutputError, ResultFileError
from errata.base.facts import Fact
from errata.base.fingerprint import tensor_digest
from errata.base.journal import write_journal
from errata.cli import build, evaluate, facts
from errata.data.fact_table import MOST_BROKEN, FactRow, read_facts, write_facts
from errata.data.requests import read_requests
from errata.data.snippets import Snippet, Snippets, read_snippets, write_snippets
from errata.data.templates import read_templates
from errata.data.triples import read_triples
from errata.editors.hypernetworks import training
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.training_examples import TrainingExample
from errata.edits import lora
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.evaluation.formats import as_text
from errata.evaluation.report import table
from errata.evaluation.results import Run
from errata.evaluation.sequence import SequenceScores
from errata.metrics.tfidf import TfIdf
from errata.models.loading import load_pretrained
from errata.models.saving import save_pretrained
from errata.statistics import store
from errata.statistics.published import load_published
from errata.statistics.readers import read_texts
from errata.statistics.second_moment import Halves, SecondMoment
from errata.statistics.sums import Sums
from errata.tasks.records import read_records
from errata.tracing.average import AverageEffects, average_effects
from errata.tracing.config import TraceConfig
from errata.tracing.gradients import IntegratedGradients
from errata.tracing.many import trace_facts
from errata.tracing.result import CausalTrace, load_traces, save_traces
from helpers.budget import FULL
from helpers.traces import random_traces
from made_runs import counterfact_records, counterfact_run, failed, write_run, zsre_run
from tiny import byte_tokenizer, tiny

LONG = int(os.environ.get("ERRATA_FUZZ", 0))
FACT = Fact("The Eiffel Tower", "{} is in", "Paris")


def edit_file(folder):
    delta = RankOne("w", torch.randn(3), torch.randn(4))
    edit = Edit((delta,), "rome", (FACT.rewrite("Rome"),), {"layer": 1}, {"w": tensor_digest(torch.ones(2))}, "m")
    edit.save(folder / "e.safetensors")
    return folder / "e.safetensors"


def adapter_file(name):
    def made(folder):
        edit = Edit.load(edit_file(folder))
        delta = RankOne("block.w.weight", edit.deltas[0].write, edit.deltas[0].read)
        other = Edit((delta,), "rome", edit.rewrites, {}, {delta.weight: "0"}, "m")
        other.to_lora(folder / "adapter")
        return folder / "adapter" / name

    return made


def moment_file(folder):
    moment = SecondMoment(torch.eye(4), 9, 1, {"layer": 1, "model": "m"}, 0.1, Halves(0.5, 0.1, 3))
    store.save(moment, folder / "m.safetensors")
    return folder / "m.safetensors"


def published_file(folder):
    arrays = {"mom2.mom2": np.eye(3, dtype=np.float32), "mom2.count": np.array(5)}
    np.savez(folder / "m.npz", **arrays)
    return folder / "m.npz"


def trained_file(folder):
    network = new_network("ke", {"w": (3, 4)}, 4, {"blocks": 1})
    Trained(network, "m", "f", {"minutes": 1}, frozenset(["a"])).save(folder / "t.safetensors")
    return folder / "t.safetensors"


def traces_file(folder):
    maps = {"state": np.full((3, 2), 0.3), "mlp": np.array([[np.nan] * 2, [0.1, 0.2], [0.3, 0.4]])}
    about = {"settings": {"window": 1, "sigma": 0.1}, "model": "m", "fingerprint": "f", "known": True}
    traces = [CausalTrace(FACT, "Paris", ("S", " is", " in"), (0, 0), 0.9, 0.1, maps, **about) for _ in range(2)]
    save_traces(folder / "t.jsonl", traces)
    return folder / "t.jsonl"


def averages_file(ending):
    def made(folder):
        average_effects(random_traces(3)).save(folder / f"a.{ending}")
        return folder / f"a.{ending}"

    return made


def facts_file(ending):
    def made(folder):
        rows = [FactRow(i, Fact(f"S{i}", "{} is in", "Paris"), "in", f"n{i}") for i in range(3)]
        write_facts(folder / f"f.{ending}", rows)
        return folder / f"f.{ending}"

    return made


def text_file(name, text):
    def made(folder):
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return made


def in_run(kind, name):
    def made(folder):
        kind(folder / "r", count=2)
        return folder / "r" / name

    return made


def load_run(path):
    folder = next(each for each in path.parents if (each / "unedited.jsonl").exists() or each.name == "r")
    run = Run.load(folder)
    made = table([run])
    for kind in ("markdown", "latex", "csv", "json"):
        as_text(made, kind)


def sequence_file(folder):
    from errata.evaluation import sequence

    header = {"model": "m", "every": 1, "rewrites": 2, "untouched": 2}
    lines = [
        {
            "edits": n,
            "edit": "a" if n else None,
            "reason": None,
            "recalled": True if n else None,
            "lost": [],
            "untouched_lost": [0],
        }
        for n in range(3)
    ]
    write_journal(folder / "s.jsonl", sequence.KIND, sequence.FORMAT, header, lines)
    return folder / "s.jsonl"


def tfidf_file(name):
    def made(folder):
        np.save(folder / "idf.npy", np.ones(2))
        (folder / "tfidf_vocab.json").write_text('{"a": 0, "b": 1}')
        return folder / name

    return made


def snippets_file(folder):
    write_snippets(folder / "s.json", Snippets({("P1", "Q1"): (Snippet("a", "b c"), Snippet("d", "e"))}))
    return folder / "s.json"


def gradients_file(folder):
    maps = {"state": np.full((2, 3), 0.5)}
    about = {"norms": maps, "sums": maps, "settings": {"points": 50}, "model": "m", "probability": 0.5}
    IntegratedGradients(FACT, "x", ("a", "b"), (0, 1), **about).save(folder / "g.jsonl")
    return folder / "g.jsonl"


PRINTS = {1: {"layer": 1, "model": "m"}}


def sums_file(folder):
    sums = Sums([1], 3, torch.device("cpu"))
    for _ in range(4):
        sums.add(1, torch.randn(4, 3))
        sums.close_batch(4, "a")
    sums.save(folder / "s.unfinished.safetensors", PRINTS)
    return folder / "s.unfinished.safetensors"


def resume_sums(path):
    sums = Sums([1], 3, torch.device("cpu"))
    sums.resume(path, PRINTS)
    if not sums.batches:
        raise ResultFileError("begun anew")
    sums.add(1, torch.randn(4, 3))
    sums.close_batch(4, "b")
    sums.moment(1, PRINTS[1])
    store.stored(path.parent)


@functools.cache
def model():
    return load_pretrained((tiny("gpt2", 2), byte_tokenizer()), name="tiny")


@functools.cache
def examples():
    rewrite = FACT.rewrite("Rome")
    return [TrainingExample(rewrite, (rewrite.text,), (("Berlin lies in", "Germany"),)) for _ in range(3)]


TRAINING = training.TrainingConfig(steps=9, batch=1, validate_every=2, validation=1, max_minutes=None)


def training_file(folder):
    run = training._Run.begun(model(), "ke", examples(), folder / "t", TRAINING, {"blocks": 1, "hidden": 2})
    run.step()
    run.step()
    return folder / "t" / training.STATE


def go_on_training(path):
    training.curve_of(path.parent)
    run = training._Run.begun(model(), "ke", examples(), path.parent, TRAINING, {"blocks": 1, "hidden": 2})
    run.step()


def asked_file(folder):
    ask_again(folder / "p.jsonl")
    return folder / "p.jsonl"


def ask_again(path):
    facts.ask(model(), [FactRow(i, Fact(f"S{i}", "{} is in", "Paris"), "in", f"n{i}") for i in (1, 2)], path, "f", 1, 2)


def traced_file(folder):
    trace_again(folder / "t.jsonl")
    return folder / "t.jsonl"


def trace_again(path):
    trace_facts(model(), [FACT], path, TraceConfig(samples=1, parts=("state",)))


def packed_file(folder):
    (folder / "t.txt.gz").write_bytes(gzip.compress(b"a b\n\nc d\n" * 9, mtime=0))
    return folder / "t.txt.gz"


def parquet_file(folder):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = {"subject": ["a", "b"], "relation": ["in", "in"], "object": ["c", "d"], "text": ["e f", "g"]}
    parquet.write_table(arrow.table(rows), folder / "t.parquet")
    return folder / "t.parquet"


def model_file(name):
    def made(folder):
        save_pretrained(model(), folder / "model")
        return folder / "model" / name

    return made


def build_card_file(folder):
    (folder / build.CARD).write_text(json.dumps({"kind": build.KIND, "settings": {}, "inputs": {}}))
    return folder / build.CARD


COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "{} is in",
        "relation_id": "P1",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
        "subject": "S",
    },
    "paraphrase_prompts": ["S lies in"],
    "neighborhood_prompts": ["T is in"],
    "attribute_prompts": ["U is in"],
    "generation_prompts": ["S is"],
}
ZSRE = {
    "subject": "S",
    "src": "Where is S?",
    "rephrase": "In which city is S?",
    "alt": "Rome",
    "answers": ["Paris"],
    "loc": "nq question: who is T",
    "loc_ans": "U",
}

WIKIBIGEDIT = {
    "subject": "S",
    "prompt": "Where is S?",
    "target_new": "Rome",
    "rephrase_prompt": "In which city is S?",
    "locality_prompt": "Who is T?",
    "locality_ground_truth": "U",
}

FORMATS = {
    "edit": (edit_file, Edit.load),
    "adapter": (adapter_file(lora.TENSORS), lambda path: lora.read(path.parent)),
    "adapter config": (adapter_file(lora.CONFIG), lambda path: lora.read(path.parent)),
    "second moment": (moment_file, lambda path: (store.load(path), store.stored(path.parent))),
    "published second moment": (published_file, lambda path: load_published(path, 1)),
    "trained editor": (trained_file, Trained.load),
    "causal traces": (traces_file, lambda path: average_effects(load_traces(path))),
    "averages json": (averages_file("json"), AverageEffects.load),
    "averages csv": (averages_file("csv"), AverageEffects.load),
    "facts csv": (facts_file("csv"), read_facts),
    "facts jsonl": (facts_file("jsonl"), read_facts),
    "requests": (
        text_file("r.json", '[{"subject": "S", "prompt": "{} is in", "object": "P", "new_object": "Q"}]'),
        read_requests,
    ),
    "templates": (text_file("t.json", '{"in": {"templates": ["{} is in"], "prompt": "{} is in"}}'), read_templates),
    "texts": (text_file("t.jsonl", '{"text": "a b"}\n{"text": "c"}\n'), lambda path: list(read_texts(path, "text"))),
    "counterfact": (text_file("c.json", json.dumps([COUNTERFACT])), read_records),
    "zsre": (text_file("z.json", json.dumps([ZSRE])), read_records),
    "wikibigedit": (text_file("w.json", json.dumps([WIKIBIGEDIT])), read_records),
    "snippets": (snippets_file, read_snippets),
    "tfidf numbers": (tfidf_file("idf.npy"), lambda path: TfIdf.load(path.parent)),
    "tfidf words": (tfidf_file("tfidf_vocab.json"), lambda path: TfIdf.load(path.parent)),
    "run records": (in_run(counterfact_run, "records.json"), load_run),
    "run results": (in_run(counterfact_run, "unedited.jsonl"), load_run),
    "run editor": (in_run(counterfact_run, "editors/rome.jsonl"), load_run),
    "zsre run results": (in_run(zsre_run, "unedited.jsonl"), load_run),
    "sequence": (sequence_file, SequenceScores.load),
    "gradients": (gradients_file, IntegratedGradients.load),
    "unfinished sums": (sums_file, resume_sums),
    "training": (training_file, go_on_training),
    "asked facts": (asked_file, ask_again),
    "traced facts": (traced_file, trace_again),
    "facts tsv": (facts_file("tsv"), read_facts),
    "facts json": (text_file("f.json", '[{"subject": "S", "prompt": "{} is in", "object": "P"}]'), read_facts),
    "requests csv": (text_file("r.csv", "subject,prompt,object,new_object\nS,{} is in,P,Q\n"), read_requests),
    "counterfact jsonl": (text_file("c.jsonl", f"{json.dumps(COUNTERFACT)}\n" * 2), read_records),
    "paragraphs": (text_file("t.txt", "a b\n\nc d\ne\n"), lambda path: list(read_texts(path, "text"))),
    "packed texts": (packed_file, lambda path: list(read_texts(path, "text"))),
    "texts parquet": (parquet_file, lambda path: list(read_texts(path, "text"))),
    "triples parquet": (parquet_file, read_triples),
    "triples tsv": (text_file("t.tsv", "subject\trelation\tobject\na\tin\tb\nc\tin\td\n"), read_triples),
    "probes": (text_file("p.txt", "A text of some words.\n\nAnother one.\n"), evaluate.passages),
    "sentences": (text_file("s.txt", "A text of some words.\nAnother one.\n"), build._lines),
    "card of a build": (build_card_file, lambda path: build._require_place(path.parent, {"settings": {}}, False)),
    "model config": (model_file("config.json"), lambda path: load_pretrained(path.parent)),
    "model weights": (model_file("model.safetensors"), lambda path: load_pretrained(path.parent)),
    "tokenizer": (model_file("tokenizer.json"), lambda path: load_pretrained(path.parent)),
}

ODD = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 10**9, 10**40, 1e308, -1e308, 0.5]),
    st.sampled_from(["", "x", "nan", "\ud800", "\x1b[2J", "a" * 5000, "1"]),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, [1, "a"]]),
)


def places(value, here=()):
    """Every place in a JSON value."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*here, key))


def with_odd_value(draw, value):
    """A JSON value with another one somewhere, or with something left out."""
    place = draw(st.sampled_from(list(places(value))))
    if not place:
        return draw(ODD)
    within = value
    for key in place[:-1]:
        within = within[key]
    if draw(st.booleans()) and draw(st.booleans()):
        del within[place[-1]]
    else:
        within[place[-1]] = draw(ODD)
    return value


def json_changed(draw, whole):
    """The JSON in a file with odd values: a whole file, a line of one, or the header of safetensors."""

    def dumped(value):
        return json.dumps(value).encode()

    size = struct.unpack("<Q", whole[:8])[0] if len(whole) > 8 else 0
    if 2 < size < len(whole) - 8 and whole[8:9] == b"{":
        header = json.loads(whole[8 : 8 + size])
        told = header.get("__metadata__", {})
        if "errata" in told and draw(st.booleans()):
            told["errata"] = json.dumps(with_odd_value(draw, json.loads(told["errata"])))
        else:
            header = with_odd_value(draw, header)
        text = dumped(header)
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]
    try:
        return dumped(with_odd_value(draw, json.loads(whole)))
    except ValueError:
        lines = whole.split(b"\n")
        which = draw(st.integers(0, max(0, len(lines) - 2)))
        begin = b"# errata: " if lines[which].startswith(b"# errata: ") else b""
        try:
            value = json.loads(lines[which].removeprefix(begin))
        except ValueError:
            return bytes_changed(draw, whole)
        lines[which] = begin + dumped(with_odd_value(draw, value))
        return b"\n".join(lines)


def bytes_changed(draw, whole):
    """Bytes cut off, overwritten, put in or left out."""
    place = draw(st.integers(0, len(whole)))
    odd = draw(
        st.binary(max_size=8) | st.sampled_from([b"NaN", b"1e400", b"[" * 20_000, b"\0", b'"', b"\xff", b"9" * 5000])
    )
    kind = draw(st.sampled_from(["cut", "over", "in", "out"]))
    if kind == "cut":
        return whole[:place]
    if kind == "over":
        return whole[:place] + odd + whole[place + len(odd) :]
    return (
        whole[:place] + odd + whole[place:]
        if kind == "in"
        else whole[:place] + whole[place + draw(st.integers(1, 9)) :]
    )


def refusal(load, path):
    """What the package says of a file that it refuses; "" if it reads it."""
    try:
        load(path)
    except ErrataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_packages_errors_come_out(name, tmp_path):
    make, load = FORMATS[name]
    torch.manual_seed(0)
    path = make(tmp_path)
    whole = path.read_bytes()
    load(path)

    count = {"refused": 0, "read": 0}

    @settings(
        max_examples=LONG or (15 if FULL else 8),
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def tried(data):
        change = data.draw(st.sampled_from([json_changed, bytes_changed]))
        path.write_bytes(change(data.draw, whole))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = refusal(load, path)
            assert not set("\x1b\x9b\0") & set(told)
            assert len(told) < 2100
        count["refused" if told else "read"] += 1

    tried()
    print(f"{name}: {count}")  # pytest -s shows it


def test_an_array_larger_than_allowed_is_refused_before_it_is_read(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    announced = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    (tmp_path / "idf.npy").write_bytes(announced)
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("mom2.mom2.npy", announced)
    (tmp_path / "tfidf_vocab.json").write_text('{"a": 0}')
    for load, path in ((load_published, tmp_path / "m.npz"), (TfIdf.load, tmp_path)):
        told = refusal(lambda path, load=load: load(path, 1) if load is load_published else load(path), path)
        assert "8,000 GB" in told


def test_messages_are_cut_and_show_control_characters_escaped():
    told = str(ResultFileError("a\x1b[2J" + "x" * 100_118))
    assert told.startswith("a\\x1b[2J")
    assert "characters left out" in told
    assert len(told) < 2100


TRACED = ("--subject", "S", "--prompt", "{} is in", "--samples", "1")
EDITED = ("--subject", "S", "--prompt", "{} is in", "--to", "P")


def refused_in_a_line(said):
    assert said.returncode == 2, said
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1
    assert said.stdout == ""


def commands(place):
    """A command for each option and argument that is a path, each with a path at `place`."""
    return {
        "facts --out": ("facts", "f.csv", "--out", f"{place}.csv"),
        "trace --out": ("trace", *TRACED, "--out", f"{place}.png"),
        "trace --save": ("trace", *TRACED, "--save", f"{place}.jsonl"),
        "gradients --out": ("gradients", *TRACED[:4], "--out", f"{place}.svg"),
        "edit --out": ("edit", *EDITED, "--out", f"{place}.safetensors"),
        "edit --lora": ("edit", *EDITED, "--lora", f"{place}"),
        "sweep --save": ("sweep", "--identity", "--save", f"{place}.jsonl"),
        "sweep --out": ("sweep", "--identity", "--save", "s.jsonl", "--out", f"{place}.pdf"),
        "sequence --save": ("sequence", "--identity", "--save", f"{place}.jsonl"),
        "report --out": ("report", "r", "--out", f"{place}.md"),
        "report --page": ("report", "r", "--page", f"{place}.html"),
        "facts": ("facts", f"{place}.csv"),
        "trace --facts": ("trace", "--facts", f"{place}.csv", "--save", "t.jsonl"),
        "trace --model": ("trace", *TRACED, "--model", f"{place}/x"),
        "edit --requests": ("edit", "--requests", f"{place}.csv"),
        "average": ("average", f"{place}.jsonl"),
        "figure": ("figure", "trace", f"{place}.jsonl", "--out", "t.png"),
        "generate --edit": ("generate", "S", "--edit", f"{place}.safetensors"),
        "export": ("export", f"{place}.safetensors", "--lora", "l"),
        "evaluate --out": ("evaluate", "--out", f"{place}"),
        "evaluate --data": ("evaluate", "--data", f"{place}.json", "--out", "e"),
        "evaluate --probe": ("evaluate", "--probe", f"{place}.txt", "--out", "e"),
        "stats --corpus": ("stats", "--corpus", f"{place}.txt", "--layers", "1"),
        "report": ("report", f"{place}"),
    }


@pytest.mark.parametrize("name", commands(""))
def test_a_link_to_itself_is_refused_wherever_a_path_stands(name, errata, tmp_path):
    (tmp_path / "f.csv").write_text("subject,prompt,object\nS,{} is in,P\n")
    counterfact_run(tmp_path / "r", count=2)
    command = commands("loop")[name]
    for word in command:
        if word.startswith("loop"):
            (tmp_path / word.split("/")[0]).symlink_to(word.split("/")[0])
    before = sorted(path.name for path in tmp_path.iterdir())
    refused_in_a_line(errata(*command))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [name for name in commands("") if not name.endswith(("out", "save", "lora", "page"))])
def test_the_home_of_nobody_is_refused_in_a_line(name, errata):
    refused_in_a_line(errata(*commands("~nosuchuser/x")[name]))


@pytest.mark.parametrize("samples", ["1e30", "1000000000", "nan", "0"])
def test_no_number_of_samples_takes_more_memory_than_there_is(samples, errata):
    said = errata("trace", *TRACED[:-1], samples)
    assert said.returncode == 2
    assert "--samples" in said.stderr
    assert said.stderr.count("\n") == 1
    with pytest.raises(ErrataError, match="samples"):
        TraceConfig(samples=float(samples))


def test_broken_lines_of_a_table_are_read_up_to_some_and_the_rest_counted(errata, tmp_path):
    head = "subject,prompt,object\nS,{} is in,P\n"
    (tmp_path / "f.csv").write_text(head + 'S,"{} is"in,P\n' * 200_000)
    (tmp_path / "g.csv").write_text(head + "S,{} is in\n" * 200_000)
    begin = time.monotonic()
    table = read_facts(tmp_path / "f.csv")
    assert len(table.rows) == 1
    assert len(table.bad) == MOST_BROKEN + 1
    assert "199,900 lines from here on are not read" in table.bad[-1].reason
    said = errata("facts", "g.csv")
    assert said.returncode == 1
    assert "and 199,900 more bad lines" in said.stderr
    assert said.stderr.count("\n") < 110
    assert time.monotonic() - begin < 20


def zipped(path, change):
    """An .npz of a second moment after a change of its bytes at the places of a member's flags and method."""
    np.savez(path, **{"mom2.mom2": np.eye(3, dtype=np.float32), "mom2.count": np.array(5)})
    whole = bytearray(path.read_bytes())
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := whole.find(sign, place + 1)) >= 0:
            change(whole, place + flags)
    path.write_bytes(whole)


def test_packed_arrays_that_cannot_be_unpacked(tmp_path):
    def encrypted(whole, at):
        whole[at] |= 1

    def unknown(whole, at):
        whole[at + 2 : at + 4] = struct.pack("<H", 99)

    for change, reason in ((encrypted, "password"), (unknown, "compression method is not supported")):
        zipped(tmp_path / "m.npz", change)
        assert reason in refusal(lambda path: load_published(path, 1), tmp_path / "m.npz")
    (tmp_path / "m.npz").write_bytes(pickle.dumps({"mom2": [1]}))
    assert "not a zip file" in refusal(lambda path: load_published(path, 1), tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", **{"mom2.mom2": np.array([{}], dtype=object), "mom2.count": np.array(5)})
    assert "holds object, not numbers" in refusal(lambda path: load_published(path, 1), tmp_path / "m.npz")


def test_tensors_of_a_type_that_torch_has_not(tmp_path):
    header = json.dumps({"t": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    for ending in ("safetensors", "unfinished.safetensors"):
        (tmp_path / f"t.{ending}").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    for load in (Edit.load, store.load, Trained.load):
        assert "t.safetensors" in refusal(load, tmp_path / "t.safetensors")
    assert {each.problem for each in store.stored(tmp_path)} == {"broken, or no second moment of ours"}


NAME = "=1+2 <b>x</b> `y`|z *w* \x1b[2J模"


def test_names_are_no_markup_and_no_formula(tmp_path):
    runs = [
        Run.load(counterfact_run(tmp_path / name, 3, ("rome",), model)) for name, model in (("a", NAME), ("b", "-m"))
    ]
    found = table(runs)
    assert r"=1+2 &lt;b&gt;x&lt;/b&gt; \`y\`\|z \*w\*" in as_text(found, "markdown")
    cells = [line["model"] for line in csv.DictReader(io.StringIO(as_text(found, "csv")))]
    assert {cell[:3] for cell in cells} == {"'=1", "'-m"}
    for kind in ("markdown", "latex", "csv", "json"):
        assert "\x1b" not in as_text(found, kind)
    for sign in "=+-@\t\r":
        assert unformulated(f"{sign}1").startswith("'")
    assert unformulated("a=1") == "a=1"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_has_no_signs_for_is_replaced(encoding, tmp_path, monkeypatch):
    from errata.cli.app import main

    folder = counterfact_run(tmp_path / "r", 3, ("rome",), NAME)
    counterfact_run(tmp_path / "s", 3, ("rome",))
    for more in ([], *(["--format", kind] for kind in ("markdown", "latex", "csv", "json"))):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        monkeypatch.setattr(sys, "argv", ["errata", "report", str(folder), str(tmp_path / "s"), *more])
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        assert not left.value.code
        text = written.getvalue().decode(encoding)
        assert "gpt2-xl" in text
        assert "?" in text or more[1:] == ["json"]
        assert "\x1b" not in text


@pytest.mark.parametrize("measured", ["nothing", "no record", "only refusals"])
def test_a_run_without_numbers_has_a_report(measured, errata, tmp_path):
    records = counterfact_records(0 if measured == "no record" else 3)
    found = [failed(record) for record in records] if measured == "only refusals" else []
    write_run(tmp_path / "r", records, {"unedited": found, "rome": found})
    for kind in ("table", "markdown", "latex", "csv", "json"):
        said = errata("report", "r", "--format", kind, "--page", "p.html")
        assert said.returncode in (0, 2), said
        assert said.returncode == 0 or said.stderr.startswith("error: ")
        assert "nan" not in said.stdout.replace("nano", "")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_full_disk_is_named_whatever_is_drawn(ending, errata, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    traces_file(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    said = errata("figure", "trace", "t.jsonl", "--fact", "1", "--out", f"t.{ending}")
    refused_in_a_line(said)
    assert f"cannot write t.{ending}: No space left on device" in said.stderr
    assert not list(tmp_path.glob(f"*t.{ending}*"))


def test_names_that_are_no_utf8_are_written_and_shown(errata, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    facts_file("csv")(folder_made(folder))
    counterfact_run(folder / "r", 3, ("rome",), os.fsdecode(b"m\xe9"))
    for command in (
        ("facts", folder / "f.csv", "--out", folder / "g.csv"),
        ("report", folder / "r"),
        *(("report", folder / "r", "--out", folder / f"r.{kind}") for kind in ("md", "tex", "csv", "json", "txt")),
        ("report", folder / "r", "--page", folder / "r.html"),
    ):
        said = errata(*command)
        assert said.returncode == 0, said
        assert "\udce9" not in said.stdout + said.stderr
    edit = replace(Edit.load(edit_file(folder)), model=str(folder))
    edit.save(folder / "f.safetensors")
    assert Edit.load(folder / "f.safetensors") == edit
    assert Edit.load(folder / "f.safetensors").model == str(folder)
    with pytest.raises(OutputError, match="no path that is not UTF-8"):  # the libraries' own bound
        save_pretrained(model(), folder / "model")


def folder_made(folder):
    folder.mkdir()
    return folder
