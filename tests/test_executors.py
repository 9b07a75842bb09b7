"""Chunks on Ray: what is measured is what is measured here, whatever dies on the way."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import sys

import psutil
import pytest
import torch

import errata
from errata.atlas.records import records
from errata.base.errors import ConfigError, MissingExtra
from errata.editors.editor import Editor
from errata.evaluation import executors, runner
from errata.evaluation.executors import Chunk, Cluster, Here, Work, WorkerLost
from errata.evaluation.measure import Measures
from errata.evaluation.runner import evaluate
from errata.statistics.second_moment import SecondMoment

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def _own_token():
    """What Ray's processes know each other by; else it is kept in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def model():
    return errata.load_model("atlas")


@pytest.fixture(scope="module")
def some():
    return records(6)


@pytest.fixture(scope="module")
def editor(model):
    return errata.editor(model, steps=2, prefixes="none", second_moment=SecondMoment.identity(model.d_mlp))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster():
    """One that is there already: what `Cluster` finds and leaves running."""
    executors._ray()
    quiet = {"log_to_driver": False, "logging_level": "CRITICAL", "include_dashboard": False}
    ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, **quiet)
    yield
    ray.shutdown()


def chunks_of(some, editors=("row",), before=False):
    return [Chunk((record,), editors, before) for record in some]


def workers():
    """The processes that hold models."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker"):
                found.append(process)
        except psutil.Error:
            pass
    return found


def told(run):
    """All that is in a run but the times."""
    return {
        row.name: {case: {**result.as_line(), "seconds": None} for case, result in sorted(row.by_case.items())}
        for row in (run.unedited, *run.edited.values())
    }


def test_a_run_with_a_killed_worker_is_the_serial_one_and_nothing_is_left_running(
    model, some, editor, one_thread, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "TOGETHER", 1)
    died, killed = [], []
    following = executors._Crew._next

    def spied(crew):
        worker, number, answer = following(crew)
        if answer is None:
            died.append(number)
        return worker, number, answer

    def kill_one(done, _):
        if done and not killed:
            killed.append(workers()[0])
            killed[0].kill()

    monkeypatch.setattr(executors._Crew, "_next", spied)
    serial = evaluate(model, some, {"rome": editor}, tmp_path / "serial", keep_edits=True)
    executor = Cluster(model, errata.load_model, workers=2)
    on_ray = evaluate(
        model, some, {"rome": editor}, tmp_path / "ray", keep_edits=True, executor=executor, progress=kill_one
    )
    assert len(died) == 1
    assert died[0] is not None  # in the midst of a chunk
    assert told(on_ray) == told(serial)
    assert len(told(serial)["rome"]) == len(some)
    for result in serial.edited["rome"].by_case.values():
        assert (tmp_path / "ray" / result.edit).read_bytes() == (tmp_path / "serial" / result.edit).read_bytes()
    assert not ray.is_initialized()
    assert not [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


def test_closing_ends_the_workers_and_leaves_a_cluster_that_was_there(cluster, model, some, editor):
    work = Work("counterfact", {"row": editor}, Measures())
    coming = Cluster(model, errata.load_model, workers=1).run(work, chunks_of(some))
    _, measured = next(coming)
    assert measured.edits == {}  # nobody asked for them
    busy = workers()
    assert busy
    coming.close()
    assert not psutil.wait_procs(busy, timeout=20)[1]
    assert ray.is_initialized()


def test_a_worker_with_another_model_is_refused(cluster, model, some):
    def other():
        loaded = errata.load_model("atlas")
        with torch.no_grad():
            next(loaded.hf.parameters()).view(-1)[0] += 1
        return loaded

    with pytest.raises(ConfigError, match=r"fingerprint is [0-9a-f]{64} there and [0-9a-f]{64} here"):
        list(Cluster(model, other, workers=1).run(Work("counterfact", {}, Measures()), chunks_of(some, (), True)))


def test_errors_of_ours_arrive_as_they_are_and_others_as_their_kind(cluster, model, some):
    def stopped(model, rewrites):
        raise ConfigError("this cannot be")

    def wrong(model, rewrites):
        return {}["nothing"]

    executor = Cluster(model, errata.load_model, workers=1)
    with pytest.raises(ConfigError) as caught:
        list(executor.run(Work("counterfact", {"row": Editor("none", {}, stopped)}, Measures()), chunks_of(some)))
    assert type(caught.value) is ConfigError
    assert str(caught.value) == "this cannot be"
    with pytest.raises(KeyError, match="nothing"):
        list(executor.run(Work("counterfact", {"row": Editor("none", {}, wrong)}, Measures()), chunks_of(some)))


def test_a_chunk_that_kills_its_workers_is_named(cluster, model, some, monkeypatch):
    monkeypatch.setattr(executors, "DEATHS", 2)

    def deadly(model, rewrites):
        os.kill(os.getpid(), signal.SIGKILL)

    work = Work("counterfact", {"row": Editor("none", {}, deadly)}, Measures())
    with pytest.raises(WorkerLost, match=f"2 workers died over the same records, cases {some[0].case_id}:"):
        list(Cluster(model, errata.load_model, workers=1).run(work, chunks_of(some[:1])))


def test_a_cluster_without_room_says_what_it_has(cluster, model, some, monkeypatch):
    monkeypatch.setattr(executors, "PATIENCE", 1.0)
    executor = Cluster(model, errata.load_model, workers=1, cpus=64)
    with pytest.raises(ConfigError, match=r"each is to have 64 CPU, and the nodes have 2 CPU, 0 GPU"):
        list(executor.run(Work("counterfact", {}, Measures()), chunks_of(some, (), True)))


def test_nothing_to_do_starts_nothing(model):
    assert list(Cluster(model, errata.load_model, "ray://nowhere:1").run(Work("counterfact", {}, Measures()), [])) == []
    assert list(Here(model).run(Work("counterfact", {}, Measures()), [])) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 0}, "there cannot be 0 workers"),
        ({"cpus": 0}, "cannot have 0 CPUs"),
        ({"gpus": -1}, "cannot have -1 GPUs"),
        ({"gpus": 0.5}, "given GPUs and the model is not on one here"),
        ({"gpus": 1.5}, "cannot have 1.5 GPUs: give a share of one, or a whole number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(model, settings, said):
    with pytest.raises(ConfigError, match=said):
        Cluster(model, errata.load_model, **settings)


def test_without_ray_it_is_asked_for(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'errata-lm\[ray\]'"):
        Cluster(model, errata.load_model)


def test_work_is_sent_without_the_model(model, editor, some):
    small = Work("counterfact", {name: errata.editor(model, name) for name in ("ft", "kn")}, Measures()).without_model()
    assert len(pickle.dumps(small)) < 10_000
    again = pickle.loads(pickle.dumps(Work("counterfact", {"rome": editor}, Measures()).without_model()))
    assert again.editors["rome"].make(model, [some[0].rewrite]) == editor.make(model, [some[0].rewrite])
    with pytest.raises(ConfigError, match="this rome editor has no model"):
        again.editors["rome"](some[0].rewrite)
    assert editor(some[0].rewrite).rewrites == (some[0].rewrite,)  # the one that stays here keeps it
