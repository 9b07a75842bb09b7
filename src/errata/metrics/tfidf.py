"""RS, the reference score: similarity of a model's texts about a subject to reference texts about the new object.

It is the cosine of the TF-IDF vectors of all generated texts joined and of all reference texts joined, as in
scikit-learn with its defaults: single words of two letters or more in lower case, counts times IDF, length 1. IDF comes
from texts like Wikipedia's: fitted here, or read from the pair of files that ROME's authors published.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errata.base.arrays import read_array
from errata.base.errors import ConfigError
from errata.base.extras import needed
from errata.base.files import content
from errata.base.parsing import load_json, of_type, taking_apart
from errata.metrics.text import require_list

IDF_FILE, VOCABULARY_FILE = "idf.npy", "tfidf_vocab.json"


@dataclass(frozen=True, eq=False)
class TfIdf:
    """Vocabulary with inverse document frequencies.

    Attributes:
        vocabulary: the words, each with its place in `idf`.
        idf: inverse document frequencies `[words]`, float64; larger for rarer words.

    Raises:
        ConfigError: if the places are not 0, 1, 2, …, or the frequencies not as many positive finite numbers.
    """

    vocabulary: Mapping[str, int]
    idf: NDArray[np.float64]

    def __post_init__(self) -> None:
        places = self.vocabulary.values()
        if not places or any(type(place) is not int for place in places) or set(places) != set(range(len(places))):
            raise ConfigError("a vocabulary gives each word a place of its own: 0, 1, 2, … without a gap")
        if self.idf.shape != (len(places),):
            raise ConfigError(f"there are {len(places)} words, and IDF of shape {self.idf.shape}: one each is needed")
        if self.idf.dtype.kind != "f" or not (np.isfinite(self.idf) & (self.idf > 0)).all():
            raise ConfigError("IDF must be positive finite numbers, all of them")

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TfIdf:
        """Vocabulary and IDF from texts.

        Raises:
            ConfigError: if no text has a word of two letters or more.
            FactError: if `texts` is one text, not a list.
            MissingExtra: if scikit-learn is not installed.
        """
        vectors, texts = _vectorizer(), require_list(texts)
        try:
            vectors.fit(texts)
        except ValueError as error:
            raise ConfigError(f"no TF-IDF can be made of these {len(texts)} texts: {error}") from error
        places = {word: int(place) for word, place in vectors.vocabulary_.items()}
        return cls(dict(sorted(places.items(), key=lambda item: item[1])), vectors.idf_.astype(np.float64))

    @classmethod
    def load(cls, folder: str | Path) -> TfIdf:
        """The published pair of files, `idf.npy` and `tfidf_vocab.json`.

        Raises:
            ResultFileError: if one is missing or broken, or they do not belong together.
        """
        folder = Path(folder)
        what = f"a folder with a whole pair of {IDF_FILE} and {VOCABULARY_FILE}"
        with taking_apart(folder, what, advice="Fetch both again, or name the folder that they are in"):
            if missing := [name for name in (IDF_FILE, VOCABULARY_FILE) if not (folder / name).is_file()]:
                raise ConfigError(f"there is no {missing[0]}")
            idf = read_array(folder / IDF_FILE)
            vocabulary = of_type(load_json(content(folder / VOCABULARY_FILE, "words")), dict[str, int])
            return cls(vocabulary, idf.astype(np.float64) if idf.dtype.kind == "f" else idf)

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of the words, in order, and their frequencies."""
        words = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        return hashlib.sha256(json.dumps(words).encode() + self.idf.astype("<f8").tobytes()).hexdigest()

    def similarity(self, one: str, other: str) -> float:
        """Cosine of two texts, from 0 to 1; 0 if one of them has no word of the vocabulary.

        Raises:
            MissingExtra: if scikit-learn is not installed.
        """
        first, second = self._vectors.transform([one, other])
        return float(first.multiply(second).sum())

    def reference_score(self, generated: Sequence[str], references: Sequence[str]) -> float:
        """RS: cosine of all generated texts joined by spaces, and all references; NaN if there are none of either.

        Raises:
            FactError: if either is one text, not a list.
            MissingExtra: if scikit-learn is not installed.
        """
        if not require_list(generated) or not require_list(references):
            return math.nan
        return self.similarity(" ".join(generated), " ".join(references))

    @cached_property
    def _vectors(self) -> Any:
        vectors = _vectorizer(vocabulary=dict(self.vocabulary))
        vectors.idf_ = self.idf
        return vectors


def _vectorizer(**settings: Any) -> Any:
    return needed("sklearn.feature_extraction.text", "evaluation").TfidfVectorizer(**settings)
