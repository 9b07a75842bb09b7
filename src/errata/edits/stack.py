"""The edits that are applied to a model, as a stack: applied on top, undone from the top down.

While an edit is applied, its entry keeps a copy of each weight that it changes. Undoing copies it back, which restores
the weight byte for byte; nothing is ever subtracted. `Model.applied` holds the entries, and no other code writes to it.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.base.autocast import without_autocast
from errata.base.errors import EditMismatch, EditStateError
from errata.base.fingerprint import tensor_digest
from errata.base.interrupt import unbroken, uninterrupted
from errata.edits.content import Content
from errata.edits.contradictions import warn_of_contradictions
from errata.edits.delta import total
from errata.edits.fit import changes_in, made_for
from errata.models import weights
from errata.models.model import Model


class StartTokenDiffers(UserWarning):
    """Warning: the edit was made with another start token than that of the model to which it is applied."""


@dataclass(frozen=True)
class Entry:
    """One applied edit.

    Attributes:
        edit: the edit.
        kept: copies of the weights that it covers, as they were before, by name.
        before: digests of those weights before it was applied.
        after: digests of those weights after it was applied.
    """

    edit: Content
    kept: dict[str, Tensor]
    before: dict[str, str]
    after: dict[str, str]


# Ids of the edits undone on each model that has ever had one: only error messages read it.
_undone: weakref.WeakKeyDictionary[Model, set[str]] = weakref.WeakKeyDictionary()


class Stack:
    """The edits that are applied to a model."""

    def __init__(self, model: Model):
        self.model = model

    @property
    def entries(self) -> list[Entry]:
        """One entry for each applied edit, the first applied first."""
        return self.model.applied

    def holds(self, edit: Content) -> bool:
        """Whether an edit is applied."""
        return any(entry.edit == edit for entry in self.entries)

    # ---- apply, undo, remove --------------------------------------------------------------------------

    @uninterrupted
    @without_autocast
    def apply(self, edit: Content) -> None:
        """Apply an edit, completely or (on any error) not at all; as `Edit.apply`."""
        if self.holds(edit):
            raise EditStateError(f"{edit} is applied to {self.model.name!r} already. Undo it before applying it again")
        for entry in self.entries:
            if edit.origins & entry.edit.origins:
                raise EditStateError(
                    f"{edit} and {entry.edit}, which is on {self.model.name!r}, come from the same edit, whose change "
                    "would be on it twice. Undo the one before applying the other"
                )
        warn_of_contradictions([entry.edit for entry in self.entries], edit)
        self._warn_of_start_token(edit)
        self._put_on(edit)

    @uninterrupted
    @without_autocast
    def undo(self, edit: Content) -> None:
        """Undo the edit that was applied last; as `Edit.undo`."""
        later = len(self.entries) - 1 - self._place(edit)
        if later:
            raise EditStateError(
                f"{edit} cannot be undone yet: {later} edit(s) were applied after it. "
                f"Undo them first, beginning with {self.entries[-1].edit}; or take this one out from among "
                "them with edit.remove(model)"
            )
        entry = self.entries[-1]
        self._require_untouched(edit, [entry])
        try:
            _restore(self.model, entry.kept)
            self.entries.pop()
        except BaseException:  # half of it would be neither the one nor the other
            _restore(self.model, entry.kept)
            self.entries[:] = [other for other in self.entries if other is not entry]
            raise
        _undone.setdefault(self.model, set()).add(edit.id)

    @uninterrupted
    @without_autocast
    def remove(self, edit: Content, *, force: bool = False) -> None:
        """Remove an edit from among others, or (on any error) change nothing; as `Edit.remove`."""
        place = self._place(edit)
        entries = list(self.entries)
        covered = entries[place:]
        self._require_untouched(edit, covered)
        now = {name: self.model.weight(name).detach().clone() for entry in covered for name in entry.kept}
        try:
            for entry in reversed(covered):
                _restore(self.model, entry.kept)
            del self.entries[place:]
            for entry in covered[1:]:
                if not (force or self._fits(entry.edit)):
                    raise EditStateError(
                        f"{edit} cannot be taken off alone: {entry.edit} was made for weights with it in them, and "
                        "would do something else without it. Take that one off first, or say force=True to put it "
                        "on again all the same"
                    )
                self._put_on(entry.edit, checked=False)
        except BaseException:
            _restore(self.model, now)
            self.entries[:] = entries
            raise
        _undone.setdefault(self.model, set()).add(edit.id)

    @unbroken
    def applied(self, edit: Content) -> Iterator[Model]:
        """Context in which an edit is applied to the model; as `Edit.applied`."""
        there = self.holds(edit)
        try:
            try:
                self.apply(edit)
                yield self.model
                self.undo(edit)
            except BaseException as error:
                if not there and self.holds(edit):
                    self._undo_after(error, edit)
                raise
        finally:  # once more, in case that was cut short
            if not there and self.holds(edit):
                with contextlib.suppress(EditStateError):
                    self.undo(edit)

    @uninterrupted
    def states_before(self, edits: Sequence[Content]) -> list[Mapping[str, str]]:
        """For each edit, the digests of its weights just before it is applied. The model is left unchanged.

        Raises:
            EditStateError: if some of the edits are applied, but not all of them, one right after the other.
        """
        entries = list(self.entries)
        on = [entry.edit for entry in entries]
        if edits[0] in on:
            begin = on.index(edits[0])
            if on[begin : begin + len(edits)] == list(edits):
                return [entry.before for entry in entries[begin : begin + len(edits)]]
        for edit in edits:
            if edit in on:
                raise EditStateError(
                    f"{edit} is applied to {self.model.name!r}, but the edits to combine are not, one right after the "
                    "other. Undo those that are applied, or apply the others"
                )
        kept: list[Mapping[str, Tensor]] = []
        try:
            for edit in edits:
                self._put_on(edit)
                kept.append(self.entries[-1].kept)
            return [entry.before for entry in self.entries[len(entries) :]]
        finally:
            for tensors in reversed(kept):
                _restore(self.model, tensors)
            self.entries[:] = entries

    def _put_on(self, edit: Content, checked: bool = True) -> None:
        """`apply` without a look at the other edits; unless `checked`, on weights that it was not made for, too."""
        model = self.model
        changes = changes_in(model, edit)
        before = {name: tensor_digest(model.weight(name)) for name in changes}
        if checked:
            self._check_fingerprints(edit, before)
        kept: dict[str, Tensor] = {}
        entries = list(self.entries)
        try:
            for name, deltas in changes.items():
                weight = model.weight(name)
                kept[name] = weight.detach().clone()
                weights.add_(model, name, total(deltas))
                if not torch.isfinite(weight).all():
                    raise EditMismatch(
                        f"{edit} does not fit into {name}: {weight.dtype} overflows. Load the model in a wider dtype"
                    )
            after = {name: tensor_digest(model.weight(name)) for name in changes}
            self.entries.append(Entry(edit, kept, before, after))
        except BaseException:
            _restore(model, kept)
            self.entries[:] = entries
            raise
        _undone.setdefault(model, set()).discard(edit.id)

    def _undo_after(self, error: BaseException, edit: Content) -> None:
        """Undo an edit after an error, which says so if that is refused."""
        try:
            self.undo(edit)
        except EditStateError as refused:
            if str(refused) == str(error):
                return
            if hasattr(error, "add_note"):
                error.add_note(f"Besides, {refused}")
            elif error.__context__ is None:  # Python 3.10
                refused.__context__ = None
                error.__context__ = refused

    # ---- what fits, and what must be undone first -----------------------------------------------------

    def _check_fingerprints(self, edit: Content, now: Mapping[str, str]) -> None:
        """Check that the weights, as they are or as they were unedited, are the ones that an edit was made for."""
        model = self.model
        for name, digest in now.items():
            if edit.fingerprints[name] == digest:
                continue
            left = self._left_by_edits(name)
            if left not in (None, digest):
                raise EditMismatch(
                    f"{edit} cannot go on {model.name!r}: something other than an edit has changed {name} since the "
                    "last edit went on. Load the model again"
                )
            if edit.fingerprints[name] != self._unedited(name, digest):
                raise EditMismatch(
                    f"{edit} was made for other weights: {name} of {model.name!r} has not the bytes (or "
                    f"the dtype) that it had in {edit.model!r}. {made_for(edit)}, in that dtype; apply first the edits "
                    "that it was made after; or make it again for this one"
                )

    def _fits(self, edit: Content) -> bool:
        """Whether an edit's fingerprints are those of the model, as it is or as it was before any edit."""
        try:
            digests = {name: tensor_digest(self.model.weight(name)) for name in changes_in(self.model, edit)}
            self._check_fingerprints(edit, digests)
        except EditMismatch:
            return False
        return True

    def _left_by_edits(self, name: str) -> str | None:
        """The digest of a weight as the last edit that touched it left it; None if none has."""
        weight = self.model.weight(name)
        afters = [e.after[other] for e in self.entries for other in e.after if self.model.weight(other) is weight]
        return afters[-1] if afters else None

    def _unedited(self, name: str, now: str) -> str:
        """The digest of a weight as it was before any edit; `now`, if none has touched it."""
        weight = self.model.weight(name)
        befores = (e.before[other] for e in self.entries for other in e.before if self.model.weight(other) is weight)
        return next(befores, now)

    def _require_untouched(self, edit: Content, entries: Sequence[Entry]) -> None:
        """Check that only edits have changed the weights of these entries."""
        model = self.model
        latest = {id(model.weight(name)): (name, digest) for entry in entries for name, digest in entry.after.items()}
        for name, digest in latest.values():
            if tensor_digest(model.weight(name)) != digest:
                raise EditStateError(
                    f"{edit} cannot be undone: something other than an edit has changed {name} since, "
                    "and undoing would throw that away. Load the model again"
                )

    def _place(self, edit: Content) -> int:
        """Index of an edit's entry, or an error that says why it has none."""
        place = next((i for i, entry in enumerate(self.entries) if entry.edit == edit), None)
        if place is None:
            raise EditStateError(self._why_not_applied(edit))
        return place

    def _why_not_applied(self, edit: Content) -> str:
        name = self.model.name
        if edit.id in _undone.get(self.model, ()):
            return f"{edit} has been undone on {name!r} already. There is nothing left to undo"
        for other in list(_undone):
            if other is not self.model and Stack(other).holds(edit):
                return f"{edit} is applied to another model, {other.name!r}, not to this {name!r}. Undo it there"
        return f"{edit} is not applied to {name!r}, so it cannot be undone. Apply it first"

    def _warn_of_start_token(self, edit: Content) -> None:
        """Warn if texts begin with another start token than they did when the edit was made."""
        made_with, now = edit.notes.get("start_token", ""), self.model.start_token
        if edit.rewrites and made_with != now:
            made, has = (f"the start token {token!r}" if token else "no start token" for token in (made_with, now))
            warnings.warn(
                f"{edit} was made with {made}, and {self.model.name!r} was loaded with {has}, so its prompts are other "
                f"tokens here and the edit may not show: load the model with start_token={made_with or None!r} "
                "(--start-token)",
                StartTokenDiffers,
                stacklevel=3,
            )


def _restore(model: Model, kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in kept.items():
            model.weight(name).copy_(tensor)
