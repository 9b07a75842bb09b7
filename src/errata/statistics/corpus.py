"""Texts to collect statistics over, with a name and a digest by which statistics say what they are of."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from errata.base.errors import ConfigError

TYPES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Corpus:
    """Texts that can be read again and again, in a fixed order.

    Attributes:
        name: what to call it.
        digest: sha256, in hex, of its content.
        texts: a function that gives a fresh iterator over the texts.
    """

    name: str
    digest: str
    texts: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts())

    @classmethod
    def of(cls, texts: Iterable[str], name: str = "texts") -> Corpus:
        """A corpus of texts in memory.

        Raises:
            ConfigError: if it is one string, whose letters would be the texts.
        """
        if isinstance(texts, str):
            raise ConfigError("texts is one string, whose letters would be the texts: put it in a list")
        kept = tuple(texts)
        digest = TextDigest()
        for text in kept:
            digest.add(text)
        return cls(name, digest.hex, lambda: kept)

    @classmethod
    def from_files(cls, *paths: str | Path, name: str | None = None) -> Corpus:
        """A corpus of files: in .txt, texts are parted by empty lines; in .jsonl, each line has a field
        "text".

        Either may be compressed (.gz). Files are read as a stream, never whole.

        Raises:
            ConfigError: if there is no file, one is of another type, or a line is not what it should be
            (while reading).
        """
        files = tuple(Path(path) for path in paths)
        if not files:
            raise ConfigError("a corpus needs at least one file of texts: give .txt or .jsonl")
        digest = hashlib.sha256()
        for path in files:
            if not path.is_file():
                raise ConfigError(f"there is no file {path} to read texts from. Give the path of a .txt or .jsonl file")
            if not path.name.lower().endswith(TYPES):
                raise ConfigError(f"{path} is of no type that texts are read from: {', '.join(TYPES)}")
            digest.update(_sha256_of_file(path))
        return cls(
            name or ", ".join(path.name for path in files),
            digest.hexdigest(),
            lambda: (text for path in files for text in _texts(path)),
        )


class TextDigest:
    """sha256 over a sequence of texts, which keeps ["ab"] and ["a", "b"] apart."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        """Take in the next text."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._digest.update(len(encoded).to_bytes(8, "big") + encoded)

    @property
    def hex(self) -> str:
        """The digest of the texts so far."""
        return self._digest.hexdigest()


def _sha256_of_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _texts(path: Path) -> Iterator[str]:
    name = path.name.lower()
    try:
        with gzip.open(path, "rt", encoding="utf-8") if name.endswith(".gz") else path.open(encoding="utf-8") as stream:
            yield from (_records(stream, path) if name.removesuffix(".gz").endswith(".jsonl") else _paragraphs(stream))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"{path} is not text in UTF-8, or its compression is broken: {error}") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines without an empty one between them."""
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).strip()
            held = []
    if held:
        yield "".join(held).strip()


def _records(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}, line {number}: not a JSON object with a field "text"') from error
        if not isinstance(text, str):
            raise ConfigError(f'{path}, line {number}: the field "text" is not text')
        yield text
