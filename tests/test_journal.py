"""Journals: nothing that was appended is lost, whatever moment a run is killed at."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from errata.base import journal as module
from errata.base.errors import OutputError, ResultFileError
from errata.base.journal import Journal, read_journal, write_journal

HEADER = {"model": "atlas", "seed": 0, "config": {"layer": 4, "key": "consistent"}}
RECORDS = [{"case": 0, "text": "Zürich\n“x”\u2028", "p": 0.1 + 0.2}, {"case": 1, "list": [1e-320, -0.0]}, {"case": 2}]


def opened(path, header=HEADER, **options):
    return Journal.open(path, "trial", 1, header, **options)


def filled(path, records=RECORDS):
    with opened(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "j.jsonl"
    filled(path)
    header, records = read_journal(path, "trial", 1)
    assert header == {"kind": "trial", "version": 1, **HEADER}
    assert records == RECORDS
    assert records[0]["p"].hex() == (0.1 + 0.2).hex()
    assert math.copysign(1, records[1]["list"][1]) == -1
    with opened(path) as journal:
        assert journal.records == RECORDS
        journal.append({"case": 3})
    assert read_journal(path, "trial", 1)[1] == [*RECORDS, {"case": 3}]


def test_a_lone_surrogate_comes_back(tmp_path):
    filled(tmp_path / "j.jsonl", [{"name": "caf\udce9"}])
    assert opened(tmp_path / "j.jsonl").records == [{"name": "caf\udce9"}]


def test_written_at_once_is_the_same_file(tmp_path):
    content = filled(tmp_path / "slow.jsonl")
    write_journal(tmp_path / "fast.jsonl", "trial", 1, HEADER, iter(RECORDS))
    assert (tmp_path / "fast.jsonl").read_bytes() == content


def test_cut_at_every_byte(tmp_path):
    path = tmp_path / "j.jsonl"
    content = filled(path)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = max(0, content[:length].count(b"\n") - 1)
        if b"\n" in content[:length]:
            assert read_journal(path, "trial", 1)[1] == RECORDS[:whole]
        else:
            with pytest.raises(ResultFileError, match="ends within its first line"):
                read_journal(path, "trial", 1)
        with opened(path) as journal:
            assert journal.records == RECORDS[:whole], length
            for record in RECORDS[whole:]:
                journal.append(record)
        assert path.read_bytes() == content, length


def test_a_broken_last_line_is_cut_off_though_it_has_an_end(tmp_path):
    path = tmp_path / "j.jsonl"
    content = filled(path)
    path.write_bytes(content + b"\0\0\0\n")
    assert read_journal(path, "trial", 1)[1] == RECORDS
    with opened(path) as journal:
        assert journal.records == RECORDS
    assert path.read_bytes() == content


@pytest.mark.parametrize("broken", [b'{"case": ', b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_line_in_the_middle_is_told_by_its_number(tmp_path, broken):
    path = tmp_path / "j.jsonl"
    lines = filled(path).split(b"\n")
    lines[2] = broken
    path.write_bytes(b"\n".join(lines))
    for use in (opened, lambda path: read_journal(path, "trial", 1)):
        with pytest.raises(ResultFileError, match="line 3 of"):
            use(path)
    assert path.read_bytes() == b"\n".join(lines)


WRITER = """
import sys
from errata.base.journal import Journal
with Journal.open(sys.argv[1], "trial", 1, {"seed": 0}) as journal:
    for number in range(len(journal.records), 10**9):
        journal.append({"number": number, "text": "x" * (number % 7000)})
        print(number, flush=True)
"""


def test_killed_at_any_moment_it_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "j.jsonl"
    rng = random.Random(0)
    before = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        said = process.stdout.read().split()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        _, records = read_journal(path, "trial", 1)
        assert [record["number"] for record in records] == list(range(len(records)))
        assert len(records) > max([before, *map(int, said)])
        before = len(records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now is 1"),
        ({"config": {"layer": 5, "key": "consistent"}}, "config.layer was 4, now is 5"),
        ({"model": "a" * 500}, 'model was "atlas", now is "aaaa'),
        ({"extra": [1]}, r"extra was not given, now is \[1\]"),
    ],
)
def test_another_header_is_refused_by_what_differs(tmp_path, change, message):
    path = tmp_path / "j.jsonl"
    content = filled(path)
    with pytest.raises(ResultFileError, match=message) as caught:
        opened(path, {**HEADER, **change})
    assert "another file" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert path.read_bytes() == content
    with opened(path, {**HEADER, **change}, ignore=change) as journal:
        assert journal.records == RECORDS


def test_headers_are_compared_as_json(tmp_path):
    opened(tmp_path / "j.jsonl", {"layers": (1, 2)}).close()
    opened(tmp_path / "j.jsonl", {"layers": [1, 2]}).close()


def test_other_files_are_left_alone(tmp_path):
    path = tmp_path / "j.jsonl"
    foreign = [
        (b"hello", "not written by errata"),
        (b"hello\n", "not written by errata"),
        (b"hello\nyou\n", "not written by errata"),
        (b'{"case": 1}\n', "not written by errata"),
        (b'{"kind": "other", "version": 1}\n', "holds 'other', not 'trial'"),
        (b'{"kind": "trial", "version": 2}\n', "format 2"),
        (b'{"kind": "trial", "version": "1"}\n', "not written by errata"),
    ]
    for content, message in foreign:
        path.write_bytes(content)
        with pytest.raises(ResultFileError, match=message):
            opened(path)
        with pytest.raises(ResultFileError, match=message):
            read_journal(path, "trial", 1)
        assert path.read_bytes() == content
    with pytest.raises(ResultFileError, match="there is no file"):
        read_journal(tmp_path / "none.jsonl", "trial", 1)


def test_an_older_format_is_read_but_not_gone_on_with(tmp_path):
    filled(tmp_path / "j.jsonl")
    assert read_journal(tmp_path / "j.jsonl", "trial", 2)[0]["version"] == 1
    with pytest.raises(ResultFileError, match="format 1"):
        Journal.open(tmp_path / "j.jsonl", "trial", 2, HEADER)


@pytest.mark.skipif(module.fcntl is None, reason="no locks here")
def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    with opened(path) as journal:
        with pytest.raises(OutputError, match="another process"):
            opened(path)
        journal.append({"case": 0})
        assert read_journal(path, "trial", 1)[1] == [{"case": 0}]
    opened(path).close()


def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    with opened(path) as journal:
        journal.append({"case": 0})
        content = path.read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            journal.append({"p": math.nan})
        write = os.write
        with monkeypatch.context() as patch:  # a disk that is full
            patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
            with pytest.raises(OutputError, match="No space left"):
                journal.append({"case": 1})
        assert path.read_bytes() == content
        journal.append({"case": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [{"case": 0}, {"case": 1}]
    with pytest.raises(OutputError, match="closed"):
        journal.append({"case": 2})


@pytest.mark.parametrize("place", [".", "/proc/none/j.jsonl", "/dev/null", "a\0b"])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        opened(place)
