"""An edit under examination: put on the model for a moment, to see how exactly it holds and what else it moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
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

    def examine(
        self, parts: Sequence[tuple[RankOne, Keys, Tensor]], rewrites: Sequence[Rewrite], force: bool
    ) -> dict[str, Any]:
        """`residual` and `rounding` of changes on the model (see `insert.constraint`), the larger of several parts, and
        the edit's `health`; of several rewrites, that of the one that is least probable after it, and `written`, the
        probability of each before and after.

        Args:
            parts: change, anchor and δ for each weight.
            rewrites: of the edit.
            force: keep an edit that disables the model.

        Raises:
            EditMismatch: if a weight's dtype cannot hold the change.
            DisablingEdit: if the edit moves everything, and is not forced.
        """
        essence, max_drift = self.config.kl_prompt, self.config.max_drift
        asked = [health.ask(self.model, rewrite, essence) for rewrite in rewrites] if self.before else []
        with ExitStack() as stack:
            weights = [stack.enter_context(_tried(self.model, change)) for change, _, _ in parts]
            exact = [
                insert.constraint(old, new, change, anchor, delta)
                for (old, new), (change, anchor, delta) in zip(weights, parts, strict=True)
            ]
            seen: dict[str, Any] = {name: max(each[name] for each in exact) for name in exact[0]}
            if asked and self.before and max_drift is not None:
                again = [health.ask(self.model, rewrite, essence) for rewrite in rewrites]
                least = min(range(len(again)), key=lambda i: again[i].probability)
                probed = health.probe(self.model, self.probes)
                found = health.compare((asked[least], again[least]), (self.before, probed), max_drift)
                norm = max(
                    change.norm() / float(old.float().norm())
                    for (old, _), (change, _, _) in zip(weights, parts, strict=True)
                )
                seen["health"] = {"relative_norm": norm, **found.as_dict()}
                if len(rewrites) > 1:
                    seen["written"] = [[b.probability, a.probability] for b, a in zip(asked, again, strict=True)]
                if found.disabling and not force:
                    raise _refusal(rewrites[least], found)
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
