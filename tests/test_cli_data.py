"""`errata data` as a user has it."""

from __future__ import annotations

import json

import pytest

from errata.data import sources
from helpers.command_line import refused
from helpers.entries import FLAT, NESTED, ZSRE, changed, write
from helpers.web import CONTENT, of
from samples import sample


@pytest.fixture
def run(errata, monkeypatch, tmp_path):
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))
    return lambda *arguments: errata("data", *arguments)


def test_describe(run, tmp_path):
    done = run("describe", write(tmp_path, [NESTED]))
    assert (done.returncode, done.stderr) == (0, "")
    assert "counterfact; relations: 1" in " ".join(done.stdout.split())
    assert "neighborhood prompts" in done.stdout
    done = run("describe", write(tmp_path, [NESTED]), "--json")
    said = json.loads(done.stdout)
    assert (said["kind"], said["records"], said["bad"], said["relations"]) == ("counterfact", 1, [], 1)
    assert {each["name"]: each["total"] for each in said["items"]}["neighborhood prompts"] == 2
    write(tmp_path, [ZSRE], "zsre.json")
    assert "zsre; relations: none named" in " ".join(run("describe", tmp_path).stdout.split())


@pytest.mark.parametrize("name", ["counterfact_nested", "counterfact_flat", "zsre", "known_facts"])
def test_describe_samples(run, name):
    done = run("describe", sample(name), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["records"] == {"counterfact_nested": 150, "zsre": 100}.get(name, 200)


def test_describe_tells_bad_records(run, tmp_path):
    path = write(tmp_path, [FLAT, changed(FLAT, case_id=8, subject="Rome"), changed(FLAT, case_id=9)])
    done = run("describe", path, "--json")
    assert done.returncode == 1
    assert f"{path}, entry 2: the prompt" in done.stderr
    assert "left out: 1 of 3" in done.stderr
    said = json.loads(done.stdout)
    assert said["records"] == 2
    assert said["bad"][0]["entry"] == 2
    facts = tmp_path / "facts.csv"
    facts.write_text("subject,prompt\na,{} is\n,{} is\n")
    done = run("describe", facts)
    assert done.returncode == 1
    assert f"{facts}, line 3: the subject is empty" in done.stderr


def test_describe_refuses(run, tmp_path):
    refused(run("describe", tmp_path / "none.json"), "there is no file")
    refused(run("describe", tmp_path), "none of counterfact.json")
    refused(run("describe", write(tmp_path, b"[{", "a.json")), "not JSON")
    refused(run("describe", write(tmp_path, b'{"the": 1}', "a.json")), "looks like a vocabulary")
    refused(run("describe", write(tmp_path, b"\x01\x02", "a.safetensors")), "by its ending")


def test_get_and_list(run, tmp_path, server, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", {"counterfact": of(server, licence="as known", citation="the paper")})
    done = run("list", "--json")
    assert [each["state"] for each in json.loads(done.stdout)["files"]] == ["absent"]
    done = run("get", "counterfact")
    assert (done.returncode, done.stderr) == (0, "")
    assert "as known" in done.stdout
    assert "the paper" in done.stdout
    path = tmp_path / "home" / "data" / "counterfact.json"
    assert path.read_bytes() == CONTENT
    said = json.loads(run("list", "--json").stdout)["files"][0]
    assert (said["state"], said["path"], said["url"]) == ("here", str(path), f"{server.host}/counterfact.json")
    path.write_bytes(b"[]")
    listed = run("list")
    assert "changed" in listed.stdout
    assert "not what was fetched any more" in listed.stdout
    done = run("get", "counterfact", "--folder", tmp_path / "here", "--json")
    assert json.loads(done.stdout)["files"][0]["path"] == str(tmp_path / "here" / "counterfact.json")


def test_get_refuses(run, tmp_path, server, monkeypatch):
    refused(run("get", "counterfct"), "did you mean 'counterfact'")
    server.status = 503
    monkeypatch.setattr(sources, "SOURCES", {"counterfact": of(server)})
    refused(run("get", "counterfact", "--folder", tmp_path), f"{server.host}/counterfact.json")


def test_list_names_all(run):
    done = run("list", "--json")
    files = json.loads(done.stdout)["files"]
    assert [each["name"] for each in files] == list(sources.SOURCES)
    assert all(each["state"] == "absent" for each in files)
    assert "CC BY-SA" in run("list").stdout
