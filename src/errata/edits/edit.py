"""An edit as a value: changes of weights and where they came from.

Making an edit leaves the model alone; `apply` puts it on, `undo` takes it off, exact to the last bit,
because the touched weight's own bytes are kept meanwhile (nothing is ever subtracted). Edits stack: the
last one applied is the first to be undone; `remove` takes one out from among others, by putting the rest on
again. An edit knows the fingerprints of the weights it was made for, and goes on no others.

Edits are combined, scaled, truncated and restricted to layers; each gives a new edit, which tells in its notes
what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from errata.base.arguments import checked, require
from errata.base.autocast import without_autocast
from errata.base.errors import (
    ConfigError,
    EditFileError,
    EditMismatch,
    EditStateError,
    ErrataError,
    UnsupportedModel,
)
from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.base.interrupt import unbroken, uninterrupted
from errata.base.reading import of_type, taking_apart
from errata.base.versions import library_versions
from errata.edits import files, lora
from errata.edits.delta import Delta, Dense
from errata.edits.ledger import warn_of_contradictions
from errata.models import weights

if TYPE_CHECKING:
    from errata.models.model import Model


COMBINED = "combined"


# Notes on what an edit does, which an edit derived from it does not do.
MEASURED = (
    "health",
    "written",
    "parts",
    "residual",
    "rounding",
    "read_at_mean_key",
    "read_at_bare_prompt",
    "delta_norm",
)


class _Layout(TypedDict, total=False):
    """Which touched weights the model stores otherwise than most do."""

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


class StartTokenDiffers(UserWarning):
    """An edit was made with another start token before every text than the model has that it goes on."""


def _start_token(token: str) -> dict[str, str]:
    """The note on it: none where there is none."""
    return {"start_token": token} if token else {}


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
        deltas: the changes, `RankOne`, `LowRank` or `Dense`.
        method: what made them, such as "rome".
        rewrites: the facts and their new objects.
        config: the method's settings, JSON-able.
        fingerprints: digest of each touched weight as it was when the edit was made, by weight name.
        model: name of the model it was made for.
        versions: of errata, torch and transformers.
        seed: of everything random in its making.
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

    @classmethod
    @checked(model="Model", deltas=["RankOne|LowRank|Dense"], rewrites=["Rewrite"])
    @without_autocast
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
        fingerprints: Mapping[str, str] | None = None,
    ) -> Edit:
        """An edit made for `model` as it is now: fingerprints, name and layout are taken from it.

        Who makes many edits of one weight may take its fingerprint once, and hand it over.
        """
        deltas = tuple(deltas)
        layout = _layout(model, deltas)
        return cls(
            deltas=deltas,
            method=method,
            rewrites=tuple(rewrites),
            config=config or {},
            fingerprints=fingerprints or {d.weight: tensor_digest(model.weight(d.weight)) for d in deltas},
            model=model.name,
            seed=seed,
            notes={
                **(notes or {}),
                **({"layout": layout} if layout else {}),
                **_start_token(model.start_token),
            },
            source=model.source,
        )

    # ---- edits of edits ----

    @classmethod
    @checked(edits=["Edit"], model="Model")
    @without_autocast
    def combine(cls, edits: Iterable[Edit], model: Model | None = None) -> Edit:
        """One edit that does what these do, one applied after the other.

        They must have been made for the same weights, or one after the other. The first is seen from the
        fingerprints. The second is not: a later edit was made for weights that the earlier ones had changed,
        and what bytes those are only the model can tell. With `model`, on which the edits go or on which they
        are already, one right after the other, both are settled as `apply` settles them; it is left as it is.

        Config keeps what each part was (id, method, seed, config, how many deltas and rewrites). A combined edit
        adds the sum of its changes and rounds once; edits applied one by one round each time, so that the two
        differ by rounding.

        Raises:
            ConfigError: if there is no edit, or one occurs twice.
            EditMismatch: if they were not made for the same weights, or one after the other.
            EditStateError: if `model` has some of the edits on it, but not all of them in this order.
        """
        edits = tuple(edits)
        if not edits:
            raise ConfigError("there is no edit to combine: give at least one")
        if len(set(edits)) < len(edits):
            raise ConfigError("an edit cannot be combined with itself: edit.scaled(2) is twice its change")
        fingerprints = _joined_fingerprints(edits, [{}] * len(edits) if model is None else _states(edits, model))
        if len(edits) == 1:
            return edits[0]
        for place, edit in enumerate(edits):
            warn_of_contradictions(edits[:place], edit)
        layout: dict[str, list[str]] = {}
        for edit in edits:
            for kind, names in edit.notes.get("layout", {}).items():
                layout[kind] = sorted({*layout.get(kind, ()), *names})
        return cls(
            deltas=tuple(delta for edit in edits for delta in edit.deltas),
            method=COMBINED,
            rewrites=tuple(rewrite for edit in edits for rewrite in edit.rewrites),
            config={"parts": [edit._as_part() for edit in edits]},
            fingerprints=fingerprints,
            model=edits[0].model,
            notes={**({"layout": layout} if layout else {}), **_start_token(edits[0].notes.get("start_token", ""))},
            source=edits[0].source,
        )

    @without_autocast
    def scaled(self, factor: float) -> Edit:
        """The edit with factor · ΔW for every ΔW: 0.5 is half of it, -1 its opposite.

        Raises:
            ConfigError: if the factor is no finite number, or too large.
        """
        return self._derived([delta.scaled(factor) for delta in self.deltas], {"scaled": factor})

    @checked(model="Model")
    @without_autocast
    def restricted(self, layers: Iterable[int], model: Model) -> Edit:
        """The edit without its changes outside these layers, counted from 0 as in `model`.

        Of a combined edit, the rewrites of parts of which nothing is left go too.

        Raises:
            ConfigError: if the model has no such layer, or nothing of the edit is in those layers.
        """
        wanted = sorted(set(layers))
        prefixes = tuple(f"{model.path(('state', layer))}." for layer in wanted)
        kept = [delta.weight.startswith(prefixes) for delta in self.deltas]
        if not any(kept):
            raise ConfigError(f"{self} changes nothing in layers {wanted}: it changes {', '.join(self.weights)}")
        deltas = [delta for delta, stays in zip(self.deltas, kept, strict=True) if stays]
        all_parts = self.config.get("parts", ()) if self.method == COMBINED else ()
        if sum(part["deltas"] for part in all_parts) != len(kept):  # one part, or stacked in an adapter since
            return self._derived(deltas, {"restricted": wanted})
        parts, rewrites, places, all_rewrites = [], [], iter(kept), iter(self.rewrites)
        for part in all_parts:
            left = sum(next(places) for _ in range(part["deltas"]))
            its_rewrites = [next(all_rewrites) for _ in range(part["rewrites"])]
            if left:
                parts.append({**part, "deltas": left})
                rewrites += its_rewrites
        return self._derived(deltas, {"restricted": wanted}, rewrites=tuple(rewrites), config={"parts": parts})

    @without_autocast
    def truncated(self, rank: int) -> Edit:
        """The edit with every dense change cut to this rank by SVD; others stay.

        Its notes say, under "derived", the residual of each: ‖ΔW − truncated‖ / ‖ΔW‖ in Frobenius norms.

        Raises:
            ConfigError: if the rank is less than 1.
        """
        deltas = [delta.truncated(rank) if isinstance(delta, Dense) else delta for delta in self.deltas]
        residuals = [
            {"weight": whole.weight, "residual": whole.residual(cut)}
            for whole, cut in zip(self.deltas, deltas, strict=True)
            if isinstance(whole, Dense)
        ]
        return self._derived(deltas, {"truncated": rank, "residuals": residuals}) if residuals else self

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that it changes, in order."""
        return tuple(dict.fromkeys(delta.weight for delta in self.deltas))

    def _derived(self, deltas: Sequence[Delta], step: Mapping[str, Any], **changes: Any) -> Edit:
        """This edit with other deltas, told in its notes; what was measured of it holds no more."""
        derived = (*self.notes.get("derived", ()), {"from": self.id, **step})
        touched = {delta.weight for delta in deltas}
        notes = {name: note for name, note in self.notes.items() if name not in MEASURED}
        return replace(
            self,
            deltas=tuple(deltas),
            fingerprints={name: digest for name, digest in self.fingerprints.items() if name in touched},
            notes={**notes, "derived": derived},
            **changes,
        )

    def _origins(self) -> set[str]:
        """Ids of all edits whose change is in this one, itself among them."""
        told = [self.notes, *self.config.get("parts", ())] if self.method == COMBINED else [self.notes]
        return {self.id, *(part["id"] for part in told[1:]), *(s["from"] for t in told for s in t.get("derived", ()))}

    def _as_part(self) -> dict[str, Any]:
        """What a combined edit keeps of this one, besides deltas and rewrites."""
        own: dict[str, Any] = {"id": self.id, "method": self.method, "seed": self.seed, "config": self.config}
        counts = {"deltas": len(self.deltas), "rewrites": len(self.rewrites)}
        derived = {"derived": self.notes["derived"]} if "derived" in self.notes else {}
        return {**own, **counts, **derived}

    # ---- on and off a model ----

    @uninterrupted
    @checked(model="Model")
    @without_autocast
    def apply(self, model: Model) -> None:
        """Put the edit on the model, all of it or (on any error) nothing. Signals such as Ctrl-C wait meanwhile.

        It fits if every touched weight is, byte for byte, what it was when the edit was made: now, or before
        any edit was applied, if nothing but edits has changed it since. So edits made for the unedited model
        stack, and so do edits made one after the other. W + ΔW is computed in float32 at least and rounded once
        to the weight's dtype.

        Warns with `ContradictoryEdits` if an applied edit gives one of its prompts another object.

        Raises:
            EditMismatch: if a weight is missing, has another shape or other bytes, or cannot hold the sum.
            EditStateError: if this edit is applied to the model already.
        """
        if self._is_on(model):
            raise EditStateError(f"{self} is applied to {model.name!r} already. Undo it before applying it again")
        for entry in model.applied:
            if self._origins() & entry.edit._origins():
                raise EditStateError(
                    f"{self} and {entry.edit}, which is on {model.name!r}, come from the same edit, whose change "
                    "would be "
                    "on it twice. Undo the one before applying the other"
                )
        warn_of_contradictions([entry.edit for entry in model.applied], self)
        self._warn_of_start_token(model)
        self._put_on(model)

    def _warn_of_start_token(self, model: Model) -> None:
        """An edit of a text that begins with a start token holds only where texts begin with it."""
        made_with = self.notes.get("start_token", "")
        if self.rewrites and made_with != model.start_token:
            made, has = (
                f"the start token {token!r}" if token else "no start token" for token in (made_with, model.start_token)
            )
            warnings.warn(
                f"{self} was made with {made}, and {model.name!r} was loaded with {has}, so its prompts are other "
                f"tokens here and the edit may not show: load the model with start_token={made_with or None!r} "
                "(--start-token)",
                StartTokenDiffers,
                stacklevel=3,
            )

    def _put_on(self, model: Model, checked: bool = True) -> None:
        """`apply` without a look at the other edits; unless `checked`, on weights that it was not made for, too."""
        changes = self._changes(model)
        before = {name: tensor_digest(model.weight(name)) for name in changes}
        if checked:
            self._check_fingerprints(model, before)
        kept: dict[str, Tensor] = {}
        stack = list(model.applied)
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
            model.applied[:] = stack
            raise
        _undone.setdefault(model, set()).discard(self.id)

    @uninterrupted
    @checked(model="Model")
    @without_autocast
    def undo(self, model: Model) -> None:
        """Take the edit off: the touched weights are again, byte for byte, what they were.

        Raises:
            EditStateError: if the edit is not applied to this model, has been undone, is not the last one
                applied, or if something else has changed the weight since.
        """
        place = self._place(model)
        later = len(model.applied) - 1 - place
        if later:
            raise EditStateError(
                f"{self} cannot be undone yet: {later} edit(s) were applied after it. "
                f"Undo them first, beginning with {model.applied[-1].edit}; or take this one out from among "
                "them with edit.remove(model)"
            )
        entry = model.applied[-1]
        self._require_untouched(model, [entry])
        try:
            _restore(model, entry.kept)
            model.applied.pop()
        except BaseException:  # half of it would be neither the one nor the other
            _restore(model, entry.kept)
            model.applied[:] = [other for other in model.applied if other is not entry]
            raise
        _undone.setdefault(model, set()).add(self.id)

    @uninterrupted
    @checked(model="Model")
    @without_autocast
    def remove(self, model: Model, *, force: bool = False) -> None:
        """Take the edit off from among others, or (on any error) leave everything as it is.

        The kept bytes are put back and the edits that were applied after it are applied again in their order:
        to the last bit the same as if this one had never been there.

        Args:
            model: what it is applied to.
            force: put edits on again, too, that were made for weights with this one in them, and so do, without it,
                something else than what they were made to do. Otherwise they are refused.

        Raises:
            EditStateError: if the edit is not applied to this model, has been undone, if a later edit was made
                for weights with this one in them, or if something else has changed a weight since.
            EditMismatch: if a later edit, without this one, no longer fits into the weight's dtype.
        """
        place = self._place(model)
        stack: list[_Applied] = list(model.applied)
        covered = stack[place:]
        self._require_untouched(model, covered)
        now = {name: model.weight(name).detach().clone() for entry in covered for name in entry.kept}
        try:
            for entry in reversed(covered):
                _restore(model, entry.kept)
            del model.applied[place:]
            for entry in covered[1:]:
                if not (force or entry.edit._goes_on(model)):
                    raise EditStateError(
                        f"{self} cannot be taken off alone: {entry.edit} was made for weights with it in them, and "
                        "would do something else without it. Take that one off first, or say force=True to put it "
                        "on again all the same"
                    )
                entry.edit._put_on(model, checked=False)
        except BaseException:
            _restore(model, now)
            model.applied[:] = stack
            raise
        _undone.setdefault(model, set()).add(self.id)

    def _place(self, model: Model) -> int:
        """Where the edit stands in the model's stack, or an error that says why it does not."""
        place = next((i for i, entry in enumerate(model.applied) if entry.edit == self), None)
        if place is None:
            raise EditStateError(self._why_not_applied(model))
        return place

    def _require_untouched(self, model: Model, entries: Sequence[_Applied]) -> None:
        """Make sure that nothing but edits has changed the weights that these cover."""
        latest = {id(model.weight(name)): (name, digest) for entry in entries for name, digest in entry.after.items()}
        for name, digest in latest.values():
            if tensor_digest(model.weight(name)) != digest:
                raise EditStateError(
                    f"{self} cannot be undone: something other than an edit has changed {name} since, "
                    "and undoing would throw that away. Load the model again"
                )

    @checked(model="Model")
    @unbroken
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the edit on it, for the time of a `with` block.

        However the block ends, Ctrl-C at any moment included, the edit comes off. An error of the block stays the one
        that is raised, with a note if the edit cannot be undone.

        Raises:
            EditMismatch, EditStateError: as `apply` and `undo`.
        """
        there = self._is_on(model)
        try:
            try:
                self.apply(model)
                yield model
                self.undo(model)
            except BaseException as error:
                if not there and self._is_on(model):
                    self._undo_after(error, model)
                raise
        finally:  # once more, in case that was cut short
            if not there and self._is_on(model):
                with contextlib.suppress(EditStateError):
                    self.undo(model)

    def _is_on(self, model: Model) -> bool:
        return any(entry.edit == self for entry in model.applied)

    def _undo_after(self, error: BaseException, model: Model) -> None:
        """Take the edit off after an error, which says so if that is refused."""
        try:
            self.undo(model)
        except EditStateError as refused:
            if str(refused) == str(error):
                return
            if hasattr(error, "add_note"):
                error.add_note(f"Besides, {refused}")
            elif error.__context__ is None:  # Python 3.10
                refused.__context__ = None
                error.__context__ = refused

    @checked(model="Model")
    @without_autocast
    def relative_norm(self, model: Model) -> float:
        """‖ΔW‖ / ‖W‖ in Frobenius norms, over all touched weights together, W as it is now.

        Raises:
            EditMismatch: if a weight is missing or has another shape.
        """
        changes = self._changes(model)
        size = math.hypot(*(float(model.weight(name).detach().double().norm()) for name in changes))
        change = math.hypot(*(d[0].norm() if len(d) == 1 else float(_sum(d).norm()) for d in changes.values()))
        return change / size if size else math.inf

    @checked(model="Model")
    @without_autocast
    def rounding(self, model: Model) -> float:
        """‖(Ŵ − W) − ΔW‖ / ‖ΔW‖ over all touched weights together: what their dtypes make of the change put on W as it
        is now. 0 if nothing is changed.

        Raises:
            EditMismatch: if a weight is missing or has another shape.
        """
        lost, size = [], []
        for name, deltas in self._changes(model).items():
            stored = weights.matrix(model, name).detach()
            change = _sum(deltas).to(stored.device)
            held = (stored + change).to(stored.dtype)
            lost.append(float((held.double() - stored.double() - change.double()).norm()))
            size.append(float(change.double().norm()))
        return math.hypot(*lost) / math.hypot(*size) if any(size) else 0.0

    def _changes(self, model: Model) -> dict[str, list[Delta]]:
        """The deltas of each weight that this model must have; two names of one tied weight count as one."""
        names: dict[int, str] = {}
        changes: dict[str, list[Delta]] = {}
        for delta in self.deltas:
            try:
                weight, shape = model.weight(delta.weight), tuple(weights.matrix(model, delta.weight).shape)
            except ErrataError as error:
                raise EditMismatch(f"{self} does not fit {model.name!r}: {error}. {self._made_for}") from error
            if shape != delta.shape:
                raise EditMismatch(
                    f"{self} does not fit {model.name!r}: {delta.weight} is {list(shape)} as [d_out, d_in], "
                    f"the change is {list(delta.shape)}. {self._made_for}"
                )
            changes.setdefault(names.setdefault(id(weight), delta.weight), []).append(delta)
        return changes

    def _check_fingerprints(self, model: Model, now: Mapping[str, str]) -> None:
        for name, digest in now.items():
            if self.fingerprints[name] == digest:
                continue
            left = _left_by_edits(model, name)
            if left not in (None, digest):
                raise EditMismatch(
                    f"{self} cannot go on {model.name!r}: something other than an edit has changed {name} since the "
                    "last edit went on. Load the model again"
                )
            if self.fingerprints[name] != _unedited(model, name, digest):
                raise EditMismatch(
                    f"{self} was made for other weights: {name} of {model.name!r} has not the bytes (or "
                    f"the dtype) that it had in {self.model!r}. {self._made_for}, in that dtype; apply first the edits "
                    "that it was made after; or make it again for this one"
                )

    @property
    def _made_for(self) -> str:
        """Advice where the edit was made for another model."""
        own = self.source.get("hub") or self.source.get("path") or self.model
        named = self.model if self.model == "atlas" else own
        return f"Load the model that it was made for: --model {named}, or load_model({named!r})"

    def _goes_on(self, model: Model) -> bool:
        """Whether its fingerprints are those of the model, as it is or as it was before any edit."""
        try:
            self._check_fingerprints(model, {name: tensor_digest(model.weight(name)) for name in self._changes(model)})
        except EditMismatch:
            return False
        return True

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
        files.write(path, {"id": self.id, **self._header(), "source": self.source}, self.deltas)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """A saved edit. Nothing in the file is executed, and its content is checked against its id.

        Raises:
            EditFileError: if the file is missing, cut short, not ours, of a newer format, broken or
            tampered with.
        """
        header, deltas = files.read(path)
        edit = cls._from_header(header, deltas, path)
        with taking_apart(path, "a whole edit", EditFileError, "Save it again"):
            found = edit.id  # cannot be had of text that has half a character
        if found != header.get("id"):
            raise EditFileError(
                f"{path} has been changed since it was saved: its content does not have the id that it "
                "names. Fetch or save it again"
            )
        return edit

    @checked(model="Model")
    @without_autocast
    def to_lora(self, folder: str | Path, *, model: Model | None = None, rank: int | None = None) -> dict[str, float]:
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(hf, folder)` loads; whole or not at all.

        Several changes of one weight are stacked, one rank a rank-one change. The tensors keep the edit's dtype,
        float32 or float64. An adapter that errata wrote there earlier is replaced.

        Args:
            folder: a new or an empty one, or one that holds an adapter of ours and nothing else.
            model: what the edit is for. It says whether weights are stored transposed (GPT-2), where an edit from
                an older file does not (PEFT notices too, and warns), and where its files are now. Without it, the
                adapter's base is the folder, or the hub id and revision, of the model that the edit was made for.
            rank: truncate dense changes to this rank by SVD. None: refuse them.

        Returns:
            For each weight ‖ΔW − adapter‖ / ‖ΔW‖, in Frobenius norms: 0 where nothing was truncated.

        Raises:
            ConfigError: if a change is dense and no rank is given, or is of a weight that the model shares between
                two modules, of which an adapter would change one.
            EditMismatch: if the edit does not fit the model.
            OutputError: if the folder holds anything else, or cannot be written.
        """
        whole: dict[str, list[Delta]] = {}
        for delta in self.deltas:
            whole.setdefault(delta.weight, []).append(delta)
        layout, source = self.notes.get("layout", {}), self.source
        if model is not None:
            self._changes(model)
            layout, source = _layout(model, self.deltas), model.source or source
        if shared := layout.get("shared"):
            raise ConfigError(
                f"{shared[0]} is shared with another module, and an adapter would change it in one of the two places. "
                "Write the whole model, merged"
            )
        written = self if rank is None else self.truncated(rank)
        lora.write(
            folder,
            written.deltas,
            {"id": written.id, **written._header(), "source": source},
            base=source.get("path") or source.get("hub") or self.model,
            revision=source.get("revision"),
            transposed=bool(layout.get("transposed")),
        )
        return {name: _lost(deltas, [d for d in written.deltas if d.weight == name]) for name, deltas in whole.items()}

    @classmethod
    @checked(model="Model")
    @without_autocast
    def from_lora(cls, folder: str | Path, model: Model) -> Edit:
        """The edit that a plain LoRA adapter is, for this model. No code is run, and PEFT is not needed.

        An adapter that `to_lora` wrote gives the edit back, fingerprints included: it goes on the weights that
        the edit was made for. Any other is taken to be for the model as it is now.

        Raises:
            EditFileError: if there is no whole adapter in safetensors, or it is more than a low-rank change of
                linear maps (DoRA, biases, whole modules, embeddings).
            EditMismatch: if it does not fit the model.
        """
        deltas, settings, header = lora.read(folder)
        if header is None:
            try:
                edit = cls.of(model, deltas, "lora", config=settings)
            except ErrataError as error:
                raise EditMismatch(f"the adapter {folder} does not fit {model.name!r}: {error}") from error
        else:
            edit = cls._from_header(header, deltas, folder)
        edit._changes(model)
        return edit

    @classmethod
    def _from_header(cls, header: Mapping[str, Any], deltas: tuple[Delta, ...], path: str | Path) -> Edit:
        with taking_apart(path, "a whole edit", EditFileError, "Save it again"):
            of_type(header, _Header)
            return cls(
                deltas=deltas,
                method=header["method"],
                rewrites=tuple(_rewrite(each) for each in header["rewrites"]),
                **{name: header[name] for name in ("config", "fingerprints", "model", "versions", "seed", "notes")},
                source={str(name): str(value) for name, value in header.get("source", {}).items()},
            )

    def _header(self) -> dict[str, Any]:
        """All that is not a tensor."""
        rewrites = [rewrite.as_dict() for rewrite in self.rewrites]
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


def _left_by_edits(model: Model, name: str) -> str | None:
    """The digest of a weight as the last edit that touched it left it; None if none has."""
    weight = model.weight(name)
    afters = [e.after[other] for e in model.applied for other in e.after if model.weight(other) is weight]
    return afters[-1] if afters else None


def _unedited(model: Model, name: str, now: str) -> str:
    """The digest of a weight as it was before any edit; `now`, if none has touched it."""
    weight = model.weight(name)
    befores = (e.before[other] for e in model.applied for other in e.before if model.weight(other) is weight)
    return next(befores, now)


@uninterrupted
def _states(edits: Sequence[Edit], model: Model) -> list[Mapping[str, str]]:
    """For each edit the digests of the weights it touches just before it goes on; the model is left as it is."""
    stack: list[_Applied] = list(model.applied)
    on = [entry.edit for entry in stack]
    if edits[0] in on:
        begin = on.index(edits[0])
        if on[begin : begin + len(edits)] == list(edits):
            return [entry.before for entry in stack[begin : begin + len(edits)]]
    for edit in edits:
        if edit in on:
            raise EditStateError(
                f"{edit} is applied to {model.name!r}, but the edits to combine are not, one right after the other. "
                "Undo those that are applied, or apply the others"
            )
    kept: list[Mapping[str, Tensor]] = []
    try:
        for edit in edits:
            edit._put_on(model)
            kept.append(model.applied[-1].kept)
        return [entry.before for entry in model.applied[len(stack) :]]
    finally:
        for tensors in reversed(kept):
            _restore(model, tensors)
        model.applied[:] = stack


def _joined_fingerprints(edits: Sequence[Edit], states: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of each weight, the fingerprint in the first edit that touches it.

    A later edit must have been made for those same bytes; or for the bytes that it meets (`states`), if those
    come from the first edit's bytes by the edits between them alone.

    Raises:
        EditMismatch: if it was made for neither.
    """
    joined: dict[str, str] = {}
    in_line: set[str] = set()
    for edit, state in zip(edits, states, strict=True):
        for name in edit.weights:
            digest = edit.fingerprints[name]
            met = state.get(name) == digest
            if name not in joined:
                joined[name] = digest
                if met:
                    in_line.add(name)
            elif digest != joined[name] and not (met and name in in_line):
                raise EditMismatch(
                    f"{edit} cannot be combined with those before it: it was made for other bytes of {name}. If it was "
                    "made after them, give the model that they were made for, unedited or with just them on it: "
                    "Edit.combine(edits, model)"
                )
    return joined


def _layout(model: Model, deltas: Iterable[Delta]) -> dict[str, list[str]]:
    """Which of the touched weights the model stores transposed, and which it shares between modules; only those."""
    names = sorted({delta.weight for delta in deltas})
    parameters = list(model.hf.named_parameters(remove_duplicate=False))
    found = {
        "transposed": [n for n in names if _is_transposed(model, n)],
        "shared": [n for n in names if any(p is model.weight(n) and other != n for other, p in parameters)],
    }
    return {kind: those for kind, those in found.items() if those}


def _is_transposed(model: Model, name: str) -> bool:
    try:
        weight = model.weight(name)
        return weight.dim() == 2 and weights.matrix(model, name).stride() != weight.stride()
    except UnsupportedModel:  # no linear map: `apply` says so
        return False


def _lost(whole: list[Delta], written: list[Delta]) -> float:
    """‖whole − written‖ / ‖whole‖ of the changes of one weight."""
    if not any(isinstance(delta, Dense) for delta in whole):
        return 0.0
    return Dense(whole[0].weight, _sum(whole)).residual(Dense(whole[0].weight, _sum(written)))


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
    fact = Fact(entry["subject"], entry["prompt"], entry["object"], entry.get("separator"))
    return fact.rewrite(entry["new_object"])
