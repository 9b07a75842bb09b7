"""Damaged and hostile files: whatever stands in a file that is read, only the package's own errors come out.

Each example takes a whole file of a format and changes its bytes, cuts it short, or puts other values into its JSON.
ERRATA_FUZZ=N tries N examples a format (and other ones each time) instead of the few of the ordinary suite.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.base.errors import ErrataError, ResultFileError
from errata.base.facts import Fact
from errata.base.fingerprint import tensor_digest
from errata.base.journal import write_journal
from errata.benchmarks.fact_table import FactRow, read_facts, write_facts
from errata.benchmarks.requests import read_requests
from errata.benchmarks.sets import read_records
from errata.benchmarks.snippets import Snippet, Snippets, read_snippets, write_snippets
from errata.benchmarks.templates import read_templates
from errata.benchmarks.triples import read_triples
from errata.cli import build, evaluate, facts
from errata.editors.hypernetworks import training
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.lessons import Lesson
from errata.edits import lora
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.evaluation.formats import as_text
from errata.evaluation.report import table
from errata.evaluation.results import Run
from errata.evaluation.sequence import SequenceScores
from errata.evaluation.sites import SiteScores
from errata.metrics.tfidf import TfIdf
from errata.models.loading import load_pretrained
from errata.statistics import store
from errata.statistics.published import load_published
from errata.statistics.readers import read_texts
from errata.statistics.second_moment import Halves, SecondMoment
from errata.statistics.sums import Sums
from errata.tracing.average import AverageEffects, average_effects
from errata.tracing.config import TraceConfig
from errata.tracing.gradients import IntegratedGradients
from errata.tracing.many import trace_facts
from errata.tracing.result import CausalTrace, load_traces, save_traces
from helpers.traces import random_traces
from made_runs import counterfact_run, zsre_run
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


def sites_file(folder):
    header = {"model": "m", "layers": [0, 1], "tokens": ["last"], "cases": [1]}
    scores = dict.fromkeys(("es", "em", "ps", "pm", "ns", "nm", "ats", "atm"), 0.5)
    lines = [{"layer": None, "token": None, "case": 1, "scores": scores}]
    lines += [{"layer": n, "token": "last", "case": 1, "scores": scores, "reason": None} for n in (0, 1)]
    from errata.evaluation import sites

    write_journal(folder / "s.jsonl", sites.KIND, sites.FORMAT, header, lines)
    return folder / "s.jsonl"


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
def lessons():
    rewrite = FACT.rewrite("Rome")
    return [Lesson(rewrite, (rewrite.text,), (("Berlin lies in", "Germany"),)) for _ in range(3)]


TRAINING = training.TrainingConfig(steps=9, batch=1, validate_every=2, validation=1, max_minutes=None)


def training_file(folder):
    run = training._Run.begun(model(), "ke", lessons(), folder / "t", TRAINING, {"blocks": 1, "hidden": 2})
    run.step()
    run.step()
    return folder / "t" / training.STATE


def go_on_training(path):
    training.curve_of(path.parent)
    run = training._Run.begun(model(), "ke", lessons(), path.parent, TRAINING, {"blocks": 1, "hidden": 2})
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
        from errata.models.saving import save_pretrained

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
    "snippets": (snippets_file, read_snippets),
    "tfidf numbers": (tfidf_file("idf.npy"), lambda path: TfIdf.load(path.parent)),
    "tfidf words": (tfidf_file("tfidf_vocab.json"), lambda path: TfIdf.load(path.parent)),
    "run records": (in_run(counterfact_run, "records.json"), load_run),
    "run results": (in_run(counterfact_run, "unedited.jsonl"), load_run),
    "run editor": (in_run(counterfact_run, "editors/rome.jsonl"), load_run),
    "zsre run results": (in_run(zsre_run, "unedited.jsonl"), load_run),
    "sites": (sites_file, SiteScores.load),
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
        max_examples=LONG or 15,
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


def test_a_link_to_itself_is_no_place_to_write(errata, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "f.csv").write_text("subject,prompt,object\nS,{} is in,P\n")
    said = errata("facts", "f.csv", "--out", "loop/a.csv")
    assert said.returncode == 2
    assert "cannot write loop/a.csv" in said.stderr
