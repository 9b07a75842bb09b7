"""Fetching, from a server of our own: whole, interrupted, changed in between, damaged, and not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess

import numpy as np
import pytest

from errata.base.errors import ConfigError, OutputError, ResultFileError
from errata.data.sources import SOURCES, source
from errata.tasks.fetching import NotFetched, fetch, place, state
from helpers.entries import NESTED, numbered
from helpers.web import CONTENT, of


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(server, tmp_path):
    wanted = of(server, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    seen = []
    assert state(wanted, tmp_path) == "absent"
    path = fetch(wanted, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "new" / "counterfact.json"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert names(path.parent) == ["counterfact.json", "counterfact.json.sha256"]
    assert state(wanted, path.parent) == "here"
    assert fetch(wanted, path.parent) == path
    assert server.ranges == [None]
    check = ["sha256sum", "-c", "counterfact.json.sha256"]
    assert subprocess.run(check, cwd=path.parent, capture_output=True, check=False).returncode == 0


def test_the_cache_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path))
    assert fetch(of(server)) == place(of(server)) == tmp_path / "data" / "counterfact.json"


def test_a_lost_connection_is_gone_on_with(server, tmp_path):
    server.stops = [1000, 5000]
    assert fetch(of(server, count=300), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=6000-"]


def test_a_stopped_call_is_gone_on_with_by_the_next(server, tmp_path):
    server.stops = [7000, 0]
    with pytest.raises(NotFetched, match="7,000 bytes") as raised:
        fetch(of(server), tmp_path)
    assert server.host in str(raised.value)
    assert str(tmp_path / "counterfact.json") in str(raised.value)
    assert state(of(server), tmp_path) == "unfinished"
    assert fetch(of(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=7000-"
    assert names(tmp_path) == ["counterfact.json", "counterfact.json.sha256"]


def test_what_changed_in_between_is_begun_anew(server, tmp_path):
    server.stops = [7000, 0]
    with pytest.raises(NotFetched):
        fetch(of(server), tmp_path)
    server.content, server.version = json.dumps(numbered(NESTED, 200)[::-1]).encode(), '"v2"'
    assert fetch(of(server, count=200), tmp_path).read_bytes() == server.content


def test_without_a_version_nothing_is_gone_on_with(server, tmp_path):
    server.version, server.stops = "", [7000, 0]
    with pytest.raises(NotFetched):
        fetch(of(server), tmp_path)
    assert fetch(of(server), tmp_path).read_bytes() == CONTENT
    assert set(server.ranges) == {None}


def test_a_part_that_is_whole_or_too_long(server, tmp_path):
    server.stops = [7000, 0]
    with pytest.raises(NotFetched):
        fetch(of(server), tmp_path)
    (tmp_path / "counterfact.part.json").write_bytes(CONTENT)
    assert fetch(of(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={len(CONTENT)}-"
    other = tmp_path / "other"
    server.stops = [7000, 0]
    with pytest.raises(NotFetched):
        fetch(of(server), other)
    (other / "counterfact.part.json").write_bytes(CONTENT + b"more")
    assert fetch(of(server), other).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fields", "content", "reason"),
    [
        ({"sha256": "0" * 64}, CONTENT, "its sha256 is"),
        ({"size": 5}, CONTENT, "and counterfact.json has 5"),
        ({"count": 21_919}, CONTENT, "300 entries, and counterfact.json has 21,919"),
        ({}, b"<html>Sign in to the network</html>", "is no counterfact.json: .*not JSON"),
        ({"schema": "snippets"}, CONTENT, "is no counterfact.json"),
        ({"schema": "facts"}, b"[]", "is no counterfact.json"),
        ({"schema": "vocabulary"}, b'{"a": "b"}', "a number for each word"),
        ({"schema": "array", "file": "idf.npy"}, b"\x93NUMPY", "array of numbers"),
        ({"schema": "array", "file": "idf.npy"}, b"", "array of numbers"),
    ],
)
def test_what_came_is_checked(server, tmp_path, fields, content, reason):
    server.content = content
    with pytest.raises(ResultFileError, match=reason):
        fetch(of(server, **fields), tmp_path)
    assert not (tmp_path / of(server, **fields).file).exists()
    assert state(of(server, **fields), tmp_path) == "absent"


def test_the_other_schemas(server, tmp_path):
    array = io.BytesIO()
    np.save(array, np.ones(3))
    server.content = array.getvalue()
    assert fetch(of(server, schema="array", file="idf.npy", count=3), tmp_path).is_file()
    server.content = b'{"a": 0, "b": 1}'
    assert fetch(of(server, schema="vocabulary", file="tfidf_vocab.json", count=2), tmp_path).is_file()
    server.content = b'[{"subject": "a", "prompt": "{} is"}]'
    assert fetch(of(server, schema="facts", file="known_1000.json", count=1), tmp_path).is_file()


def test_a_later_change_is_noticed(server, tmp_path):
    path = fetch(of(server), tmp_path)
    path.write_bytes(CONTENT + b"\n")
    assert state(of(server), tmp_path) == "changed"
    with pytest.raises(ResultFileError, match="not what was fetched any more"):
        fetch(of(server), tmp_path)
    assert path.exists()
    (tmp_path / "counterfact.json.sha256").unlink()
    assert fetch(of(server), tmp_path) == path
    assert state(of(server), tmp_path) == "here"


def test_a_file_put_there_by_hand_is_checked(server, tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_bytes(b"[]")
    with pytest.raises(ResultFileError, match="empty list"):
        fetch(of(server), tmp_path)
    assert path.exists()
    path.write_bytes(CONTENT)
    assert fetch(of(server), tmp_path) == path
    assert server.ranges == []


def test_no_server_no_file_no_place(server, tmp_path):
    server.status = 404
    with pytest.raises(NotFetched, match="404"):
        fetch(of(server), tmp_path)
    with pytest.raises(NotFetched, match=r"could not fetch http://127\.0\.0\.1:9/counterfact\.json") as raised:
        fetch(dataclasses.replace(of(server), host="http://127.0.0.1:9"), tmp_path)
    assert f"put it at {tmp_path / 'counterfact.json'}" in str(raised.value)
    assert "\n" not in str(raised.value)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        fetch(of(server), tmp_path / "file")


def test_the_table():
    assert [source(name).url for name in ("counterfact", "idf")] == [
        "https://rome.baulab.info/data/dsets/counterfact.json",
        "https://rome.baulab.info/data/dsets/idf.npy",
    ]
    with pytest.raises(ConfigError, match="did you mean 'counterfact'"):
        source("counterfacts")
    with pytest.raises(ConfigError, match="choose from"):
        source("?")
    for each in SOURCES.values():
        assert each.licence
        assert each.citation
        assert each.sha256 is None or len(each.sha256) == 64
