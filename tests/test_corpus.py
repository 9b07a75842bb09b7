"""Texts from files, folders, Parquet and streamed datasets: what is read, what pins it, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from errata.base.errors import ConfigError, MissingExtra
from errata.statistics import Corpus, readers
from errata.statistics.corpus import WIKIPEDIA_REVISION

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(path: Path, columns: dict) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_a_corpus_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("One line\nand its next.\n\n\n  \nAnother é.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Third."}\n\n{"text": "Fourth.", "id": 1}\n{"text": null}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Fifth."}'))
    parquet(tmp_path / "d.parquet", {"id": [1, 2, 3], "text": ["Sixth.", None, "Seventh."]})
    names = ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet")
    corpus = Corpus.from_files(*(tmp_path / name for name in names))
    wanted = ["One line\nand its next.", "Another é.", "Third.", "Fourth.", "Fifth.", "Sixth.", "Seventh."]
    assert list(corpus) == wanted
    assert list(corpus) == wanted  # again
    assert corpus.name == ", ".join(names)
    same = Corpus.from_files(*(tmp_path / name for name in names), name="mine")
    assert same.digest == corpus.digest
    (tmp_path / "a.txt").write_text("Else.")
    assert Corpus.from_files(tmp_path / "a.txt").digest != corpus.digest
    assert Corpus.of(["ab"]).digest != Corpus.of(["a", "b"]).digest


def test_a_folder_is_read_by_name_and_to_the_bottom(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_text("last")
    (folder / "b" / "x.jsonl").write_text('{"text": "second"}')
    (folder / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (folder / "notes.md").write_text("not read")
    corpus = Corpus.open(folder)
    assert list(corpus) == ["first", "second", "last"]
    assert corpus.name == "texts"
    assert Corpus.open(str(folder)).digest == corpus.digest


def test_a_named_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}')
    parquet(tmp_path / "b.parquet", {"text": ["no"], "body": ["also"]})
    corpus = Corpus.from_files(tmp_path / "a.jsonl", tmp_path / "b.parquet", field="body")
    assert list(corpus) == ["yes", "also"]
    assert corpus.digest != Corpus.from_files(tmp_path / "a.jsonl", tmp_path / "b.parquet").digest


def test_texts_without_an_end_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_TEXT", 10)
    (tmp_path / "a.txt").write_text("x" * 25 + "\nabc\ndef\nghijkl\n\nend")
    texts = list(Corpus.open(tmp_path / "a.txt"))
    assert max(map(len, texts)) <= 10
    assert "".join(texts).replace("\n", "") == "x" * 25 + "abcdefghijklend"
    monkeypatch.setattr(readers, "_LONGEST_LINE", 30)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 40 + '"}\n')
    with pytest.raises(ConfigError, match="line 2: longer"):
        list(Corpus.open(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"x", "of no type"),
        ("a.txt", None, "no file"),
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.txt", b"\0\1\2", "not text"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1}', "line 2.*txt"),
        ("a.jsonl", b'{"text": 1}', "is not text"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.txt.gz", b"plain", "compression"),
        ("a.txt.gz", gzip.compress(b"cut short" * 1000, mtime=0)[:-9], "compression"),
        ("a.parquet", b"PAR1", "not a whole Parquet"),
    ],
)
def test_files_that_are_no_corpus(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        list(Corpus.from_files(path))
    assert "\n" not in str(caught.value)


def test_parquet_without_the_field_or_without_text(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [7]})
    with pytest.raises(ConfigError, match=r'no column "text".*body, id'):
        list(Corpus.open(path))
    with pytest.raises(ConfigError, match='row 1: the field "id" is not text'):
        list(Corpus.open(path, field="id"))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"errata-lm\[tables\]"):
        list(Corpus.open(path))


def test_a_corpus_needs_texts(tmp_path):
    with pytest.raises(ConfigError, match="at least one file"):
        Corpus.from_files()
    with pytest.raises(ConfigError, match="holds no texts"):
        Corpus.open(tmp_path)
    with pytest.raises(ConfigError, match="one string"):
        Corpus.of("abc")
    with pytest.raises(ConfigError, match="int"):
        Corpus.of(["a", 1])


def test_shards_share_nothing_and_leave_nothing_out():
    corpus = Corpus.of([str(i) for i in range(7)], "seven")
    parts = [corpus.shard(i, 3) for i in (1, 2, 3)]
    assert list(parts[0]) == ["0", "3", "6"]
    assert sorted(text for part in parts for text in part) == sorted(corpus)
    assert len({corpus.digest, *(part.digest for part in parts)}) == 4
    assert parts[1].name == "seven[2/3]"
    for index, of in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(ConfigError, match="counted from 1"):
            corpus.shard(index, of)


# ---- datasets of the hub ----


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: what was asked of it, and a real streamed dataset in return."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return datasets.Dataset.from_dict({"text": ["Aa.", "Bb."], "body": ["c", None]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikipedia_is_pinned_and_streamed(hub):
    corpus = Corpus.open("wikipedia", download=True)
    assert hub == []  # known before anything is fetched
    assert list(corpus) == ["Aa.", "Bb."]
    names, settings = hub[0]
    assert names == ("wikimedia/wikipedia", "20231101.en")
    assert settings == {"split": "train", "revision": WIKIPEDIA_REVISION, "streaming": True}
    assert corpus.name == "wikimedia/wikipedia:20231101.en@b04c8d1c"


def test_a_dataset_is_known_by_all_that_pins_it(hub):
    corpus = Corpus.open("hf:owner/name:en:test", revision=COMMIT, field="body", download=True)
    assert list(corpus) == ["c"]
    assert hub[0] == (("owner/name", "en"), {"split": "test", "revision": COMMIT, "streaming": True})
    others = [
        Corpus.open("owner/name:en:test", revision=COMMIT),
        Corpus.open("owner/name:en", revision=COMMIT, field="body"),
        Corpus.open("owner/name::test", revision=COMMIT, field="body"),
        Corpus.open("owner/name:en:test", revision=COMMIT[::-1], field="body"),
    ]
    assert len({corpus.digest, *(other.digest for other in others)}) == 5
    assert Corpus.open("owner/name:en:test", revision=COMMIT, field="body").digest == corpus.digest
    with pytest.raises(ConfigError, match=r'row 1: .*field "title".*text, body'):
        list(Corpus.open("hf:name", revision=COMMIT, field="title", download=True))


def test_nothing_is_fetched_unasked(hub):
    with pytest.raises(ConfigError, match="--download"):
        list(Corpus.open("wikipedia"))
    assert hub == []


def test_without_a_connection_it_is_one_line():
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="cannot be read from the hub") as caught:
        list(Corpus.open("wikipedia", download=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "settings", "says"),
    [
        ("texts/none.txt", {}, "no file or folder"),
        ("nowhere", {}, "hf:NAME"),
        ("a/b/c", {"revision": COMMIT}, "not an id of a dataset"),
        ("owner/name", {}, "revision that cannot move"),
        ("owner/name", {"revision": "main"}, "revision that cannot move"),
        ("wikipedia", {"revision": "v1"}, "revision that cannot move"),
        (".", {"revision": COMMIT}, "has no revision"),
    ],
)
def test_what_names_no_corpus(tmp_path, monkeypatch, what, settings, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        Corpus.open(what, **settings)


def test_a_path_that_exists_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/a.jsonl").write_text(json.dumps({"text": "here"}))
    assert list(Corpus.open("owner/name")) == ["here"]
