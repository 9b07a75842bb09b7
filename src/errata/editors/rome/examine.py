"""An edit under examination: put on the model for a moment, to see how exactly it holds and what else it moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.base.errors import DisablingEdit, EditMismatch
from errata.base.facts import Rewrite
from errata.base.interrupt import unbroken
from errata.editors.rome import insert
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.key import Keys
from errata.edits.delta import RankOne
from errata.metrics import health
from errata.models.model import Model
from errata.models.weights import add_, matrix


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

    def examine(self, change: RankOne, rewrite: Rewrite, anchor: Keys, delta: Tensor, force: bool) -> dict[str, Any]:
        """`residual` and `rounding` of a change on the model (see `insert.constraint`), and its `health`.

        Raises:
            EditMismatch: if the weight's dtype cannot hold the change.
            DisablingEdit: if it moves everything, and is not forced.
        """
        essence, max_drift = self.config.kl_prompt, self.config.max_drift
        asked = health.ask(self.model, rewrite, essence) if self.before else None
        with _tried(self.model, change) as (old, new):
            seen: dict[str, Any] = insert.constraint(old, new, change, anchor, delta)
            if asked and self.before and max_drift is not None:
                again = health.ask(self.model, rewrite, essence), health.probe(self.model, self.probes)
                found = health.compare((asked, again[0]), (self.before, again[1]), max_drift)
                seen["health"] = {"relative_norm": change.norm() / float(old.float().norm()), **found.as_dict()}
                if found.disabling and not force:
                    raise _refusal(rewrite, found)
        return seen


@unbroken
def _tried(model: Model, change: RankOne) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight `[d_out, d_in]` without and with the change, which is on the model as long as the block runs.

    As `Edit.applied`, byte for byte, without its fingerprints: nobody else can touch the model meanwhile.
    """
    weight = matrix(model, change.weight).detach()
    old = weight.clone()
    try:
        add_(model, change.weight, change.matrix())
        if not torch.isfinite(weight).all():
            raise EditMismatch(
                f"the edit does not fit into {change.weight}: {weight.dtype} overflows. Load the model in a wider dtype"
            )
        yield old, weight
    finally:
        weight.copy_(old)


def _refusal(rewrite: Rewrite, found: health.Health) -> DisablingEdit:
    return DisablingEdit(
        f"the edit of {rewrite.text!r} to {rewrite.new_object!r} would disable the model: what it says of texts that "
        "have "
        f"nothing to do with it moves by {found.drift:.3g} nats per token, beyond the bound of {found.max_drift:g} "
        "(their "
        f"perplexity goes from {found.perplexity_before:.3g} to {found.perplexity_after:.3g}). Try key='consistent', "
        "more "
        "text for the second moment, another layer or more prefixes; or make it all the same with force=True (--force)"
    )
