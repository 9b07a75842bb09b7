"""Result of causal tracing for one fact: it saves, loads and draws itself.

A file of traces is a journal (`base.journal`): a header line, then one line a trace. One fact's trace is such a file
with one line, so the same code reads one trace or a thousand. Numbers are preserved bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from errata.base.errors import ConfigError, ResultFileError
from errata.base.extras import needed
from errata.base.facts import Fact
from errata.base.journal import read_journal, write_journal
from errata.base.parsing import of_type, taking_apart
from errata.base.roles import current
from errata.base.versions import library_versions

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

ROLES = ("subject_first", "subject_middle", "subject_last", "after_subject", "further", "last")

FORMAT = 2
KIND = "causal traces"


class Origin(TypedDict):
    """Model that a file's numbers were measured on."""

    model: str
    fingerprint: str
    versions: dict[str, str]


class _Settings(TypedDict):
    window: int | None


class _Record(TypedDict):
    """A trace as a line of a file."""

    fact: list[str]
    answer: str
    tokens: list[str]
    subject: Annotated[list[int], Field(min_length=2, max_length=2)]
    known: bool | None
    clean: Annotated[float, Field(ge=0, le=1)]
    corrupted: Annotated[float, Field(ge=0, le=1)]
    restored: dict[str, list[list[float] | None]]
    settings: _Settings


@dataclass(frozen=True, eq=False, repr=False)
class CausalTrace:
    """Result of causal tracing for one fact.

    Attributes:
        fact: the fact that was traced.
        answer: the token, or the whole object, whose probability was traced, as text.
        tokens: the prompt's tokens, readable.
        subject: indexes of the subject's first and last token, both inclusive.
        clean: P[o], a probability.
        corrupted: P*[o], mean over noise samples.
        restored: for each part, P*,clean[o] as float64 `[tokens, layers]`, mean over noise samples; NaN at tokens
            that were not traced.
        settings: noise level, samples, window, seed and all else that decides the numbers.
        model: name of the model.
        known: whether the model's most probable next token begins the fact's object; None where the fact names none.
        fingerprint: digest of the model's weights.
        versions: versions of the libraries that computed it.
    """

    fact: Fact
    answer: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted: float
    restored: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    model: str
    known: bool | None = None
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {'x'.join(map(str, values.shape))}" for part, values in self.restored.items())
        said = f"{self.fact.text!r} -> {self.answer!r}, clean {self.clean:.3g}, corrupted {self.corrupted:.3g}"
        return f"CausalTrace({said}, {sizes}, {self.model})"

    @property
    def total_effect(self) -> float:
        """TE: how much the corruption lowers the answer's probability."""
        return self.clean - self.corrupted

    def indirect_effect(self, part: str = "state") -> np.ndarray:
        """IE of every site of a part, `[tokens, layers]`: how much restoring it raises the answer's probability.

        Raises:
            ConfigError: if the part was not traced.
        """
        if part not in self.restored:
            raise ConfigError(f"{part!r} was not traced; this trace has {', '.join(self.restored)}")
        return self.restored[part] - self.corrupted

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each token, one of `ROLES`, or "before" in front of the subject.

        A one-token subject is *subject_last*, and so is a token that ends both subject and prompt.
        """
        return token_roles(len(self.tokens), *self.subject)

    def best(self, part: str = "state", *, in_subject: bool = True) -> tuple[int, int, float]:
        """Token, layer and indirect effect of the site that restores most.

        By default of the subject's tokens: that is the early site. The late one, the last token's state on its way
        to the head, restores everything by itself and says nothing.

        Raises:
            ConfigError: if none of these tokens was traced.
        """
        effect = self.indirect_effect(part)
        begin, end = (self.subject[0], self.subject[1] + 1) if in_subject else (0, len(self.tokens))
        if np.isnan(effect[begin:end]).all():
            raise ConfigError("none of the subject's tokens was traced, so no site of theirs is the best")
        token, layer = np.unravel_index(int(np.nanargmax(effect[begin:end])), effect[begin:end].shape)
        return begin + int(token), int(layer), float(effect[begin + token, layer])

    def to_frame(self) -> pandas.DataFrame:
        """One row for each site: part, token (index), text, role, layer, restored, indirect_effect.

        Raises:
            MissingExtra: if pandas is not installed.
        """
        rows = [
            (part, token, self.tokens[token], self.roles[token], layer, value, value - self.corrupted)
            for part, values in self.restored.items()
            for token, line in enumerate(values.tolist())
            for layer, value in enumerate(line)
        ]
        columns = ["part", "token", "text", "role", "layer", "restored", "indirect_effect"]
        return needed("pandas", "tables").DataFrame(rows, columns=columns)

    def figure(self) -> Figure:
        """The fact's maps side by side, after Figure 1 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.trace import trace_figure

        return trace_figure(
            self.restored,
            self.tokens,
            self.subject,
            low=self.corrupted,
            high=self.clean,
            answer=self.answer,
            window=self.settings["window"],
        )

    def plot(self, path: str | Path) -> None:
        """Write `figure()` as PNG, SVG or PDF, by the path's ending.

        Raises:
            ConfigError: if the ending is another.
            OutputError: if the file cannot be written.
        """
        from errata.plots.drawing import save

        save(self.figure(), path)

    def save(self, path: str | Path) -> None:
        """Write a file of this one trace atomically.

        Raises:
            OutputError: if the file cannot be written.
        """
        save_traces(path, [self])

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """The trace in a file of one.

        Raises:
            ResultFileError: if the file is missing, cut short, no file of traces, or one of several.
        """
        found = load_traces(path)
        if not found:
            raise ResultFileError(f"{path} holds no whole trace: it was cut short, or its run has not got that far")
        if len(found) != 1:
            raise ResultFileError(f"{path} holds {len(found)} traces, not one: read it by load_traces")
        return found[0]


def token_roles(tokens: int, first: int, last: int) -> tuple[str, ...]:
    """Roles of a prompt's tokens, with the subject at `first` to `last`; see `CausalTrace.roles`."""

    def role(i: int) -> str:
        if i < first:
            return "before"
        if i <= last:
            return "subject_last" if i == last else "subject_first" if i == first else "subject_middle"
        return "last" if i == tokens - 1 else "after_subject" if i == last + 1 else "further"

    return tuple(role(i) for i in range(tokens))


def save_traces(path: str | Path, traces: Iterable[CausalTrace]) -> None:
    """Write traces of one model to a file atomically.

    Raises:
        ConfigError: if there are none, or they are of different models.
        OutputError: if the file cannot be written.
    """
    traces = list(traces)
    if len({(trace.model, trace.fingerprint) for trace in traces}) != 1:
        raise ConfigError("a file holds traces of one model, and at least one of them: give each model its own")
    first = traces[0]
    header = {"model": first.model, "fingerprint": first.fingerprint, "versions": dict(first.versions)}
    write_journal(path, KIND, FORMAT, header, [as_record(trace) for trace in traces])


def load_traces(path: str | Path) -> list[CausalTrace]:
    """All traces in a file, in the order of their facts; for an unfinished run, the finished ones.

    A line that was cut short at the end is left out.

    Raises:
        ResultFileError: if the file is missing, no file of traces, or broken.
    """
    header, records = read_journal(path, KIND, FORMAT)
    indexes = [record.get("index", number) for number, record in enumerate(records)]
    if not all(type(index) is int for index in indexes) or len(set(indexes)) < len(indexes):
        raise ResultFileError(f"{path} names its facts twice or not at all: it was changed by hand. Trace them again")
    return [from_record(record, header, path) for _, record in sorted(zip(indexes, records, strict=True), key=_first)]


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def as_record(trace: CausalTrace) -> dict[str, Any]:
    """A trace as JSON-able values, with null for NaN."""
    return {
        "fact": trace.fact.as_list(),
        "answer": trace.answer,
        "tokens": list(trace.tokens),
        "subject": list(trace.subject),
        "known": trace.known,
        "clean": trace.clean,
        "corrupted": trace.corrupted,
        "restored": {
            part: [None if np.isnan(line).any() else line.tolist() for line in values]
            for part, values in trace.restored.items()
        },
        "settings": dict(trace.settings),
    }


def from_record(record: Mapping[str, Any], header: Mapping[str, Any], path: str | Path) -> CausalTrace:
    """The trace in a line; its model is named in the file's header.

    Raises:
        ResultFileError: if something is missing, or does not fit together.
    """
    with taking_apart(path, "a file of whole causal traces", advice="Trace the fact again"):
        of_type(record, _Record)
        of_type(header, Origin)
        tokens, (first, last) = tuple(record["tokens"]), record["subject"]
        layers = {len(line) for lines in record["restored"].values() for line in lines if line is not None}
        if len(layers) != 1:
            raise ValueError("its maps have no, or different numbers of layers")
        nothing = [np.nan] * layers.pop()
        restored = {
            part: np.array([nothing if line is None else line for line in lines], dtype=np.float64)
            for part, lines in record["restored"].items()
        }
        whole = all(values.ndim == 2 and len(values) == len(tokens) for values in restored.values())
        if not whole or not 0 <= first <= last < len(tokens):
            raise ValueError("its maps, tokens and subject do not fit together")
        if any(np.abs(values[np.isfinite(values)]).max(initial=0) > 1.001 for values in restored.values()):
            raise ValueError("its probabilities are none")
        return CausalTrace(
            fact=Fact(*record["fact"]),
            answer=record["answer"],
            tokens=tokens,
            subject=(first, last),
            clean=float(record["clean"]),
            corrupted=float(record["corrupted"]),
            restored=restored,
            settings=current(dict(record["settings"])),
            model=header["model"],
            known=record["known"],
            fingerprint=header["fingerprint"],
            versions=dict(header["versions"]),
        )
