"""Which editors there are, by name: those of the paper, and those that other packages bring.

A package brings one by an entry point in the group "errata.editors" that names a `Method`:

    [project.entry-points."errata.editors"]
    mine = "my_package.editor:METHOD"
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from errata.base.config import Config
from errata.base.errors import ConfigError
from errata.base.facts import Fact
from errata.editors.editor import Editor
from errata.editors.fine_tuning import FineTuningConfig
from errata.editors.fine_tuning import config as fine_tuning
from errata.editors.fine_tuning.prepare import prepare_attention, prepare_ft, prepare_ft_l
from errata.editors.hypernetworks.editor import TrainedConfig, prepare_ke, prepare_mend
from errata.editors.knowledge_neurons import KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.prepare import prepare as prepare_kn
from errata.editors.published import Published, Shape
from errata.editors.rome import RomeConfig
from errata.editors.rome import layer as rome
from errata.editors.rome.editor import SecondMoments
from errata.editors.rome.prepare import prepare as prepare_rome
from errata.models.model import Model

GROUP = "errata.editors"

Prepare = Callable[..., Editor]  # (model, settings, second moments, seed), and `facts` where `takes_facts`


@dataclass(frozen=True)
class Method:
    """A way to edit.

    Attributes:
        name: what to call it by.
        summary: what it does, in a line.
        source: where it is from.
        config: its settings.
        prepare: makes it an editor of many rewrites on a model: from settings by name, second moments, and a seed.
        presets: what a setting called `preset` may be, and what that means.
        published: settings that are known for models, by their type and sizes.
        takes_facts: whether `prepare` has an argument `facts`: a sample of what will be edited, to choose settings by.
    """

    name: str
    summary: str
    source: str
    config: type[Config]
    prepare: Prepare
    presets: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[Shape, Published] = field(default_factory=dict)
    takes_facts: bool = False

    def editor(
        self,
        model: Model,
        settings: Mapping[str, Any],
        second_moment: SecondMoments | None,
        seed: int,
        facts: Sequence[Fact] = (),
    ) -> Editor:
        """The editor that `prepare` makes; `facts` go to the methods that take them."""
        more = {"facts": facts} if self.takes_facts else {}
        return self.prepare(model, settings, second_moment, seed, **more)


_CODES_TRAINING = {"reference": "the published code's training: every target token from the prompt's end, biases too"}

METHODS = {
    method.name: method
    for method in (
        Method(
            "rome",
            "Rank-One Model Editing: one MLP's down-projection is given a new value for the subject's key",
            "Meng et al., 2022: Locating and Editing Factual Associations in GPT",
            RomeConfig,
            prepare_rome,
            {"paper": "all settings as in the paper", "reference": "all settings as in its published code"},
            rome.PUBLISHED,
            takes_facts=True,
        ),
        Method(
            "ft",
            "Fine-tuning of one MLP's down-projection",
            "the baseline of Meng et al., 2022, appendix E.1",
            FineTuningConfig,
            prepare_ft,
            _CODES_TRAINING,
            fine_tuning.PUBLISHED["ft"],
        ),
        Method(
            "ft-l",
            "Fine-tuning of one MLP's down-projection, no entry of which is moved by more than ε",
            "Zhu et al., 2020: Modifying Memories in Transformer Models",
            FineTuningConfig,
            prepare_ft_l,
            _CODES_TRAINING,
            fine_tuning.PUBLISHED["ft-l"],
        ),
        Method(
            "attention",
            "Fine-tuning, within the same bound, of what makes queries, keys and values in one layer",
            "AttnEdit of Meng et al., 2022, appendix I",
            FineTuningConfig,
            prepare_attention,
            _CODES_TRAINING,
            fine_tuning.PUBLISHED["attention"],
        ),
        Method(
            "kn",
            "Knowledge Neurons: the few that express the fact are made to write the new object's embedding",
            "Dai et al., 2022: Knowledge Neurons in Pretrained Transformers",
            KnowledgeNeuronsConfig,
            prepare_kn,
            {"reference": "the published code's way: before the nonlinearity, objects without a space"},
        ),
        Method(
            "mend",
            "MEND: a network that was trained for the model makes a better change of the gradient's factors",
            "Mitchell et al., 2022: Fast Model Editing at Scale",
            TrainedConfig,
            prepare_mend,
        ),
        Method(
            "ke",
            "KE: a network that was trained for the model reads the edit and masks its gradient",
            "De Cao et al., 2021: Editing Factual Knowledge in Language Models",
            TrainedConfig,
            prepare_ke,
        ),
    )
}


def methods() -> dict[str, Method]:
    """All there are, by name, the package's own first.

    Raises:
        ConfigError: if another package brings one that cannot be used.
    """
    return METHODS | {name: _brought(point) for name, point in sorted(_entry_points().items())}


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: if there is none, or the package that brings it cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    others = _entry_points()
    if name in others:
        return _brought(others[name])
    near = difflib.get_close_matches(name, [*METHODS, *others], n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join([*METHODS, *others])}"
    raise ConfigError(f"there is no editor {name!r}: {advice}")


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _brought(point: EntryPoint) -> Method:
    """What an entry point names."""
    whose = f"the editor {point.name!r} of {point.dist.name if point.dist else 'another package'} ({point.value})"
    if point.name in METHODS:
        raise ConfigError(f"{whose} has the name of one of errata's own, so neither could be told: name it otherwise")
    try:
        method = point.load()
    except Exception as error:  # whatever its package raises
        raise ConfigError(f"{whose} cannot be loaded: {type(error).__name__}: {error}. Mend or remove it") from error
    if not isinstance(method, Method) or method.name != point.name:
        raise ConfigError(f"{whose} is no Method called {point.name!r}: see errata.editors.registry")
    return method
