"""Content of an edit: changes of weights and their origin. It is immutable and needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, Self, TypedDict

from errata.base.arguments import require
from errata.base.errors import ConfigError, EditFileError
from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.base.parsing import of_type, taking_apart
from errata.base.versions import library_versions
from errata.edits.delta import Delta
from errata.edits.immutable import frozen

COMBINED = "combined"  # the method of an edit that was combined from others, its parts


class _Layout(TypedDict, total=False):
    """Touched weights that the model stores transposed or shares between modules."""

    transposed: list[str]
    shared: list[str]


class _Notes(TypedDict, total=False):
    """The notes that the package itself reads."""

    layout: _Layout
    derived: list[dict[str, Any]]
    start_token: str
    health: dict[str, Any] | None


class _Header(TypedDict):
    """Header of an edit's file: everything besides its tensors."""

    method: str
    rewrites: list[dict[str, str]]
    config: dict[str, Any]
    fingerprints: dict[str, str]
    model: str
    versions: dict[str, str]
    seed: int
    notes: _Notes
    source: NotRequired[dict[str, str]]


@dataclass(frozen=True, eq=False, repr=False)
class Content:
    """Changes of a model's weights, with their origin. Immutable; equal if the content is equal.

    Attributes:
        deltas: the changes, `RankOne`, `LowRank` or `Dense`.
        method: the method that made them, such as "rome".
        rewrites: the facts and their new objects.
        config: the method's settings, JSON-able.
        fingerprints: digest of each touched weight as it was when the edit was made, by weight name.
        model: name of the model it was made for.
        versions: versions of errata, torch and transformers.
        seed: seed of everything random in its making.
        notes: what the method reports, JSON-able (losses of every step, residuals); under "layout" which touched
            weights the model stores transposed or shares with another module, under "derived" what was done to
            the edit since it was made.
        source: where a loader finds that model, {"path": folder} or {"hub": id, "revision": commit}; empty in older
            files. Equality ignores it: equal edits may have been made from different folders.

    Raises:
        ConfigError: if there are no deltas, a delta's weight has no fingerprint, or config or notes are not
        JSON-able.
    """

    deltas: tuple[Delta, ...]
    method: str
    rewrites: tuple[Rewrite, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    versions: Mapping[str, str] = field(default_factory=library_versions)
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.deltas, ["RankOne|LowRank|Dense"], "Edit: deltas")
        require(self.rewrites, ["Rewrite"], "Edit: rewrites")
        object.__setattr__(self, "deltas", tuple(self.deltas))
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        for name in ("config", "fingerprints", "versions", "notes", "source"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        if not self.deltas:
            raise ConfigError("an edit without any change of a weight is none: give at least one delta")
        for delta in self.deltas:
            if delta.weight not in self.fingerprints:
                raise ConfigError(
                    f"the edit changes {delta.weight} but has no fingerprint of it, so it could not tell "
                    "the model it was made for. Make it with Edit.of(model, ...)"
                )

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the changed weights, in order."""
        return tuple(dict.fromkeys(delta.weight for delta in self.deltas))

    @property
    def origins(self) -> frozenset[str]:
        """Ids of all edits whose change is part of this one, itself included."""
        parts = self.config.get("parts", ()) if self.method == COMBINED else ()
        derived = [step["from"] for made in (self.notes, *parts) for step in made.get("derived", ())]
        return frozenset({self.id, *(part["id"] for part in parts), *derived})

    @cached_property
    def id(self) -> str:
        """sha256, in hex, of the whole content: equal edits have equal ids, on every machine."""
        parts = [
            [delta.kind, delta.weight, {part: tensor_digest(t) for part, t in delta.tensors().items()}]
            for delta in self.deltas
        ]
        text = json.dumps([self.header(), parts], sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def header(self) -> dict[str, Any]:
        """Everything except tensors and the source, JSON-able."""
        rewrites = [rewrite.as_dict() for rewrite in self.rewrites]
        names = ("method", "config", "fingerprints", "model", "versions", "seed", "notes")
        return {"rewrites": rewrites, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], deltas: tuple[Delta, ...], path: str | Path) -> Self:
        """The edit of a file's header and deltas.

        Raises:
            EditFileError: if the header is not one of a whole edit.
        """
        with taking_apart(path, "a whole edit", EditFileError, "Save it again"):
            of_type(header, _Header)
            return cls(
                deltas=deltas,
                method=header["method"],
                rewrites=tuple(_rewrite(entry) for entry in header["rewrites"]),
                **{name: header[name] for name in ("config", "fingerprints", "model", "versions", "seed", "notes")},
                source={str(name): str(value) for name, value in header.get("source", {}).items()},
            )

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Content) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        what = "; ".join(f"{r.subject} -> {r.new_object}" for r in self.rewrites[:2])
        more = f"; and {len(self.rewrites) - 2} more" if len(self.rewrites) > 2 else ""
        return f"edit {self.id[:8]} ({self.method}{': ' if what else ''}{what}{more})"

    def __repr__(self) -> str:
        return f"<{self}: {', '.join(map(repr, self.deltas))}>"


def _rewrite(entry: Mapping[str, str]) -> Rewrite:
    fact = Fact(entry["subject"], entry["prompt"], entry["object"], entry.get("separator"))
    return fact.rewrite(entry["new_object"])
