"""Corpora: texts for statistics, with a name and a digest that identifies them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base.errors import ConfigError, ErrataError
from errata.base.extras import needed
from errata.base.files import expanded, resolved
from errata.statistics.readers import FIELD, TYPES, read_texts, text_of, type_of

WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
# The commit that "wikipedia" stands for, so that it is the same text for everyone.
WIKIPEDIA_REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"


@dataclass(frozen=True)
class Corpus:
    """Texts that can be read repeatedly, in a fixed order.

    Attributes:
        name: its name.
        digest: sha256, in hex, of its content, or of what pins its content.
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
            ConfigError: if it is one string, whose letters would be the texts, or something in it is not text.
        """
        if isinstance(texts, str):
            raise ConfigError("texts is one string, whose letters would be the texts: put it in a list")
        kept = tuple(map(require_text, texts))
        digest = TextDigest()
        for text in kept:
            digest.add(text)
        return cls(name, digest.hex, lambda: kept)

    @classmethod
    def open(
        cls, what: str | Path, *, field: str = FIELD, revision: str | None = None, download: bool = False
    ) -> Corpus:
        """Open a corpus by name: a path, "wikipedia", or a dataset on the Hugging Face hub.

        A path that exists is a file or a folder, as for `from_files`. Anything else is a dataset, `[hf:]ID`,
        `[hf:]ID:CONFIG` or `[hf:]ID:CONFIG:SPLIT` (of the split "train" unless named), which is streamed: no more of
        it is fetched than is read.

        Args:
            what: such as "texts/", "notes.jsonl", "wikipedia" or "hf:owner/name:en".
            field: of JSON lines, Parquet and datasets, the field that holds the text.
            revision: the commit (40 hex digits) of a dataset. "wikipedia" has one; others need one, since a branch
                or a tag can move, and statistics would say that they are of the same text.
            download: whether a dataset may be fetched. Without, only reading it fails: statistics that were
                collected over it before can still be found by its digest.

        Raises:
            ConfigError: if there is no such file, or a dataset has no revision.
        """
        path = expanded(what)
        name = str(what).removeprefix("hf:")
        if name == str(what) and path.exists():
            if revision:
                raise ConfigError(f"{what} is on this machine and has no revision: leave --revision out")
            return cls.from_files(path, field=field)
        if name == "wikipedia":
            name, revision = WIKIPEDIA, revision or WIKIPEDIA_REVISION
        parts = name.split(":")
        if type_of(path) or len(parts) > 3 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", parts[0]):
            raise ConfigError(f"there is no file or folder {what}, and it is not an id of a dataset: OWNER/NAME:CONFIG")
        if name == str(what) and "/" not in parts[0]:
            raise ConfigError(
                f"there is no file or folder {what}. Name one, 'wikipedia', or a dataset as OWNER/NAME or hf:NAME"
            )
        if not revision or not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ConfigError(
                f"there is no file or folder {what}, and as a dataset it needs a revision that cannot move: give the "
                "commit (40 hex digits), as its page on the hub shows under 'Files and versions'"
            )
        dataset, config, split = parts[0], *(parts[1:] + [""] * 2)[:2]
        return _dataset(dataset, config or None, split or "train", revision, field, download)

    @classmethod
    def from_files(cls, *paths: str | Path, name: str | None = None, field: str = FIELD) -> Corpus:
        """A corpus of files, or of all files of these types in folders, by name.

        In .txt, texts are parted by empty lines, and one of more than a million characters is several; in .jsonl
        and .parquet, each line or row has a field that holds a text (a null is none). .txt and .jsonl may be
        compressed (.gz). Files are read as a stream, never whole.

        Raises:
            ConfigError: if a file is missing, of another type, not text, or lacks the field (while reading).
            MissingExtra: if a .parquet needs pyarrow, which is not installed (while reading).
        """
        files = tuple(file for path in paths for file in _files(expanded(path)))
        if not files:
            raise ConfigError(f"a corpus needs at least one file of texts: give {', '.join(TYPES)}")
        digest = hashlib.sha256()
        for path in files:
            digest.update(_sha256_of_file(path))
        if field != FIELD:
            digest.update(field.encode())
        return cls(
            name or ", ".join(resolved(path).name for path in paths),
            digest.hexdigest(),
            lambda: (text for path in files for text in read_texts(path, field)),
        )

    def shard(self, index: int, of: int) -> Corpus:
        """Every `of`-th text from the `index`-th on, counted from 1, so that the shards together have each text once.

        Raises:
            ConfigError: if there is no such part.
        """
        if not 1 <= index <= of:
            raise ConfigError(f"there is no part {index} of {of}: parts are counted from 1")
        digest = hashlib.sha256(f"{self.digest} {index}/{of}".encode()).hexdigest()
        return Corpus(f"{self.name}[{index}/{of}]", digest, lambda: itertools.islice(self, index - 1, None, of))


class TextDigest:
    """sha256 over a sequence of texts, which keeps ["ab"] and ["a", "b"] apart."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        """Add the next text."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._digest.update(len(encoded).to_bytes(8, "big") + encoded)

    @property
    def hex(self) -> str:
        """The digest of the texts so far."""
        return self._digest.hexdigest()


def require_text(text: Any) -> str:
    """The text itself.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a corpus is of texts, and there is a {type(text).__name__} in it: give strings")
    return text


def _files(path: Path) -> list[Path]:
    """A file that texts are read from, or all of a folder."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and type_of(file))
        if not found:
            raise ConfigError(f"the folder {path} holds no texts: put files of {', '.join(TYPES)} in it")
        return found
    if not path.is_file():
        raise ConfigError(f"there is no file {path} to read texts from. Give the path of {', '.join(TYPES)}")
    if not type_of(path):
        raise ConfigError(f"{path} is of no type that texts are read from: {', '.join(TYPES)}")
    return [path]


def _sha256_of_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _dataset(dataset: str, config: str | None, split: str, revision: str, field: str, download: bool) -> Corpus:
    """A corpus that is streamed from the hub, known by what pins it."""
    name = ":".join(filter(None, (dataset, config, "" if split == "train" else split))) + f"@{revision[:8]}"
    digest = hashlib.sha256(json.dumps([dataset, config, split, revision, field]).encode()).hexdigest()

    def texts() -> Iterator[str]:
        if not download:
            raise ConfigError(
                f"{name} would be fetched from the hub, and nothing is fetched unasked: say download=True "
                "(--download), or give a file of texts"
            )
        library = needed("datasets", "datasets")
        try:
            rows = library.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
            for number, row in enumerate(rows, start=1):
                text = text_of(row, field, f"{name}, row {number}")
                if text is not None:
                    yield text
        except ErrataError:
            raise
        except Exception as error:  # of the hub, the network and the formats, in all classes and lengths
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
            raise ConfigError(
                f"{name} cannot be read from the hub ({reason}). Check its name and your connection, or give a file"
            ) from error

    return Corpus(name, digest, texts)
