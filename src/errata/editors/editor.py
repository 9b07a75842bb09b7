"""An editor: a method with its settings, ready for one model, which it leaves unchanged."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import torch

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, ErrataError, FactError
from errata.base.facts import Rewrite
from errata.editors.side_effects import Bound, with_side_effects
from errata.edits.edit import Edit
from errata.edits.ledger import ContradictoryEdits
from errata.models.model import Model


@dataclass(frozen=True)
class Step:
    """Progress of the work on one rewrite: one step.

    Attributes:
        index, steps: step number `index`, from 0, of at most `steps`.
        loss: the loss in nats; None if the method has none.
        fact, facts: the rewrite is number `fact`, from 0, of the `facts` rewrites of the call.
    """

    index: int
    steps: int
    loss: float | None
    fact: int = 0
    facts: int = 1


Progress = Callable[[Any], None]  # called with a `Step`, or with a subclass that has more numbers


class Make(Protocol):
    """Computes the edits of rewrites on a model; an edit that cannot be made is replaced by its error."""

    def __call__(
        self, model: Model, rewrites: Sequence[Rewrite], *, progress: Progress | None = None
    ) -> list[Edit | ErrataError]:
        """The edits, in the order of the rewrites."""


@dataclass(frozen=True, eq=False)
class Editor:
    """A method with its settings, ready for one model; call it with rewrites.

    Attributes:
        method: name of the method, such as "rome".
        config: everything that its edits depend on besides the model and the rewrites, JSON-able.
        make: computes the edits of rewrites, each independent of the others. `evaluate` calls it.
        together: computes the edits of rewrites that will be applied together; None: the same as `make`.
        model: the model that a call edits; None once the editor is sent to another process.
        trained_on: `fact_key` of the facts that the editor was trained on.
        bound: how side effects are measured, and how large they may be; None: they are not measured.
        seed: seed of the reference texts on which side effects are measured.
        layer_by: description of how the edited layer was chosen; "" if the method has no layer.
    """

    method: str
    config: Mapping[str, Any]
    make: Make
    together: Make | None = None
    model: Model | None = field(default=None, repr=False)
    trained_on: frozenset[str] = frozenset()
    bound: Bound | None = None
    seed: int = 0
    layer_by: str = ""

    @overload
    def __call__(self, rewrites: Rewrite, **options: Any) -> Edit: ...

    @overload
    def __call__(
        self, rewrites: Sequence[Rewrite], *, errors: Literal["raise"] = "raise", **options: Any
    ) -> list[Edit]: ...

    @overload
    def __call__(
        self, rewrites: Sequence[Rewrite], *, errors: Literal["keep"], **options: Any
    ) -> list[Edit | ErrataError]: ...

    def __call__(self, rewrites: Any, *, errors: Literal["raise", "keep"] = "raise", **options: Any) -> Any:
        """The edit of a rewrite, or a list of edits for a list of rewrites. The model is left unchanged.

        Args:
            rewrites: a fact with its new object, or a list of such.
            errors: "raise" the first error; or "keep" each in the place of the edit that could not be made.
            **options: `sequential`, `force`, `progress`, as of `Method`.

        Raises:
            ErrataError: why the first edit that failed could not be made.
        """
        if errors not in ("raise", "keep"):
            raise ConfigError(f"`errors` is {errors!r}: use 'raise' or 'keep'")
        one = not isinstance(rewrites, (list, tuple))
        wanted = [rewrites] if one else list(rewrites)
        for rewrite in wanted:
            if not isinstance(rewrite, Rewrite):
                raise FactError(
                    f"{self.method} takes a Rewrite or a list of them, not a {type(rewrite).__name__}: "
                    "write fact.rewrite('Paris')"
                )
        edits = self._edits(wanted, stop=errors == "raise", **options)
        return edits[0] if one else edits

    @without_autocast
    @torch.inference_mode(False)  # callers in inference mode get gradients too
    def _edits(
        self,
        rewrites: Sequence[Rewrite],
        *,
        stop: bool,
        sequential: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> list[Edit | ErrataError]:
        if self.model is None:
            raise ConfigError(f"this {self.method} editor has no model: make one with errata.editor(model, ...)")
        if sequential:
            return self._in_sequence(self.model, rewrites, stop, force, progress)
        edits = self._examined(self.model, rewrites, force, progress) if rewrites else []
        return _raise_first(edits) if stop else edits

    def _examined(
        self, model: Model, rewrites: Sequence[Rewrite], force: bool, progress: Progress | None
    ) -> list[Edit | ErrataError]:
        edits = (self.together or self.make)(model, rewrites, progress=progress)
        return edits if self.bound is None else with_side_effects(model, edits, self.bound, self.seed, force)

    def _in_sequence(
        self, model: Model, rewrites: Sequence[Rewrite], stop: bool, force: bool, progress: Progress | None
    ) -> list[Edit | ErrataError]:
        """Each edit made while the earlier ones are applied."""
        edits: list[Edit | ErrataError] = []
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", ContradictoryEdits)  # overriding an earlier edit is the purpose here
            for number, rewrite in enumerate(rewrites):

                def tell(step: Step, number: int = number) -> None:
                    if progress is not None:
                        progress(dataclasses.replace(step, fact=number, facts=len(rewrites)))

                edits += self._examined(model, [rewrite], force, tell)
                if stop:
                    _raise_first(edits[-1:])
                edit = edits[-1]
                if isinstance(edit, Edit) and edit not in edits[:-1]:  # else both change nothing
                    stack.enter_context(edit.applied(model))
        return edits

    def without_model(self) -> Editor:
        """The same editor without its model, to send to another process."""
        return dataclasses.replace(self, model=None)


def _raise_first(edits: list[Edit | ErrataError]) -> list[Edit | ErrataError]:
    """The edits.

    Raises:
        ErrataError: the first error among them.
    """
    for edit in edits:
        if isinstance(edit, ErrataError):
            raise edit
    return edits
