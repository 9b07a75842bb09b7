"""Training of an editor. A step depends only on the seed and its number, so a stopped training continues exactly.

The folder holds `training.safetensors`, everything needed to continue, and `editor.safetensors`, the best network so
far by the loss on the validation set. Both are written atomically: a kill loses only the steps since the last
checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from errata.base.autocast import without_autocast
from errata.base.config import Config
from errata.base.errors import ConfigError, Diverged, FactError, ResultFileError
from errata.base.interrupt import deferred_interrupt
from errata.base.parsing import of_type, taking_apart
from errata.base.seeds import derive
from errata.base.tensor_files import read_tensors, write_tensors
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.network import Network
from errata.editors.hypernetworks.objective import EncodedExample, Place, backward, losses
from errata.editors.hypernetworks.training_examples import TrainingExample, keys, sha256
from errata.editors.texts import text_of
from errata.models.fingerprint import weights_digest
from errata.models.model import Model

KIND, VERSION = "training", 1
STATE, EDITOR = "training.safetensors", "editor.safetensors"

LEARNING_RATE = {"mend": 1e-6, "ke": 3e-4}


class TrainingConfig(Config):
    """Settings of `train`, validated and immutable."""

    steps: int = Field(100_000, ge=1, description="Maximum number of training steps.")
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of Adam; None: MEND 1e-6, KE 3e-4, as published."
    )
    batch: int = Field(10, ge=1, description="Training examples per step (published: 10).")
    c_edit: float = Field(0.1, ge=0, description="Factor of the loss on the edit (published: 0.1).")
    c_loc: float = Field(
        1.0, ge=0, description="Factor of the divergence on texts that should not change (published: 1)."
    )
    clip: float = Field(
        100.0,
        gt=0,
        description="Largest norm of the gradient; a longer gradient is scaled down to it (published: 100).",
    )
    validate_every: int = Field(
        500, ge=1, description="Steps between validations; a checkpoint is written at each of them."
    )
    validation: int = Field(100, ge=1, description="Size of the validation set.")
    patience: int = Field(10, ge=1, description="Stop after this many validations in a row without a better loss.")
    max_minutes: float | None = Field(
        None, gt=0, description="Stop after this many minutes of training, summed over all runs; None: no limit."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the initial weights, of the validation set, and of which examples each step has."
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> TrainingConfig:
        if not self.c_edit:
            raise ValueError("c_edit is 0: then no edit is best, and nothing is learnt. Give it a weight")
        return self


@dataclass(frozen=True)
class Validation:
    """Quality of the network on the validation set.

    Attributes:
        step: number of steps so far.
        loss: c_edit · edit + c_loc · locality.
        edit, locality: as in `objective.Losses`, means.
        success: share of examples for which the model says the new object after the equivalent prompt.
    """

    step: int
    loss: float
    edit: float
    locality: float
    success: float


@dataclass(frozen=True)
class Curve:
    """History of a training: losses and validations.

    Attributes:
        edit, locality: losses of each step before its update, means over its examples.
        validations: validations in order, the first before any step.
        ended: the reason of the end: "steps", "patience", "minutes", "diverged"; None before the end.
    """

    edit: tuple[float, ...] = ()
    locality: tuple[float, ...] = ()
    validations: tuple[Validation, ...] = ()
    ended: str | None = None

    @property
    def best(self) -> Validation:
        """The validation with the lowest loss."""
        return min(self.validations, key=lambda each: each.loss)


_IN_WORDS = {"lessons": "training examples"}  # keys of a stored training, in messages
Progress = Callable[[int, int, Curve], None]


@without_autocast
def train(
    model: Model,
    method: str,
    examples: Sequence[TrainingExample],
    folder: str | Path,
    config: TrainingConfig | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train an editor for a model, or continue a stopped training.

    Args:
        model: the model; left unchanged.
        method: "mend" or "ke".
        examples: some of them, drawn by the seed, are the validation set.
        folder: for checkpoints and the result.
        config: settings of the training.
        settings: settings of the method's network.
        progress: called after each step with (step, of, curve so far); of a training by the clock, of as many as there
            seems to be time for.

    Returns:
        The best network by validation, which is also the folder's `editor.safetensors`.

    Raises:
        ConfigError: if a setting is not valid, or there are too few training examples.
        FactError: if an example's text is too long for the model, or nothing is left of a target.
        ResultFileError: if the folder holds another training.
        Diverged: if a loss is not a finite number; the best network so far is kept.
        KeyboardInterrupt: at Ctrl-C, once the steps so far are kept; at a second one, at once.
    """
    config = config or TrainingConfig.model_validate({})
    run = _Run.begun(model, method, examples, Path(folder), config, settings or {})
    with deferred_interrupt() as stop_here:
        while run.curve.ended is None:
            run.step()  # cut short in the middle it leaves nothing to keep but the last checkpoint
            try:
                if progress is not None:
                    progress(run.done, run.expected, run.curve)
                stop_here()
            except KeyboardInterrupt:
                run.save()
                raise
    if run.curve.ended == "diverged":
        best = run.curve.best
        raise Diverged(
            f"training {method} met a loss that is not a finite number after {run.done} steps. The network of step "
            f"{best.step}, with a validation loss of {best.loss:.3g}, is kept in {run.folder / EDITOR}; a lower "
            "learning_rate may go on longer"
        )
    return Trained.load(run.folder / EDITOR)


def curve_of(folder: str | Path) -> Curve:
    """History of the training in a folder, so far.

    Raises:
        ResultFileError: if there is none.
    """
    header, tensors = read_tensors(Path(folder) / STATE, KIND, VERSION, ResultFileError)
    with taking_apart(Path(folder) / STATE, "a whole training", advice="Begin again in another folder"):
        return _curve(header, tensors)


def _curve(header: dict[str, Any], tensors: dict[str, Tensor]) -> Curve:
    validations = tuple(Validation(**each) for each in header["validations"])
    for each in validations:
        of_type(each.step, int)
        of_type([each.loss, each.edit, each.locality, each.success], list[float])
    of_type(header["ended"], Literal["steps", "patience", "minutes", "diverged"] | None)
    return Curve(
        tuple(tensors["log.edit"].tolist()), tuple(tensors["log.locality"].tolist()), validations, header["ended"]
    )


@dataclass
class _Run:
    """A training under way."""

    model: Model
    folder: Path
    config: TrainingConfig
    about: dict[str, Any]  # all that must be the same to go on
    network: Network
    place: Place
    training_set: Sequence[TrainingExample]
    validation_set: Sequence[EncodedExample]
    trained_on: frozenset[str]  # facts of the validation set too, which the network is chosen by
    adam: torch.optim.Adam
    curve: Curve = field(default_factory=Curve)
    seconds: float = 0.0
    edit: list[float] = field(default_factory=list)
    locality: list[float] = field(default_factory=list)
    begun_at: float = field(default_factory=time.monotonic)

    @classmethod
    def begun(
        cls,
        model: Model,
        method: str,
        examples: Sequence[TrainingExample],
        folder: Path,
        config: TrainingConfig,
        settings: dict[str, Any],
    ) -> _Run:
        if len(examples) <= config.validation:
            raise ConfigError(
                f"there are {len(examples)} training examples, and {config.validation} of them are for validation: "
                "give more, or take fewer for validation"
            )
        _require_readable(model, examples)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(derive(config.seed, "apart")))
        validation_set = [examples[i] for i in order[: config.validation].tolist()]
        training_set = [examples[i] for i in order[config.validation :].tolist()]
        network, place = _network(model, method, settings, config.seed)
        rate = config.learning_rate or LEARNING_RATE[method]
        adam = torch.optim.Adam(network.groups(rate))
        about = {
            "method": method,
            "network": network.config.model_dump(),
            "training": config.model_dump(exclude={"steps", "patience", "max_minutes"}),
            "model": model.name,
            "fingerprint": weights_digest(model.hf),
            "lessons": sha256(examples),
        }
        # Prompts of every kind in turn.
        encoded = [EncodedExample.of(model, example, i, i) for i, example in enumerate(validation_set)]
        run = cls(model, folder, config, about, network, place, training_set, encoded, frozenset(keys(examples)), adam)
        if (folder / STATE).is_file():
            run._go_on()
        else:
            if folder.is_dir() and not all(_begun_here(path.name) for path in folder.iterdir()):
                raise ResultFileError(f"{folder} holds other files: name an empty folder, or none, for a new training")
            run._validate()
        return run

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.edit)

    @property
    def expected(self) -> int:
        """Steps until the end, at the speed so far: as many as are allowed, or as time allows."""
        limit = self.config.max_minutes
        if limit is None or not self.done:
            return self.config.steps
        return min(self.config.steps, max(self.done, round(self.done * 60 * limit / self._elapsed())))

    def step(self) -> None:
        """Make one step, followed by a validation if one is due, or end the training."""
        if self.curve.ended is None and (why := self._over()):
            self._end(why)
            return
        self.network.train()
        self.adam.zero_grad(set_to_none=True)
        examples = self._drawn(self.done)
        found = backward(self.model, self.network, self.place, examples, self.config.c_edit, self.config.c_loc)
        edit, locality = float(found.edit.mean()), float(found.locality.mean())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not math.isfinite(edit + locality) or not torch.isfinite(norm):
            self._end("diverged")
            return
        self.adam.step()
        self.edit.append(edit)
        self.locality.append(locality)
        self.curve = Curve(tuple(self.edit), tuple(self.locality), self.curve.validations)
        if self.done % self.config.validate_every == 0:
            self._validate()

    def _over(self) -> str | None:
        """Why there is no further step, if there is none."""
        if self.done >= self.config.steps:
            return "steps"
        since = [each.loss for each in self.curve.validations]
        if len(since) > self.config.patience and min(since[-self.config.patience :]) > min(since):
            return "patience"
        limit = self.config.max_minutes
        return "minutes" if limit is not None and self._elapsed() > 60 * limit else None

    def _end(self, why: str) -> None:
        if why != "diverged" and (not self.curve.validations or self.curve.validations[-1].step < self.done):
            self._validate()
            if self.curve.ended:  # diverged, as was seen only now
                return
        self.curve = Curve(self.curve.edit, self.curve.locality, self.curve.validations, why)
        if why != "diverged":
            self.save()

    def _drawn(self, step: int) -> list[EncodedExample]:
        """The examples of a step, with which of their prompts and texts."""
        generator = torch.Generator().manual_seed(derive(self.config.seed, "step", step))
        count = min(self.config.batch, len(self.training_set))
        chosen = torch.randperm(len(self.training_set), generator=generator)[:count].tolist()
        which = torch.randint(2**31, (count, 2), generator=generator).tolist()
        return [
            EncodedExample.of(self.model, self.training_set[i], *places)
            for i, places in zip(chosen, which, strict=True)
        ]

    def _validate(self) -> None:
        """Measure, keep the network if it is the best so far, and write a checkpoint."""
        self.network.eval()
        parts = [
            self.validation_set[i : i + self.config.batch]
            for i in range(0, len(self.validation_set), self.config.batch)
        ]
        found = []
        with torch.no_grad():
            for examples in parts:
                found.append(losses(self.model, self.network, self.place, examples))
        edit = float(torch.cat([each.edit for each in found]).mean())
        locality = float(torch.cat([each.locality for each in found]).mean())
        success = float(torch.cat([each.success for each in found]).float().mean())
        loss = self.config.c_edit * edit + self.config.c_loc * locality
        if not math.isfinite(loss):
            if self.curve.validations:
                self._end("diverged")
                return
            raise Diverged(
                f"{self.about['method']} begins at a loss that is not a finite number: the model's own numbers "
                "overflow on these examples. Try a wider dtype"
            )
        new = Validation(self.done, loss, edit, locality, success)
        best = not self.curve.validations or loss < self.curve.best.loss
        self.curve = Curve(tuple(self.edit), tuple(self.locality), (*self.curve.validations, new), self.curve.ended)
        if best:
            self._trained().save(self.folder / EDITOR)
        self.save()

    # ---- checkpoints ----

    def save(self) -> None:
        """Write everything that is needed to continue."""
        tensors = {f"network.{name}": each for name, each in self.network.state_dict().items()}
        for i, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["log.edit"] = torch.tensor(self.edit, dtype=torch.float64)
        tensors["log.locality"] = torch.tensor(self.locality, dtype=torch.float64)
        header = {
            "about": self.about,
            "validations": [asdict(each) for each in self.curve.validations],
            "ended": self.curve.ended,
            "seconds": self._elapsed(),
        }
        write_tensors(self.folder / STATE, KIND, VERSION, header, tensors)

    def _go_on(self) -> None:
        path = self.folder / STATE
        header, tensors = read_tensors(path, KIND, VERSION, ResultFileError)
        with taking_apart(path, "a whole training", advice="Begin again in another folder"):
            there, here = of_type(header["about"], dict[str, Any]), self.about
            differing = [_IN_WORDS.get(key, key) for key in here if there.get(key) != here[key]]
            if differing:
                raise ResultFileError(
                    f"{self.folder} holds another training, with other {' and '.join(differing)}: name another folder"
                )
            self.curve = _curve(header, tensors)
            self.network.load_state_dict(_under("network.", tensors))
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("adam.", tensors).items():
                number, _, part = name.partition(".")
                state.setdefault(int(number), {})[part] = value
            self.adam.load_state_dict({**self.adam.state_dict(), "state": state})
            self.edit, self.locality = list(self.curve.edit), list(self.curve.locality)
            self.seconds = float(of_type(header["seconds"], float))
        if self.curve.ended in ("steps", "patience", "minutes"):  # more may be allowed now
            self.curve = Curve(self.curve.edit, self.curve.locality, self.curve.validations)

    def _elapsed(self) -> float:
        """Seconds over all runs."""
        return self.seconds + time.monotonic() - self.begun_at

    def _trained(self) -> Trained:
        best = self.curve.validations[-1]
        card = {
            "validation": asdict(best),
            "training": self.config.model_dump(),
            "lessons": {
                "digest": self.about["lessons"],
                "learnt": len(self.training_set),
                "apart": len(self.validation_set),
            },
            "minutes": round(self._elapsed() / 60, 2),
        }
        return Trained(self.network, self.model.name, self.about["fingerprint"], card, self.trained_on)


def _require_readable(model: Model, examples: Sequence[TrainingExample]) -> None:
    """Check that no example has a text that is too long or has no target."""
    for number, example in enumerate(examples):
        new = example.rewrite.new_object
        texts = [example.rewrite.text, *example.equivalents]
        try:
            for prompt, target in [*((prompt, new) for prompt in texts), *example.others]:
                text_of(model, prompt, target, example.rewrite.separator)
        except FactError as problem:
            raise FactError(f"training example {number}, counted from 0, cannot be used: {problem}") from problem


def _begun_here(name: str) -> bool:
    """Whether a file may be what a kill left before the first checkpoint was whole."""
    return name == EDITOR or name.startswith((f".{EDITOR}.", f".{STATE}."))


def _network(model: Model, method: str, settings: dict[str, Any], seed: int) -> tuple[Network, Place]:
    """A new network on the model's device, and where its edits go."""
    from errata.editors.hypernetworks.files import config_of

    place = Place.of(model, config_of(method, settings).blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "network"))
        network = new_network(method, place.shapes(model), model.d_model, settings)
    return network.to(model.device), place


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
