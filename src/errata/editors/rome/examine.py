"""An edit under examination: put on the model for a moment, to see how exactly it holds and what else it moves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from errata.base.errors import DisablingEdit
from errata.editors.rome import insert
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.key import Keys
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.metrics import health
from errata.models.model import Model
from errata.models.weights import matrix


@dataclass(frozen=True)
class Examiner:
    """What edits of one model are compared with.

    Attributes:
        model: as it stands before the edits.
        config: theirs.
        probes: texts on which drift is measured.
        before: what the model says of them; None if drift is not to be measured.
    """

    model: Model
    config: RomeConfig
    probes: tuple[str, ...]
    before: health.Probed | None

    @classmethod
    def of(cls, model: Model, config: RomeConfig, seed: int) -> Examiner:
        """What the model says now, of the config's probe texts or of samples of its own."""
        if config.max_drift is None:
            return cls(model, config, (), None)
        probes = config.probes or health.sampled_probes(model, seed)
        return cls(model, config, probes, health.probe(model, probes))

    def examined(self, edit: Edit, anchor: Keys, delta: Tensor, force: bool) -> Edit:
        """The edit with what was seen in its notes.

        Raises:
            DisablingEdit: if it moves everything, and is not forced.
        """
        (change,), (rewrite,), essence = edit.deltas, edit.rewrites, self.config.kl_prompt
        assert isinstance(change, RankOne)  # insert
        old = matrix(self.model, change.weight).detach().clone()
        asked = health.ask(self.model, rewrite, essence) if self.before else None
        with edit.applied(self.model):
            new = matrix(self.model, change.weight).detach()
            seen: dict[str, Any] = insert.constraint(old, new, change, anchor, delta)
            if asked and self.before and self.config.max_drift is not None:
                again = health.ask(self.model, rewrite, essence), health.probe(self.model, self.probes)
                found = health.compare((asked, again[0]), (self.before, again[1]), self.config.max_drift)
                seen["health"] = {"relative_norm": change.norm() / float(old.double().norm()), **found.as_dict()}
                if found.disabling and not force:
                    raise _refusal(edit, found)
        return dataclasses.replace(edit, notes={**edit.notes, **seen})


def _refusal(edit: Edit, found: health.Health) -> DisablingEdit:
    return DisablingEdit(
        f"{edit} would disable the model: what it says of texts that have nothing to do with it moves by "
        f"{found.drift:.3g} nats per token, beyond the bound of {found.max_drift:g} (their perplexity goes from "
        f"{found.perplexity_before:.3g} to {found.perplexity_after:.3g}). Try key='consistent', more text for the "
        "second "
        "moment, another layer or more prefixes; or make it all the same with force=True (--force)"
    )
