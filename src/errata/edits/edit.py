"""An edit as a value: changes of weights and where they came from.

Making an edit leaves the model alone; `apply` puts it on, `undo` takes it off, exact to the last bit,
because the touched weight's own bytes are kept meanwhile (nothing is ever subtracted). Edits stack: the
last one applied is the first to be undone. An edit knows the fingerprints of the weights it was made for,
and goes on no others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.base.errors import ConfigError, EditFileError, EditMismatch, EditStateError, ErrataError
from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.base.versions import library_versions
from errata.edits import files
from errata.edits.delta import Delta
from errata.models import weights

if TYPE_CHECKING:
    from errata.models.model import Model


class FrozenDict(dict):
    """A dict that cannot be changed, of settings or notes. Its lists are tuples, its dicts frozen too."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an edit is a value: its settings and notes cannot be changed. dict(...) gives a copy")

    if not TYPE_CHECKING:
        __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)  # pickled and copied as a whole: items cannot be set one by one


def frozen(value: Any) -> Any:
    """A JSON-able value made immutable: dicts become `FrozenDict`, lists tuples, one-number tensors numbers.

    Raises:
        ConfigError: for anything that JSON cannot hold, NaN and infinity among it.
    """
    if isinstance(value, Mapping):
        return FrozenDict({str(key): frozen(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(each) for each in value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} cannot be kept in an edit's settings or notes: only finite numbers can")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ConfigError(f"a {type(value).__name__} cannot be kept in an edit's settings or notes: only JSON values can")


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Changes of a model's weights, with their origin. Immutable; equal if the content is equal.

    Attributes:
        deltas: the changes, `RankOne` or `Dense`.
        method: what made them, such as "rome".
        rewrites: the facts and their new objects.
        config: the method's settings, JSON-able.
        fingerprints: digest of each touched weight as it was when the edit was made, by weight name.
        model: name of the model it was made for.
        versions: of errata, torch and transformers.
        seed: of everything random in its making.
        notes: what the method reports, JSON-able (losses of every step, residuals).

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", tuple(self.deltas))
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        for name in ("config", "fingerprints", "versions", "notes"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        if not self.deltas:
            raise ConfigError("an edit without any change of a weight is none: give at least one delta")
        for delta in self.deltas:
            if delta.weight not in self.fingerprints:
                raise ConfigError(
                    f"the edit changes {delta.weight} but has no fingerprint of it, so it could not tell "
                    "the model it was made for. Make it with Edit.of(model, ...)"
                )

    @classmethod
    def of(
        cls,
        model: Model,
        deltas: Iterable[Delta],
        method: str,
        rewrites: Iterable[Rewrite] = (),
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        notes: Mapping[str, Any] | None = None,
    ) -> Edit:
        """An edit made for `model` as it is now: fingerprints and name are taken from it."""
        deltas = tuple(deltas)
        return cls(
            deltas=deltas,
            method=method,
            rewrites=tuple(rewrites),
            config=config or {},
            fingerprints={d.weight: tensor_digest(model.weight(d.weight)) for d in deltas},
            model=model.name,
            seed=seed,
            notes=notes or {},
        )

    # ---- on and off a model ----

    def apply(self, model: Model) -> None:
        """Put the edit on the model, all of it or (on any error) nothing.

        It fits if every touched weight is, byte for byte, what it was when the edit was made: now, or
        before any edit was applied. So edits made for the unedited model stack, and so do edits made one
        after the other. W + ΔW is computed in float32 at least and rounded once to the weight's dtype.

        Raises:
            EditMismatch: if a weight is missing, has another shape or other bytes, or cannot hold the sum.
            EditStateError: if this edit is applied to the model already.
        """
        if any(entry.edit == self for entry in model.applied):
            raise EditStateError(f"{self} is applied to {model.name!r} already. Undo it before applying it again")
        changes = self._changes(model)
        before = {name: tensor_digest(model.weight(name)) for name in changes}
        self._check_fingerprints(model, before)
        kept: dict[str, Tensor] = {}
        try:
            for name, deltas in changes.items():
                weight = model.weight(name)
                kept[name] = weight.detach().clone()
                weights.add_(model, name, _sum(deltas))
                if not torch.isfinite(weight).all():
                    raise EditMismatch(
                        f"{self} does not fit into {name}: {weight.dtype} overflows. Load the model in a wider dtype"
                    )
            after = {name: tensor_digest(model.weight(name)) for name in changes}
            model.applied.append(_Applied(self, kept, before, after))
        except BaseException:
            _restore(model, kept)
            raise
        _undone.setdefault(model, set()).discard(self.id)

    def undo(self, model: Model) -> None:
        """Take the edit off: the touched weights are again, byte for byte, what they were.

        Raises:
            EditStateError: if the edit is not applied to this model, has been undone, is not the last one
            applied,
                or if something else has changed the weight since.
        """
        place = next((i for i, entry in enumerate(model.applied) if entry.edit == self), None)
        if place is None:
            raise EditStateError(self._why_not_applied(model))
        later = len(model.applied) - 1 - place
        if later:
            raise EditStateError(
                f"{self} cannot be undone yet: {later} edit(s) were applied after it. "
                f"Undo them first, beginning with {model.applied[-1].edit}"
            )
        entry = model.applied[-1]
        for name, digest in entry.after.items():
            if tensor_digest(model.weight(name)) != digest:
                raise EditStateError(
                    f"{self} cannot be undone: something other than an edit has changed {name} since, "
                    "and undoing would throw that away. Load the model again"
                )
        _restore(model, entry.kept)
        model.applied.pop()
        _undone.setdefault(model, set()).add(self.id)

    @contextlib.contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the edit on it, for the time of a `with` block.

        Raises:
            EditMismatch, EditStateError: as `apply` and `undo`.
        """
        self.apply(model)
        try:
            yield model
        finally:
            self.undo(model)

    def relative_norm(self, model: Model) -> float:
        """‖ΔW‖ / ‖W‖ in Frobenius norms, over all touched weights together, W as it is now.

        Raises:
            EditMismatch: if a weight is missing or has another shape.
        """
        changes = self._changes(model)
        size = math.hypot(*(float(model.weight(name).detach().double().norm()) for name in changes))
        change = math.hypot(*(d[0].norm() if len(d) == 1 else float(_sum(d).norm()) for d in changes.values()))
        return change / size if size else math.inf

    def _changes(self, model: Model) -> dict[str, list[Delta]]:
        """The deltas of each weight that this model must have; two names of one tied weight count as one."""
        names: dict[int, str] = {}
        changes: dict[str, list[Delta]] = {}
        for delta in self.deltas:
            try:
                weight, shape = model.weight(delta.weight), tuple(weights.matrix(model, delta.weight).shape)
            except ErrataError as error:
                raise EditMismatch(f"{self} does not fit {model.name!r}: {error}") from error
            if shape != delta.shape:
                raise EditMismatch(
                    f"{self} does not fit {model.name!r}: {delta.weight} is {list(shape)} as [d_out, d_in], "
                    f"the change is {list(delta.shape)}. Load the model it was made for, {self.model!r}"
                )
            changes.setdefault(names.setdefault(id(weight), delta.weight), []).append(delta)
        return changes

    def _check_fingerprints(self, model: Model, now: Mapping[str, str]) -> None:
        for name, digest in now.items():
            weight = model.weight(name)
            first = next(
                (e.before[other] for e in model.applied for other in e.before if model.weight(other) is weight),
                digest,
            )
            if self.fingerprints[name] not in (digest, first):
                raise EditMismatch(
                    f"{self} was made for other weights: {name} of {model.name!r} has not the bytes (or "
                    f"the dtype) that it had in {self.model!r}. Load that model in that dtype, or make the "
                    "edit again for this one"
                )

    def _why_not_applied(self, model: Model) -> str:
        if self.id in _undone.get(model, ()):
            return f"{self} has been undone on {model.name!r} already. There is nothing left to undo"
        for other in list(_undone):
            if other is not model and any(entry.edit == self for entry in other.applied):
                return f"{self} is applied to another model, {other.name!r}, not to this {model.name!r}. Undo it there"
        return f"{self} is not applied to {model.name!r}, so it cannot be undone. Apply it first"

    # ---- as a value and as a file ----

    @cached_property
    def id(self) -> str:
        """sha256, in hex, of the whole content: equal edits have equal ids, on every machine."""
        parts = [
            [delta.kind, delta.weight, {part: tensor_digest(t) for part, t in delta.tensors().items()}]
            for delta in self.deltas
        ]
        text = json.dumps([self._header(), parts], sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with readable metadata, whole or not at all.

        Raises:
            OutputError: if the file cannot be written.
        """
        files.write(path, {"id": self.id, **self._header()}, self.deltas)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """A saved edit. Nothing in the file is executed, and its content is checked against its id.

        Raises:
            EditFileError: if the file is missing, cut short, not ours, of a newer format, broken or
            tampered with.
        """
        header, deltas = files.read(path)
        try:
            edit = cls(
                deltas=deltas,
                method=header["method"],
                rewrites=tuple(_rewrite(each) for each in header["rewrites"]),
                **{name: header[name] for name in ("config", "fingerprints", "model", "versions", "seed", "notes")},
            )
        except (ErrataError, KeyError, TypeError, AttributeError) as error:
            raise EditFileError(f"{path} is a broken edit: {error}. Save it again") from error
        if edit.id != header.get("id"):
            raise EditFileError(
                f"{path} has been changed since it was saved: its content does not have the id that it "
                "names. Fetch or save it again"
            )
        return edit

    def _header(self) -> dict[str, Any]:
        """All that is not a tensor."""
        rewrites = [
            {"subject": r.subject, "prompt": r.prompt, "object": r.fact.object, "new_object": r.new_object}
            for r in self.rewrites
        ]
        names = ("method", "config", "fingerprints", "model", "versions", "seed", "notes")
        return {"rewrites": rewrites, **{name: getattr(self, name) for name in names}}

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Edit) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        what = "; ".join(f"{r.subject} -> {r.new_object}" for r in self.rewrites[:2])
        more = f"; and {len(self.rewrites) - 2} more" if len(self.rewrites) > 2 else ""
        return f"edit {self.id[:8]} ({self.method}{': ' if what else ''}{what}{more})"

    def __repr__(self) -> str:
        return f"<{self}: {', '.join(map(repr, self.deltas))}>"


@dataclass(frozen=True)
class _Applied:
    """One place of a model's stack: an edit, and the weights that it covers as they were."""

    edit: Edit
    kept: dict[str, Tensor]
    before: dict[str, str]
    after: dict[str, str]


# Ids of the edits undone on each model that has ever had one: only error messages read it.
_undone: weakref.WeakKeyDictionary[Model, set[str]] = weakref.WeakKeyDictionary()


def _sum(deltas: list[Delta]) -> Tensor:
    total = deltas[0].matrix()
    for delta in deltas[1:]:
        total = total + delta.matrix()
    return total


def _restore(model: Model, kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in kept.items():
            model.weight(name).copy_(tensor)


def _rewrite(entry: Mapping[str, str]) -> Rewrite:
    return Rewrite(Fact(entry["subject"], entry["prompt"], entry["object"]), entry["new_object"])
