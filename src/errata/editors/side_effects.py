"""Side effects of new edits: measured in the same way for every editor, stored in the edit, and bounded.

Each edit is compared with the unedited model on reference texts that have nothing to do with its fact. An edit that
moves their next-token distributions beyond the bound disables the model and is refused, unless it is forced.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from errata.base.errors import DisablingEdit, EditMismatch, ErrataError
from errata.base.facts import Rewrite
from errata.edits.edit import Edit
from errata.edits.ledger import ContradictoryEdits
from errata.metrics import side_effects
from errata.models.model import Model
from errata.models.scoring import score


@dataclass(frozen=True)
class Bound:
    """A bound on side effects: how they are measured, and how large they may be.

    Attributes:
        max_drift: largest allowed KL(before ‖ after) on the reference texts, mean over tokens, in nats.
        probes: reference texts; None: four samples of the model's own.
        essence: prompt with `{}` for the subject, on which essence drift is measured.
    """

    max_drift: float = side_effects.MAX_DRIFT
    probes: tuple[str, ...] | None = None
    essence: str = side_effects.ESSENCE


def with_side_effects(
    model: Model, edits: Sequence[Edit | ErrataError], bound: Bound, seed: int, force: bool
) -> list[Edit | ErrataError]:
    """The edits with their side effects in `notes["health"]`; an edit that disables the model becomes an error.

    An edit of several rewrites reports the one that is least probable after it, and in `notes["written"]` the
    probability of each new object before and after.

    Args:
        model: the model without the edits.
        edits: edits, each to be measured as if it were the only one, and errors, which stay.
        bound: how to measure, and the limit.
        seed: seed of the reference texts, if the model samples them.
        force: keep edits that disable the model.
    """
    written: dict[Edit, list[tuple[float, float]]] = {}
    failed: dict[Edit, ErrataError] = {}
    for edit in dict.fromkeys(edit for edit in edits if isinstance(edit, Edit)):
        before = _probabilities(model, edit.rewrites)
        try:
            with _silently(), edit.applied(model):
                written[edit] = list(zip(before, _probabilities(model, edit.rewrites), strict=True))
        except EditMismatch as error:
            failed[edit] = error
    least = {edit: min(range(len(pairs)), key=lambda i: pairs[i][1]) for edit, pairs in written.items()}
    found: dict[Edit, Edit | ErrataError] = {**failed}
    if written:
        texts = bound.probes or side_effects.sampled_texts(model, seed)
        measured = side_effects.side_effects_of(
            model,
            [edit.rewrites[least[edit]] for edit in written],
            list(written),
            [written[edit][least[edit]] for edit in written],
            texts=texts,
            before=side_effects.predict_texts(model, texts),
            essence=bound.essence,
            max_drift=bound.max_drift,
        )
        for edit, its in zip(written, measured, strict=True):
            if its.disabling and not force:
                found[edit] = _refusal(edit, edit.rewrites[least[edit]], its)
                continue
            notes = {"health": {"relative_norm": edit.relative_norm(model), **its.as_dict()}}
            more = {"written": written[edit]} if len(edit.rewrites) > 1 else {}
            found[edit] = dataclasses.replace(
                edit,
                config={**edit.config, "max_drift": bound.max_drift, "probes": bound.probes},
                notes={**edit.notes, **notes, **more},
            )
    return [found[edit] if isinstance(edit, Edit) else edit for edit in edits]


@contextmanager
def _silently() -> Iterator[None]:
    """Without the warning that an edit overrides one that is applied: here it does so for a moment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContradictoryEdits)
        yield


def _probabilities(model: Model, rewrites: Sequence[Rewrite]) -> list[float]:
    """Probability of each new object after its prompt."""
    scores = score(
        model,
        [rewrite.text for rewrite in rewrites],
        [rewrite.new_object for rewrite in rewrites],
        [rewrite.separator for rewrite in rewrites],
    )
    return [math.exp(each.total) for each in scores]


def _refusal(edit: Edit, rewrite: Rewrite, measured: side_effects.SideEffects) -> DisablingEdit:
    advice = "key='consistent', more text for the second moment, another layer or more prefixes"
    return DisablingEdit(
        f"the edit of {rewrite.text!r} to {rewrite.new_object!r} by {edit.method} would disable the model: its "
        f"predictions on unrelated texts move by {measured.drift:.3g} nats per token, beyond the bound of "
        f"{measured.max_drift:g} (perplexity there: {measured.perplexity_before:.3g} before, "
        f"{measured.perplexity_after:.3g} after). Try "
        f"{advice if edit.method == 'rome' else 'other settings or another editor'}; or make it all the same with "
        "force=True (--force)"
    )
