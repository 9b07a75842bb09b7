"""The published data sets: their addresses, checksums and licences.

Sizes and digests are those of the files as they are served; where one is None it is not known, and a fetched file is
judged by whether it can be read, with as many records as it should have. Addresses are those in the code of ROME's
authors (`dsets/` of github.com/kmeng01/rome), which is under the MIT licence; the sets come without a licence of their
own, so `licence` tells what is known of each.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from errata.base.errors import ConfigError

_HOST = "https://rome.baulab.info/data/dsets"
_ROME = "K. Meng, D. Bau, A. Andonian, Y. Belinkov: Locating and Editing Factual Associations in GPT. NeurIPS 2022"
_ZSRE = (
    "O. Levy, M. Seo, E. Choi, L. Zettlemoyer: Zero-Shot Relation Extraction via Reading Comprehension. CoNLL 2017; "
    "E. Mitchell, C. Lin, A. Bosselut, C. Finn, C. D. Manning: Fast Model Editing at Scale. ICLR 2022"
)
_STATED = "none stated; its authors' code is MIT, the facts are Wikidata's (CC0)"
_WIKIPEDIA = "none stated; its authors' code is MIT, the texts are Wikipedia's (CC BY-SA)"
_QUESTIONS = "none stated; made from zsRE, and from Natural Questions (CC BY-SA 3.0)"


@dataclass(frozen=True)
class Source:
    """A published file.

    Attributes:
        name: its name in errata.
        file: its name on disk.
        what: a short description.
        schema: its format: "records", "facts", "snippets", "vocabulary" or "array".
        licence: its licence, as far as known.
        citation: the paper to cite.
        size: bytes, if known.
        sha256: in hex, if known.
        count: number of records or facts, bad ones included, if known.
        host: address of its folder.
    """

    name: str
    file: str
    what: str
    schema: str
    licence: str
    citation: str
    size: int | None = None
    sha256: str | None = None
    count: int | None = None
    host: str = _HOST

    @property
    def url(self) -> str:
        """Address of the file."""
        return f"{self.host}/{self.file}"


SOURCES = {
    source.name: source
    for source in (
        Source(
            "counterfact",
            "counterfact.json",
            "CounterFact, 21,919 records",
            "records",
            _STATED,
            _ROME,
            sha256="d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
            count=21_919,
        ),
        Source(
            "attribute_snippets",
            "attribute_snippets.json",
            "texts about subjects that have CounterFact's new objects, nearly 1 GB",
            "snippets",
            _WIKIPEDIA,
            _ROME,
        ),
        Source("idf", "idf.npy", "inverse document frequencies of those texts' words", "array", _WIKIPEDIA, _ROME),
        Source("tfidf_vocab", "tfidf_vocab.json", "the words that they are of", "vocabulary", _WIKIPEDIA, _ROME),
        Source(
            "known_facts",
            "known_1000.json",
            "1,209 facts that GPT-2 XL was found to know",
            "facts",
            _STATED,
            _ROME,
            sha256="61daca55318bb5260c1e62e133debef9102c7b278bbc7b19dd2ac655543f333a",
            count=1_209,
        ),
        Source(
            "zsre_eval",
            "zsre_mend_eval.json",
            "zsRE in MEND's schema, 19,086 records to measure by",
            "records",
            _QUESTIONS,
            _ZSRE,
            size=8_091_864,
            sha256="8a371d512f8a6ab175db4ef672181d5c0e52da23298cb51e5a2eeea2f89aa9cd",
            count=19_086,
        ),
        Source(
            "zsre_train",
            "zsre_mend_train.json",
            "zsRE in MEND's schema, 163,196 records to train editors on",
            "records",
            _QUESTIONS,
            _ZSRE,
            size=69_136_174,
            sha256="4f3ac245e9c0baaf633f9e6cb765ffa8e83d594a74520a6cc3539497328c0722",
            count=163_196,
        ),
    )
}


def source(name: str) -> Source:
    """The source with this name.

    Raises:
        ConfigError: if there is none; the message names the nearest.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(SOURCES)}"
        raise ConfigError(f"there is no published set {name!r}: {advice}")
    return SOURCES[name]
