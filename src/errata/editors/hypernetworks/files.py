"""Trained networks on disk: weights and running moments, with a card that identifies their model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from errata.base.errors import ConfigError, EditMismatch, ResultFileError
from errata.base.parsing import of_type, taking_apart
from errata.base.tensor_files import read_tensors, write_tensors
from errata.base.versions import library_versions
from errata.editors.hypernetworks.ke import KeConfig, KeNetwork
from errata.editors.hypernetworks.mend import MendConfig, MendNetwork
from errata.editors.hypernetworks.network import Network, NetworkConfig
from errata.editors.hypernetworks.objective import Place
from errata.models.fingerprint import weights_digest
from errata.models.model import Model

KIND, VERSION = "trained editor", 1

_NETWORKS: dict[str, tuple[type[NetworkConfig], Any]] = {
    "mend": (MendConfig, MendNetwork),
    "ke": (KeConfig, KeNetwork),
}


class _Header(TypedDict):
    """Header of a trained editor's file."""

    method: str
    config: dict[str, Any]
    shapes: list[list[str | int]]
    d_model: int
    model: str
    fingerprint: str
    card: dict[str, Any]
    seen: list[str]


@dataclass(frozen=True)
class Trained:
    """A trained network, its model, and how it was trained.

    Attributes:
        network: the network, in evaluation mode.
        model: name of the model.
        fingerprint: digest of all of the model's weights.
        card: further information on its training, JSON-able.
        trained_on: `fact_key` of the facts that it was trained on.
    """

    network: Network
    model: str
    fingerprint: str
    card: Mapping[str, Any]
    trained_on: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """ "mend" or "ke"."""
        return self.network.method

    def require(self, model: Model) -> Place:
        """The maps that the network edits in a model; an error if it was trained for another model.

        Raises:
            EditMismatch: if this model is another, or has other weights.
        """
        if weights_digest(model.hf) != self.fingerprint:
            raise EditMismatch(
                f"this {self.method} was trained for {self.model}, and {model.name} has other weights, whose gradients "
                "mean something else: train one for it, or load the model as it was, without edits on it"
            )
        return Place.of(model, self.network.config.blocks)

    def save(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises:
            OutputError: if the file cannot be written.
        """
        header = {**self.header(), "seen": sorted(self.trained_on)}
        write_tensors(path, KIND, VERSION, header, dict(self.network.state_dict()))

    def header(self) -> dict[str, Any]:
        """All that is not a tensor, but for what it was trained on."""
        return {
            "method": self.method,
            "config": self.network.config.model_dump(),
            "shapes": [[name, *shape] for name, shape in self.network.shapes.items()],
            "d_model": self.network.d_model,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "versions": library_versions(),
            "card": dict(self.card),
        }

    @classmethod
    def load(cls, path: str | Path) -> Trained:
        """The trained editor in a file; nothing in the file is executed.

        Raises:
            ResultFileError: if the file is missing, cut short, or no trained editor.
        """
        header, tensors = read_tensors(path, KIND, VERSION, ResultFileError)
        return cls.of(path, header, tensors)

    @classmethod
    def of(cls, path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trained:
        """The trained editor of a header and tensors.

        Raises:
            ResultFileError: if they are not what they say.
        """
        with taking_apart(path, "a whole trained editor", advice="Copy or train it again"):
            of_type(header, _Header)
            shapes = {str(name): (of_type(d_out, int), of_type(d_in, int)) for name, d_out, d_in in header["shapes"]}
            _require_sizes(header["d_model"], shapes, header["config"], tensors)
            network = new_network(header["method"], shapes, header["d_model"], header["config"])
            network.load_state_dict(dict(tensors))
            broken = [name for name, each in network.state_dict().items() if not torch.isfinite(each).all()]
            trained_on = frozenset(header["seen"])
            found = cls(network.eval(), header["model"], header["fingerprint"], header["card"], trained_on)
        if broken:
            raise ResultFileError(
                f"{path} is a broken trained editor: {broken[0]} is not a finite number. Train it again"
            )
        return found


def _require_sizes(
    d_model: int, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Check that a network would not be larger than the tensors that fill it, before memory is taken for it.

    Raises:
        ValueError: if a size is not one of theirs.
    """
    # A network of few numbers may name a rank that it does not use in full: the published one is 1920.
    held = sum(tensor.numel() for tensor in tensors.values())
    numbers = [each for each in config.values() if type(each) is int]
    if any(each < 1 for each in (d_model, *(size for pair in shapes.values() for size in pair))):
        raise ValueError("a size is less than 1")
    if any(each > max(held, 10_000) for each in (d_model, *numbers, *(d for pair in shapes.values() for d in pair))):
        raise ValueError("its sizes are larger than its tensors")


def config_of(method: str, settings: Mapping[str, Any]) -> NetworkConfig:
    """A method's settings.

    Raises:
        ConfigError: if a setting is not valid, or the method is unknown.
    """
    if method not in _NETWORKS:
        raise ConfigError(f"{method!r} is not an editor that is trained: choose from {', '.join(_NETWORKS)}")
    return _NETWORKS[method][0](**settings)


def new_network(
    method: str, shapes: Mapping[str, tuple[int, int]], d_model: int, settings: Mapping[str, Any]
) -> Network:
    """An untrained network, initialised from torch's global random numbers.

    Raises:
        ConfigError: if a setting is not valid.
    """
    config = config_of(method, settings)
    network: Network = _NETWORKS[method][1](shapes, d_model, config)
    return network
