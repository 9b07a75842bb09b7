"""Runs of editors over records: what a kill costs, what is measured again, what is refused, what is told."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import errata
from errata.base.errors import ConfigError, FactError, MissingExtra, OutputError, ResultFileError, StaleStatistics
from errata.base.facts import Fact
from errata.data.records import Record, ZsreRecord
from errata.data.snippets import Snippet, Snippets
from errata.editors.editor import Editor
from errata.editors.registry import method_of
from errata.edits.delta import Dense, RankOne
from errata.edits.edit import Edit
from errata.evaluation import executors, runner
from errata.evaluation.executors import Here
from errata.evaluation.measure import Generation, Measures
from errata.evaluation.results import UNEDITED, Run, read_back
from errata.evaluation.runner import evaluate
from errata.metrics import text as text_metrics
from errata.metrics.tfidf import TfIdf
from errata.models.fingerprint import weights_digest
from errata.models.loading import load_pretrained
from errata.models.weights import down_weight_name
from errata.statistics import SecondMoment
from errata.tasks.counterfact import COUNTERFACT, score_record
from helpers.scores import numbers_of
from made_runs import lines_of
from tiny import TEXT, byte_tokenizer, tiny

SUBJECTS = ("Rome", "The Space Needle", "Dante", "Oslo", "Beethoven", "Bern", "Milan")
WORDS = ("Paris", "French", "founder", "located", "the", "was", "city")
EDITED = {"layer": 1, "fact_token": "last", "prefixes": "none", "steps": 6, "weight_decay": 0, "kl_factor": 0}
TOGETHER = 3


def record(case: int, subject: str, new: str, **changes) -> Record:
    own = Record(
        case,
        "P1",
        Fact(subject, "{} is", "Italy").rewrite(new),
        (f"Everyone says that {subject} is",),
        ("Naples is", "Turin is"),
        ("Lyon is",) if case % 2 else (),
        (f"{subject} was", f"The name {subject}"),
    )
    return replace(own, **changes)


RECORDS = [record(10 + i, *pair) for i, pair in enumerate(zip(SUBJECTS, WORDS, strict=True))]
ZSRE = [
    ZsreRecord(
        i, Fact(subject, "Where is {}?").rewrite(new), (f"In which city is {subject}?",), (("who is it?", "He"),)
    )
    for i, (subject, new) in enumerate(zip(SUBJECTS, WORDS, strict=True))
]
SNIPPETS = Snippets(
    {
        ("P1", "Paris"): (Snippet("Lyon", "Lyon is in France, as Paris is."), Snippet("Rome", "Rome is a city.")),
        ("P1", "Italy"): (Snippet("Oslo", "Oslo is no city of Italy."),),
    }
)
PROBES = tuple(TEXT.splitlines()[:2])
ALL = Measures(Generation(length=14), SNIPPETS, TfIdf.fit(SNIPPETS.texts), PROBES)

# The same run, by processes of their own, each killed so many results and seconds after it began; the last one is not.
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import test_runner as t
t.runner.TOGETHER = t.TOGETHER
t.torch.set_num_threads(1)
folder, live = sys.argv[1], t.model()
for moment in [*sys.argv[2:], ""]:
    told, say = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        tell = lambda done, of: os.write(say, bytes([done]))
        t.evaluate(live, t.RECORDS, t.editors(live), folder, t.ALL, keep_edits=True, progress=tell)
        os._exit(0)
    os.close(say)
    done = begun = os.read(told, 1)[0]
    if moment:
        results, seconds = moment.split("+")
        while done < begun + int(results) and (said := os.read(told, 1)):
            done = said[0]
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while said := os.read(told, 1):
        done = said[0]
    os.close(told)
    print(done, sum(map(len, t.lines_of(folder).values())), flush=True)
"""


@pytest.fixture(autouse=True)
def _alike(monkeypatch):
    """One thread, so that numbers are the same to the last bit; several chunks of few records."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(runner, "TOGETHER", TOGETHER)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0, tokenizer=None):
    return load_pretrained((tiny("gpt2", layers=3, seed=seed), tokenizer or byte_tokenizer()), name="tiny")


def rome(live, **changes) -> Editor:
    moment = SecondMoment.identity(live.d_mlp)
    return errata.rome.bind(live, second_moment=moment, **{**EDITED, **changes})


def editors(live) -> dict[str, Editor]:
    return {"rome": rome(live), "above": rome(live, steps=3)}


def made(name: str, edit_of) -> Editor:
    """An editor of which `edit_of(model, rewrite)` is an edit."""
    return Editor(name, {"by": name}, lambda live, rewrites: [edit_of(live, each) for each in rewrites])


def breaking(live, rewrite) -> Edit:
    """An edit after which all that the model says is not a number."""
    weight = down_weight_name(live, 1)
    return Edit.of(live, [RankOne(weight, torch.full((16,), 3e38), torch.full((24,), 3e38))], "broken", [rewrite])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TOGETHER", TOGETHER)
        live = model()
        evaluate(live, RECORDS, editors(live), folder, ALL, source="some", keep_edits=True)
    torch.set_num_threads(threads)
    return folder


# ---- what a run holds -------------------------------------------------------------------------------------


def test_every_record_has_all_numbers_in_order(whole):
    run = Run.load(whole)
    assert (run.task.name, run.settings["records"]["source"]) == ("counterfact", "some")
    assert list(run.records.values()) == RECORDS
    assert list(run.edited) == ["rome", "above"]
    cases = [each.case_id for each in RECORDS]
    for results in (run.unedited, *run.edited.values()):
        assert list(results.by_case) == cases
        for each, result in zip(RECORDS, results.by_case.values(), strict=True):
            assert result.error is None
            assert len(result.texts) == 2
            assert all(text.startswith(begin) for text, begin in zip(result.texts, each.generation, strict=True))
            assert result.entropy >= 0
            assert (result.reference is not None) is (each.rewrite.new_object == "Paris")
            assert (result.essence is not None) is (each.rewrite.subject in {"Rome", "Oslo"})
            assert (result.health is None) is (results.name == UNEDITED)
    assert run.edited["rome"].settings["config"]["steps"] == 6
    es = run.numbers(run.edited["rome"])["es"]
    assert sum(es.values()) > sum(run.numbers(run.unedited)["es"].values())  # edits do something


def test_the_model_is_left_as_it_was_and_measured_as_in_the_plain_way(whole):
    live, run = model(), Run.load(whole)
    before = weights_digest(live.hf)
    for each in RECORDS[:2]:
        plain = score_record(live, each)
        ours = numbers_of(run.unedited.by_case[each.case_id].answers)
        assert ours == pytest.approx({name: plain[name] for name in ours}, abs=1e-5)
    evaluate(live, RECORDS[:2], editors(live), whole.parent / "left", ALL)
    assert weights_digest(live.hf) == before
    assert not live.applied


def test_kept_edits_load_and_give_the_numbers_of_their_lines(whole):
    live, run = model(), Run.load(whole)
    for name, results in run.edited.items():
        for each in RECORDS[::3]:
            result = results.by_case[each.case_id]
            assert result.edit == f"edits/{name}/{each.case_id}.safetensors"
            edit = Edit.load(whole / result.edit)
            assert edit.rewrites == (each.rewrite,)
            with edit.applied(live):
                plain = score_record(live, each)
            ours = numbers_of(result.answers)
            assert ours == pytest.approx({name: plain[name] for name in ours}, abs=1e-5)
            assert result.health["probability_after"] > result.health["probability_before"]


def test_edits_are_kept_where_they_are_asked_for_alone(whole, tmp_path):
    live = model()
    run = evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL)
    assert not (tmp_path / "r" / "edits").exists()
    for name, found in lines_of(whole).items():
        assert [{**each, "edit": None} for each in found] == lines_of(tmp_path / "r")[name]
    assert {result.edit for result in run.edited["rome"].by_case.values()} == {None}


def test_edits_that_were_not_kept_cannot_be_kept_later(whole, tmp_path):
    live = model()
    evaluate(live, RECORDS[:2], editors(live), tmp_path / "r", ALL)
    before = lines_of(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"2 results of .* without their edits"):
        evaluate(live, RECORDS[:2], editors(live), tmp_path / "r", ALL, keep_edits=True)
    assert lines_of(tmp_path / "r") == before


def test_what_splits_texts_is_missed_before_anything_is_written(tmp_path, monkeypatch):
    live = model()
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    text_metrics._splitters.cache_clear()
    with pytest.raises(MissingExtra, match="nltk"):
        evaluate(live, RECORDS[:2], {}, tmp_path / "r", ALL)
    assert not (tmp_path / "r").exists()


def test_two_editors_at_once_are_each_alone_bit_for_bit(whole, tmp_path):
    live = model()
    for name, editor in editors(live).items():
        evaluate(live, RECORDS, {name: editor}, tmp_path / name, ALL, keep_edits=True)
        found = lines_of(tmp_path / name)
        assert found == {each: lines_of(whole)[each] for each in (f"{name}.jsonl", "unedited.jsonl")}


def test_an_editor_added_later_does_not_measure_the_unedited_model_again(whole, tmp_path, monkeypatch):
    live, asked = model(), []
    measured = executors.measure
    monkeypatch.setattr(executors, "measure", lambda *each: asked.append((list(each[3]), each[4])) or measured(*each))
    for name, editor in editors(live).items():
        evaluate(live, RECORDS, {name: editor}, tmp_path / "r", ALL, keep_edits=True)
    assert asked == [(["rome"], True)] * 3 + [(["above"], False)] * 3
    assert lines_of(tmp_path / "r") == lines_of(whole)
    assert [*json.loads((tmp_path / "r" / "card.json").read_text())["editors"]] == ["rome", "above"]
    evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL)
    assert len(asked) == 6
    evaluate(live, RECORDS, {}, tmp_path / "alone", ALL)
    assert asked[6:] == [([], True)] * 3
    assert lines_of(tmp_path / "alone") == {"unedited.jsonl": lines_of(whole)["unedited.jsonl"]}


def test_chunks_may_come_in_any_order(whole, tmp_path):
    class Backwards(Here):
        def run(self, work, chunks):
            yield from super().run(work, chunks[::-1])

    live = model()
    run = evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL, keep_edits=True, executor=Backwards(live))
    assert next(iter(run.unedited.by_case)) == RECORDS[-1].case_id
    for name, found in lines_of(tmp_path / "r").items():
        assert sorted(found, key=lambda line: line["case"]) == lines_of(whole)[name]


def test_questions_of_zsre(tmp_path):
    live = model()
    run = evaluate(live, ZSRE, editors(live), tmp_path / "z", replace(ALL, generation=None, snippets=None, tfidf=None))
    assert run.task.name == "zsre"
    assert list(run.records.values()) == ZSRE
    numbers = run.numbers(run.edited["rome"])
    assert list(numbers) == ["efficacy", "paraphrase", "specificity"]
    assert len(numbers["efficacy"]) == len(ZSRE)
    assert {result.texts for result in run.unedited.by_case.values()} == {()}


def test_it_tells_how_far_it_is(tmp_path):
    live, told = model(), []
    evaluate(live, RECORDS, {"rome": rome(live)}, tmp_path / "r", progress=lambda *each: told.append(each))
    assert told == [(done, 2 * len(RECORDS)) for done in range(2 * len(RECORDS) + 1)]


def test_it_runs_outside_the_main_thread(tmp_path):
    found = []
    work = threading.Thread(target=lambda: found.append(evaluate(model(), RECORDS, {}, tmp_path / "r")))
    work.start()
    work.join()
    assert len(found[0].unedited.by_case) == len(RECORDS)


# ---- kills, cuts, interrupts ------------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed_it_is_the_same_bit_for_bit(whole, tmp_path):
    rng = random.Random(5)
    moments = [f"{results}+{rng.uniform(0, 0.02)}" for results in (1, 2, 0, 3)]
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path / "r"), *moments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told, there = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert all(kept >= said for said, kept in zip(told, there, strict=True))  # what was told is on the disk
    assert sorted(there) == list(there)
    assert len(set(there)) > 2  # it was cut short where it mattered
    assert there[-1] == 3 * len(RECORDS)
    assert lines_of(tmp_path / "r") == lines_of(whole)
    ours, theirs = files(tmp_path / "r"), files(whole)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name.endswith(("safetensors", "records.json")):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("name", ["unedited.jsonl", "editors/rome.jsonl"])
@pytest.mark.parametrize("cut", [0.0, 0.03, 0.4, 0.7, 0.999])
def test_a_file_cut_anywhere_is_completed(whole, tmp_path, name, cut, monkeypatch):
    folder, live = copied(whole, tmp_path), model()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(cut * len(content))])
    left = len(lines_of(folder)[Path(name).name])
    measured, chunks = executors.measure, []
    monkeypatch.setattr(executors, "measure", lambda *each: chunks.append(each[1]) or measured(*each))
    evaluate(live, RECORDS, editors(live), folder, ALL, source="some", keep_edits=True)
    assert lines_of(folder) == lines_of(whole)
    assert len(chunks) == math.ceil(len(RECORDS) / TOGETHER) - left // TOGETHER  # whole chunks are not done again


def test_ctrl_c_ends_after_the_chunk_and_a_second_one_at_once(whole, tmp_path):
    live = model()
    before, digest = signal.getsignal(signal.SIGINT), weights_digest(live.hf)

    def press(done, of):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL, source="some", keep_edits=True, progress=press)
    assert {len(found) for found in lines_of(tmp_path / "r").values()} == {TOGETHER}

    def press_twice(done, of):
        if done == 3 * TOGETHER + 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL, source="some", progress=press_twice)
    assert sum(map(len, lines_of(tmp_path / "r").values())) == 3 * TOGETHER + 1
    assert signal.getsignal(signal.SIGINT) is before
    assert weights_digest(live.hf) == digest
    evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL, source="some", keep_edits=True)
    found = lines_of(tmp_path / "r")
    assert found["rome.jsonl"] == lines_of(whole)["rome.jsonl"]
    assert found["above.jsonl"] == lines_of(whole)["above.jsonl"]


def test_an_error_of_an_editor_that_is_no_failed_edit_ends_the_run_and_keeps_what_is_there(tmp_path):
    def fail(live, rewrite):
        if rewrite.subject == SUBJECTS[4]:
            raise RuntimeError("a bug")
        return FactError("no")

    with pytest.raises(RuntimeError, match="a bug"):
        evaluate(model(), RECORDS, {"bad": made("bad", fail)}, tmp_path / "r")
    assert {len(found) for found in lines_of(tmp_path / "r").values()} == {TOGETHER}


# ---- what is refused --------------------------------------------------------------------------------------


def test_a_second_run_on_the_folder_is_refused_while_one_is_going(tmp_path):
    live, refused = model(), []

    def again(done, of):
        if not refused:
            with pytest.raises(OutputError, match="another process") as error:
                evaluate(live, RECORDS, {}, tmp_path / "r")
            refused.append(error)

    run = evaluate(live, RECORDS, {}, tmp_path / "r", progress=again)
    assert refused
    assert len(run.unedited.by_case) == len(RECORDS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": 1}, "the weights of the model: others than then"),
        ({"records": RECORDS[1:]}, "records.count was 7, now is 6"),
        ({"records": [replace(RECORDS[0], paraphrase=()), *RECORDS[1:]]}, "the records: others than then"),
        ({"measures": replace(ALL, seed=1)}, "seed was 0, now is 1"),
        ({"measures": replace(ALL, generation=Generation(length=15))}, "generation.length was 14, now is 15"),
        ({"measures": replace(ALL, generation=None)}, "generation.top_k was 5, now is not given"),
        ({"measures": replace(ALL, snippets=None, tfidf=None)}, "the reference texts was given, now is null"),
        ({"measures": replace(ALL, tfidf=TfIdf.fit(["other words"]))}, "the word frequencies for RS: others than then"),
        ({"measures": replace(ALL, probes=PROBES[:1])}, "the texts on which drift is measured .*: others than then"),
        ({"editor": {"steps": 7}}, "config.steps was 6, now is 7"),
        ({"editor": None}, 'editor was "rome", now is "other"'),
    ],
)
def test_another_run_is_not_gone_on_with(whole, tmp_path, change, named):
    folder, live = copied(whole, tmp_path), model(change.get("model", 0))
    before = files(folder)
    new = change.get("editor", {})
    chosen = {"new": rome(live), "rome": made("other", breaking) if new is None else rome(live, **new)}
    with pytest.raises(ResultFileError, match=named):
        evaluate(live, change.get("records", RECORDS), chosen, folder, change.get("measures", ALL), source="some")
    assert files(folder) == before  # nothing of "new" was begun either


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "no records"), ([RECORDS[0], RECORDS[0]], "10 is there twice"), ([RECORDS[0], ZSRE[0]], "one kind")],
)
def test_records_that_make_no_run(tmp_path, records, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model(), records, {}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "unedited", "a b", "x" * 101, "é" * 51, "a\n"])
def test_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a row"):
        evaluate(model(), RECORDS, {name: made("other", breaking)}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("probe", "message"), [("a", "no reference text has two tokens"), ("word " * 99, "at most 96")]
)
def test_probes_that_do_not_do_are_refused_before_anything_is_written(tmp_path, probe, message):
    with pytest.raises(FactError, match=message):
        evaluate(model(), RECORDS, {}, tmp_path / "r", Measures(probes=(probe,)))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("where", ["file", "file/inside"])
def test_a_folder_that_cannot_be(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        evaluate(model(), RECORDS, {}, tmp_path / where)


@pytest.mark.parametrize("broken", ["records.json", "unedited.jsonl"])
def test_a_folder_that_was_changed_by_hand_is_left_alone(whole, tmp_path, broken):
    folder, live = copied(whole, tmp_path), model()
    text = (folder / broken).read_text()
    (folder / broken).write_text(text[:20] + "\n" + text[20:])  # no JSON, or a line in the middle that is none
    if broken == "records.json":
        (folder / broken).write_text(text[:-9])
    before = files(folder)
    with pytest.raises(ResultFileError):
        evaluate(live, RECORDS, editors(live), folder, ALL, source="some")
    assert files(folder) == before


def test_a_card_is_for_people_and_is_written_anew(whole, tmp_path):
    live = model()
    for text in ("", "[]", '{"settings": {}, "editors": 3}'):
        folder = copied(whole, tmp_path)
        (folder / "card.json").write_text(text)
        evaluate(live, RECORDS, {"rome": rome(live)}, folder, ALL, source="some")
        assert "rome" in json.loads((folder / "card.json").read_text())["editors"]
        shutil.rmtree(folder)


# ---- records and edits that fail --------------------------------------------------------------------------


def test_failed_edits_are_told_and_count_as_the_unedited_model_has_it(tmp_path):
    live = model()

    def some(model, rewrite):
        edited = rome(model).make(model, [rewrite])[0]
        return FactError(f"not {rewrite.subject}") if rewrite.subject in ("Rome", "Oslo") else edited

    run = evaluate(
        live, RECORDS, {"some": made("some", some), "rome": rome(live)}, tmp_path / "r", ALL, keep_edits=True
    )
    results = run.edited["some"].by_case
    assert [results[case].error for case in (10, 11, 12, 13)] == ["not Rome", None, None, "not Oslo"]
    assert (results[10].answers, results[10].texts, results[10].health, results[10].edit) == (None, (), None, None)
    assert not (tmp_path / "r" / "edits" / "some" / "10.safetensors").exists()
    numbers, before, after = (run.numbers(each) for each in (run.edited["some"], run.unedited, run.edited["rome"]))
    for name, values in numbers.items():
        assert [*values] == [each.case_id for each in RECORDS]
        assert values[10] == before[name][10]
        assert values[11] == (after[name][11] and pytest.approx(after[name][11], rel=1e-5))  # edited by itself


@pytest.mark.parametrize(
    "change",
    [
        {"paraphrase": ("word " * 200,)},
        {"generation": ("word " * 200,)},
        {"generation": ("Rome", "z" * 96)},
        {"rewrite": Fact("z" * 94, "{}", "Italy").rewrite("Rome")},  # "{} is a" has no room
        {"rewrite": Fact("Rome", "{} is", "").rewrite("Oslo")},
        {"rewrite": Fact("Rome", "{} is", "Italy").rewrite("¤")},
    ],
)
def test_a_record_that_the_model_cannot_read_spoils_no_other(tmp_path, change):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ¤", "")
    live = model(tokenizer=tokenizer)
    records = [RECORDS[0], replace(RECORDS[1], **change), RECORDS[2]]
    run = evaluate(live, records, {"rome": rome(live)}, tmp_path / "r", ALL)
    for results in (run.unedited, run.edited["rome"]):
        assert [each.answers is None for each in results.by_case.values()] == [False, True, False]
        assert results.by_case[11].error
    assert 11 not in run.numbers(run.edited["rome"])["es"]
    evaluate(live, records, {"rome": rome(live)}, tmp_path / "r", ALL)  # and it is not asked again and again


def test_no_record_can_be_read(tmp_path):
    live = model()
    run = evaluate(live, [replace(RECORDS[0], paraphrase=("z" * 99,))], {"rome": rome(live)}, tmp_path / "r", ALL)
    assert run.numbers(run.edited["rome"])["es"] == {}


@pytest.mark.parametrize("dense", [False, True])
def test_a_model_that_an_edit_broke_is_measured_all_the_same(tmp_path, dense):
    live = model()

    def broken(model, rewrite):
        if rewrite.subject != "Rome":
            return rome(model).make(model, [rewrite])[0]
        edit = breaking(model, rewrite)
        if dense:
            change = Dense(edit.deltas[0].weight, torch.full((16, 24), 3e38))
            return Edit.of(model, [change], "broken", [rewrite])
        return edit

    digest = weights_digest(live.hf)
    run = evaluate(live, RECORDS[:3], {"broken": made("broken", broken)}, tmp_path / "r", ALL)
    result, numbers = run.edited["broken"].by_case[10], run.numbers(run.edited["broken"])
    assert result.error is None
    assert result.texts == RECORDS[0].generation  # it says nothing
    assert result.health["disabling"] is True
    assert result.health["drift"] is None
    assert (result.essence, numbers["es"][10], numbers["em"][10]) == (None, 0.0, 0.0)
    assert run.edited["broken"].by_case[11].health["drift"] is not None  # the others beside it are whole
    assert weights_digest(live.hf) == digest


# ---- editors ----------------------------------------------------------------------------------------------


def test_an_editor_is_settled_once(tmp_path):
    live = model()
    editor = errata.rome.bind(
        live, layer=1, preset="reference", second_moment=SecondMoment.identity(live.d_mlp), seed=3
    )
    assert len(editor.config["prefixes"]) == 21
    assert (editor.config["key"], editor.config["seed"], editor.config["max_drift"]) == ("reference", 3, None)
    json.dumps(dict(editor.config), allow_nan=False)
    other = errata.rome.bind(live, second_moment=SecondMoment(2 * torch.eye(live.d_mlp), 9, 1), seed=3, **EDITED)
    assert other.config["second_moment"] != editor.config["second_moment"]
    one, two = editor.make(live, [RECORDS[0].rewrite]), editor.make(live, [RECORDS[0].rewrite])
    assert torch.equal(one[0].deltas[0].matrix(), two[0].deltas[0].matrix())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "rome needs the setting 'layer'"),
        ({"layer": 9}, "no layer 9"),
        ({"layer": 1, "preset": "papier"}, "choose from 'paper', 'reference'"),
        ({"layer": 1, "preset": ["paper"]}, "choose from 'paper', 'reference'"),
        ({"layer": "auto"}, "there are none: give some"),
        ({"layer": 1, "loss_layer": 0, "prefixes": "none"}, "from 1, the edited layer, to 2, the last"),
        ({"layer": 1, "loss_layer": 3, "prefixes": "none"}, "from 1, the edited layer, to 2, the last"),
        ({"layer": 1, "step": 2}, "did you mean 'steps'"),
    ],
)
def test_settings_that_do_for_no_record_are_refused_at_once(settings, message):
    live = model()
    with pytest.raises(ConfigError, match=message):
        errata.rome.bind(live, second_moment=SecondMoment.identity(live.d_mlp), **settings)


def test_second_moments_that_do_not_do():
    live = model()
    with pytest.raises(ConfigError, match="second moment"):
        errata.rome.bind(live, **EDITED)
    with pytest.raises(StaleStatistics):
        errata.rome.bind(live, second_moment=SecondMoment.identity(7), **EDITED)


@pytest.mark.parametrize(
    ("name", "message"), [("rom", "did you mean 'rome'"), ("zzz", "choose from rome"), ("", "rome")]
)
def test_unknown_editors(name, message):
    with pytest.raises(ConfigError, match=message):
        method_of(name)


# ---- more records, one by one -----------------------------------------------------------------------------


def test_records_can_be_added_and_numbers_are_those_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TOGETHER", 1)
    live = model()
    evaluate(live, RECORDS, editors(live), tmp_path / "whole", ALL)
    for count in (2, 5, 7):
        run = evaluate(live, RECORDS[:count], {"rome": rome(live)}, tmp_path / "grown", ALL)
        assert run.settings["records"]["count"] == count
        assert len(run.edited["rome"].by_case) == count
    run = evaluate(live, RECORDS, editors(live), tmp_path / "grown", ALL)  # an editor that begins with all records
    assert lines_of(tmp_path / "grown") == lines_of(tmp_path / "whole")
    assert read_back(tmp_path / "grown" / "records.json", COUNTERFACT) == RECORDS
    with pytest.raises(ConfigError, match="is a run over 7 records, and 3 are asked for: give a --limit of 7"):
        evaluate(live, RECORDS[:3], editors(live), tmp_path / "grown", ALL)
    assert lines_of(tmp_path / "grown") == lines_of(tmp_path / "whole")


def test_each_record_is_on_disk_and_told_before_the_next_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_WEIGHTS_AT_ONCE", 1.0)  # as for a model that fills batches with one record
    live, there, told = model(), [], []
    make = rome(live).make

    def spied(live, rewrites):
        assert len(rewrites) == 1
        there.append(len(lines_of(tmp_path / "r").get("rome.jsonl", ())))
        return make(live, rewrites)

    evaluate(
        live,
        RECORDS,
        {"rome": replace(rome(live), make=spied)},
        tmp_path / "r",
        progress=lambda *at: told.append(at[0]),
    )
    assert there == list(range(len(RECORDS)))
    assert told == list(range(2 * len(RECORDS) + 1))
    header = json.loads((tmp_path / "r" / "unedited.jsonl").read_text().splitlines()[0])
    assert header["together"] == 1


def test_a_run_goes_on_with_as_many_at_once_as_it_began(tmp_path, monkeypatch):
    live = model()
    evaluate(live, RECORDS, editors(live), tmp_path / "whole", ALL)
    evaluate(live, RECORDS, {}, tmp_path / "r", ALL)
    monkeypatch.setattr(runner, "TOGETHER", 1)
    evaluate(live, RECORDS, editors(live), tmp_path / "r", ALL)
    assert lines_of(tmp_path / "r") == lines_of(tmp_path / "whole")


def test_a_refusal_names_the_setting(tmp_path):
    live = model()
    evaluate(live, RECORDS[:2], {}, tmp_path / "r", ALL)
    other = [RECORDS[0], RECORDS[2]]
    for changes, said in (
        ({"records": other}, "the records: others than then"),
        ({"measures": replace(ALL, seed=3)}, "seed was 0, now is 3"),
        ({"measures": replace(ALL, probes=PROBES[:1])}, "the texts on which drift is measured .*: others than then"),
        ({"model": model(1)}, "the weights of the model: others than then"),
    ):
        with pytest.raises(ResultFileError, match=said) as refused:
            evaluate(
                changes.get("model", live),
                changes.get("records", RECORDS[:2]),
                {},
                tmp_path / "r",
                changes.get("measures", ALL),
            )
        assert not re.search("[0-9a-f]{32}", str(refused.value))
