"""What all editors are to those who use them: settings that can be told, and a function from rewrites to edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ErrataError
from errata.base.facts import Rewrite
from errata.edits.edit import Edit
from errata.models.model import Model

Make = Callable[[Model, Sequence[Rewrite]], "list[Edit | ErrataError]"]


@dataclass(frozen=True)
class Editor:
    """A method with its settings, ready for one model.

    Attributes:
        method: its name, such as "rome".
        config: all that its edits depend on beside the model and the rewrites, JSON-able.
        make: gives the edit of each rewrite, as if it were alone, or why there is none; the model is left as it was.
        seen: `fact_key` of the facts that it was trained on, if it was trained.
    """

    method: str
    config: Mapping[str, Any]
    make: Make
    seen: frozenset[str] = frozenset()

    @overload
    def edit(self, model: Model, rewrites: Rewrite) -> Edit: ...

    @overload
    def edit(self, model: Model, rewrites: Sequence[Rewrite]) -> list[Edit]: ...

    @checked(model="Model")
    @without_autocast
    def edit(self, model: Model, rewrites: Rewrite | Sequence[Rewrite]) -> Edit | list[Edit]:
        """The edit of a rewrite, or those of several, each as if it were alone; the model is left as it was.

        Raises:
            ErrataError: why there is no edit, of the first rewrite that has none.
        """
        wanted = [rewrites] if isinstance(rewrites, Rewrite) else list(rewrites)
        found = []
        for each in self.make(model, wanted):
            if isinstance(each, ErrataError):
                raise each
            found.append(each)
        return found[0] if isinstance(rewrites, Rewrite) else found
