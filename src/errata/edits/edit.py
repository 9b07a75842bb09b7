"""An edit: a small object that can be applied to a model, undone bit for bit, combined with others, and saved.

Making an edit does not change the model. The edit records the fingerprints of the weights that it was made for, and
cannot be applied to others. Combining, scaling, truncating and restricting give a new edit, whose notes record what it
was made from. `stack.py` applies and undoes edits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, EditFileError, EditMismatch, ErrataError
from errata.base.facts import Rewrite
from errata.base.fingerprint import tensor_digest
from errata.base.parsing import taking_apart
from errata.edits import files, lora
from errata.edits.content import COMBINED, Content
from errata.edits.contradictions import warn_of_contradictions
from errata.edits.delta import Delta, Dense, lost, total
from errata.edits.fit import changes_in, layout_of
from errata.edits.stack import Stack
from errata.models import weights
from errata.models.model import Model

# Notes on what an edit does; they do not hold for an edit derived from it.
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


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Content):
    """A change of a model's weights that can be applied, undone and saved. Immutable; equal if the content is equal.

    Its attributes are those of `Content`. Editors make edits, as `errata.rome` does; `Edit.of` makes one from deltas.
    """

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
        layout = layout_of(model, deltas)
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

    # ---- edits of edits --------------------------------------------------------------------------------

    @classmethod
    @checked(edits=["Edit"], model="Model")
    @without_autocast
    def combine(cls, edits: Iterable[Edit], model: Model | None = None) -> Edit:
        """One edit with the effect of these edits, applied one after the other.

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
        fingerprints = _joined_fingerprints(
            edits, [{}] * len(edits) if model is None else Stack(model).states_before(edits)
        )
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
        """The edit with every ΔW multiplied by `factor`: 0.5 is half of it, -1 its opposite.

        Raises:
            ConfigError: if the factor is not a finite number, or too large.
        """
        return self._derived([delta.scaled(factor) for delta in self.deltas], {"scaled": factor})

    @checked(model="Model")
    @without_autocast
    def restricted(self, layers: Iterable[int], model: Model) -> Edit:
        """The edit with only its changes in these layers, counted from 0 as in `model`.

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
        """The edit with every dense change truncated to this rank by SVD; others stay.

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

    def _derived(self, deltas: Sequence[Delta], step: Mapping[str, Any], **changes: Any) -> Edit:
        """This edit with other deltas. Its notes record the step, and lose what was measured of this edit."""
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

    def _as_part(self) -> dict[str, Any]:
        """Record of this edit in a combined one, besides deltas and rewrites."""
        own: dict[str, Any] = {"id": self.id, "method": self.method, "seed": self.seed, "config": self.config}
        counts = {"deltas": len(self.deltas), "rewrites": len(self.rewrites)}
        derived = {"derived": self.notes["derived"]} if "derived" in self.notes else {}
        return {**own, **counts, **derived}

    # ---- on a model ------------------------------------------------------------------------------------

    @checked(model="Model")
    def apply(self, model: Model) -> None:
        """Apply the edit to the model, completely or (on any error) not at all. Signals such as Ctrl-C wait meanwhile.

        It fits if every touched weight is, byte for byte, what it was when the edit was made: now, or before
        any edit was applied, if nothing but edits has changed it since. So edits made for the unedited model
        stack, and so do edits made one after the other. W + ΔW is computed in float32 at least and rounded once
        to the weight's dtype.

        Warns with `ContradictoryEdits` if an applied edit gives one of its prompts another object.

        Raises:
            EditMismatch: if a weight is missing, has another shape or other bytes, or cannot hold the sum.
            EditStateError: if this edit is applied to the model already.
        """
        Stack(model).apply(self)

    @checked(model="Model")
    def undo(self, model: Model) -> None:
        """Undo the edit: restore the changed weights byte for byte.

        Raises:
            EditStateError: if the edit is not applied to this model, has been undone, is not the last one
                applied, or if something else has changed the weight since.
        """
        Stack(model).undo(self)

    @checked(model="Model")
    def remove(self, model: Model, *, force: bool = False) -> None:
        """Remove the edit from among others, or (on any error) change nothing.

        The kept bytes are put back and the edits that were applied after it are applied again in their order:
        to the last bit the same as if this one had never been there.

        Args:
            model: the model to which it is applied.
            force: put edits on again, too, that were made for weights with this one in them, and so do, without it,
                something else than what they were made to do. Otherwise they are refused.

        Raises:
            EditStateError: if the edit is not applied to this model, has been undone, if a later edit was made
                for weights with this one in them, or if something else has changed a weight since.
            EditMismatch: if a later edit, without this one, no longer fits into the weight's dtype.
        """
        Stack(model).remove(self, force=force)

    @checked(model="Model")
    def applied(self, model: Model) -> contextlib.AbstractContextManager[Model]:
        """Context in which the edit is applied to the model.

        However the block ends, Ctrl-C at any moment included, the edit comes off. An error of the block stays the one
        that is raised, with a note if the edit cannot be undone.

        Raises:
            EditMismatch, EditStateError: as `apply` and `undo`.
        """
        return Stack(model).applied(self)

    @checked(model="Model")
    @without_autocast
    def relative_norm(self, model: Model) -> float:
        """‖ΔW‖ / ‖W‖ in Frobenius norms, over all touched weights together, W as it is now.

        Raises:
            EditMismatch: if a weight is missing or has another shape.
        """
        changes = changes_in(model, self)
        size = math.hypot(*(float(model.weight(name).detach().double().norm()) for name in changes))
        change = math.hypot(*(d[0].norm() if len(d) == 1 else float(total(d).norm()) for d in changes.values()))
        return change / size if size else math.inf

    @checked(model="Model")
    @without_autocast
    def rounding(self, model: Model) -> float:
        """‖(Ŵ − W) − ΔW‖ / ‖ΔW‖ over all changed weights together: the error of rounding to their dtypes.

        W is the weight as it is now. 0 if the edit changes nothing.

        Raises:
            EditMismatch: if a weight is missing or has another shape.
        """
        errors, sizes = [], []
        for name, deltas in changes_in(model, self).items():
            stored = weights.matrix(model, name).detach()
            change = total(deltas).to(stored.device)
            held = (stored + change).to(stored.dtype)
            errors.append(float((held.double() - stored.double() - change.double()).norm()))
            sizes.append(float(change.double().norm()))
        return math.hypot(*errors) / math.hypot(*sizes) if any(sizes) else 0.0

    # ---- files -----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with readable metadata, atomically.

        Raises:
            OutputError: if the file cannot be written.
        """
        files.write(path, {"id": self.id, **self.header(), "source": self.source}, self.deltas)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """The edit in a file. Nothing in the file is executed, and the content is checked against its id.

        Raises:
            EditFileError: if the file is missing, cut short, not ours, of a newer format, broken or
            tampered with.
        """
        header, deltas = files.read(path)
        edit = cls.from_header(header, deltas, path)
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
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(hf, folder)` loads, atomically.

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
            changes_in(model, self)
            layout, source = layout_of(model, self.deltas), model.source or source
        if shared := layout.get("shared"):
            raise ConfigError(
                f"{shared[0]} is shared with another module, and an adapter would change it in one of the two places. "
                "Write the whole model, merged"
            )
        written = self if rank is None else self.truncated(rank)
        lora.write(
            folder,
            written.deltas,
            {"id": written.id, **written.header(), "source": source},
            base=source.get("path") or source.get("hub") or self.model,
            revision=source.get("revision"),
            transposed=bool(layout.get("transposed")),
        )
        return {name: lost(deltas, [d for d in written.deltas if d.weight == name]) for name, deltas in whole.items()}

    @classmethod
    @checked(model="Model")
    @without_autocast
    def from_lora(cls, folder: str | Path, model: Model) -> Edit:
        """An edit for this model from a plain LoRA adapter. No code is run, and PEFT is not needed.

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
            edit = cls.from_header(header, deltas, folder)
        changes_in(model, edit)
        return edit


def _start_token(token: str) -> dict[str, str]:
    """Note of an edit on the start token that it was made with; none without one."""
    return {"start_token": token} if token else {}


def _joined_fingerprints(edits: Sequence[Edit], states: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Fingerprint of each weight in the first edit that touches it.

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
