"""Files that are written aside: whole or not there, readable by others, and nothing left by kills."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from errata.base.errors import OutputError
from errata.base.files import aside, require_writable, write_text, written_whole
from errata.base.journal import Journal, write_journal
from errata.base.tensor_files import write_tensors
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.edits.ledger import save_merged
from errata.models.loading import load_pretrained
from errata.models.saving import written_folder
from errata.models.weights import down_weight_name
from errata.plots.drawing import save as save_figure
from errata.plots.sequence import sequence_figure
from errata.statistics import SecondMoment
from errata.statistics.store import save as save_moment
from tiny import MLP_WIDTH, WIDTH, byte_tokenizer, tiny

# A writer that says when it has begun, and then waits for its end.
WRITER = """
import sys, time
from pathlib import Path
from errata.base.files import written_whole
from errata.models.saving import written_folder
kind, path = sys.argv[1:]
with {"file": written_whole, "folder": written_folder}[kind](path) as temporary:
    (temporary / "f" if kind == "folder" else temporary).write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer():
    begun = []

    def begin(kind: str, path: Path) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        begun.append(child)
        assert child.stdout.readline() == "begun\n"
        return child

    yield begin
    for child in begun:
        child.kill()
        child.communicate()


@pytest.fixture(params=(0o022, 0o077, 0o002))
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def model():
    return load_pretrained((tiny("gpt2"), byte_tokenizer()), name="tiny")


def edit_of(live) -> Edit:
    weight = down_weight_name(live, 1)
    return Edit.of(live, [RankOne(weight, torch.ones(WIDTH), torch.ones(MLP_WIDTH))], "test")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- permissions ------------------------------------------------------------------------------------------


def test_everything_that_is_written_has_the_permissions_of_a_new_file(tmp_path, mask):
    live = model()
    edit = edit_of(live)
    edit.save(tmp_path / "e.safetensors")
    save_moment(SecondMoment.identity(4), tmp_path / "c.safetensors")
    write_tensors(tmp_path / "t.safetensors", "test", 1, {}, {"x": torch.ones(2)})
    edit.to_lora(tmp_path / "new" / "lora")
    with edit.applied(live):
        save_merged(live, tmp_path / "merged")
    write_text(tmp_path / "text.csv", "a")
    write_journal(tmp_path / "whole.jsonl", "test", 1, {}, [])
    Journal.open(tmp_path / "open.jsonl", "test", 1, {}).close()
    for ending in (".png", ".svg", ".pdf"):
        save_figure(sequence_figure([0, 1], {"edited": [0.0, 1.0]}, newest=1), tmp_path / f"figure{ending}")
    found = [tmp_path / name for name in names(tmp_path)]
    found += [path for folder in found if folder.is_dir() for path in folder.rglob("*")]
    assert len(found) > 18
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(wanted), path


# ---- kills ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("next_writer", [write_text, require_writable])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, writer, kind, next_writer):
    child = writer(kind, tmp_path / "t.json")
    assert len(names(tmp_path)) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(names(tmp_path)) == 1
    other = tmp_path / "another.json"
    next_writer(other, *(["x"] if next_writer is write_text else []))
    assert names(tmp_path) == (["another.json"] if next_writer is write_text else [])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_others_are_writing_stays(tmp_path, writer, kind):
    first, second = writer(kind, tmp_path / "a"), writer(kind, tmp_path / "b")
    write_text(tmp_path / "c", "c")
    for child in (first, second):
        child.communicate("\n")
        assert child.returncode == 0
    assert names(tmp_path) == ["a", "b", "c"]


def test_threads_that_write_at_once_do_not_disturb_each_other(tmp_path):
    errors = []

    def write(number: int) -> None:
        try:
            for turn in range(30):
                write_text(tmp_path / f"{(number + turn) % 3}.txt", "x" * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["0.txt", "1.txt", "2.txt"]
    assert all(path.read_text() == "x" * 1000 for path in tmp_path.iterdir())


def test_an_old_folder_that_a_kill_between_two_renames_hid_is_put_back(tmp_path):
    with aside(tmp_path / "adapter") as (hidden, _):
        (hidden / "old").mkdir()
        (hidden / "old" / "f").write_text("old")
        shutil.copytree(hidden, tmp_path / ".adapter.copy.unwritten")
    assert names(tmp_path) == [".adapter.copy.unwritten"]
    write_text(tmp_path / "x", "x")
    assert names(tmp_path) == ["adapter", "x"]
    assert (tmp_path / "adapter" / "f").read_text() == "old"


def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("errata.base.files.fcntl", None)
    for age, name in ((7200, ".a.x.unwritten"), (60, ".b.x.unwritten")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_text(name[1])
        for path in (tmp_path / name / "lock", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    write_text(tmp_path / "c", "c")
    assert names(tmp_path) == [".b.x.unwritten", "c"]


def test_a_name_of_the_longest_length_can_be_written(tmp_path):
    write_text(tmp_path / ("é" * 125 + ".json"), "x")
    assert len(names(tmp_path)) == 1


# ---- places that go away ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", [written_whole, written_folder])
def test_a_folder_that_goes_away_while_a_file_is_written(tmp_path, kind, moved):
    folder = tmp_path / "run"

    def write() -> None:
        with kind(folder / "t") as temporary:
            (temporary / "f" if kind is written_folder else temporary).write_text("x")
            os.rename(folder, tmp_path / "elsewhere") if moved else shutil.rmtree(folder)

    with pytest.raises(OutputError, match="cannot write"):
        write()
    assert not folder.exists()


@pytest.mark.parametrize("harm", ["removed", "moved", "replaced", "file removed"])
@pytest.mark.parametrize("last", [False, True])
def test_a_journal_whose_file_goes_away(tmp_path, harm, last):
    folder = tmp_path / "run"
    path = folder / "j.jsonl"

    def write() -> None:
        with Journal.open(path, "test", 1, {}) as journal:
            journal.append({"a": 1})
            if harm == "file removed":
                path.unlink()
            else:
                os.rename(folder, tmp_path / "elsewhere") if harm != "removed" else shutil.rmtree(folder)
            if harm == "replaced":
                folder.mkdir()
                write_journal(path, "test", 1, {}, [{"a": 1}])
            if not last:
                journal.append({"a": 2})

    with pytest.raises(OutputError, match="removed, moved or replaced while it was being written"):
        write()


def test_an_error_in_the_block_is_not_hidden_by_a_journal_that_is_gone(tmp_path):
    path = tmp_path / "j.jsonl"

    def fail() -> None:
        path.unlink()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Journal.open(path, "test", 1, {}):
        fail()
