"""A method of editing: its settings, the published ones by model, and how to call it.

Every method is called in the same way: `rome(model, rewrites, *, layer=..., seed=..., <any setting>)` gives an `Edit`
for a rewrite and a list for a list. Settings come from five sources; later ones override earlier ones:

    default < published for this model < hint in the model's own config < preset < given
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from errata.base.arguments import require
from errata.base.autocast import without_autocast
from errata.base.config import changed
from errata.base.errors import ConfigError
from errata.base.facts import Fact, Rewrite
from errata.editors.config import EditorConfig
from errata.editors.editor import Editor, Progress
from errata.editors.layer_choice import LayerChoice, choose_layer
from errata.editors.published import Published, Shape, shape_of
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.statistics.second_moment import SecondMoment
from errata.statistics.store import known_second_moment

if TYPE_CHECKING:
    from errata.base.errors import ErrataError

# C of the edited layer; or one for each layer; or a function from the layer to its C.
SecondMoments = SecondMoment | Mapping[int, SecondMoment] | Callable[[int], SecondMoment]
Moments = Callable[[int], "SecondMoment | None"]  # what all of these come to


def _no_moments(layer: int) -> None:
    """C of no layer is known."""


@dataclass(frozen=True)
class Preset:
    """Named settings.

    Attributes:
        summary: a one-line description.
        settings: the settings that differ from the method's defaults.
    """

    summary: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Setup:
    """Inputs of `make_editor` besides the model and the settings.

    Attributes:
        seed: seed of everything random.
        second_moment: gives C of a layer's keys when it is needed; None if there is none.
        layer_by: which source named the layer, or the trace that chose it; "" if the method has no layer.
        sample_now: sample prefixes while the editor is made, so that all batches of rewrites share them; otherwise when
            there is a rewrite that can be edited.
    """

    seed: int = 0
    second_moment: Moments = _no_moments
    layer_by: str | LayerChoice = ""
    sample_now: bool = True


@dataclass(frozen=True, eq=False)
class Method:
    """A method of editing. Call it with a model and rewrites, or bind it to a model.

    Attributes:
        name: its name, such as "rome".
        summary: a one-line description.
        source: the publication.
        config: the class of its settings.
        make_editor: makes its `Editor` from a model, complete settings and a `Setup`. Side effects are measured
            outside: `max_drift` and `probes` are None here.
        presets: settings under one name, chosen by `preset=`.
        published: settings that are known for models, by their architecture and sizes.
        defaults: settings in which this method differs from the defaults of `config`.
        required: settings without a default, each with what to give; `{layers}` stands for the model's layers.
        uses_second_moment: whether it needs C of the edited layer's keys.
        layer_auto: whether layer="auto" can choose its layer: the MLP's early site.
    """

    name: str
    summary: str
    source: str
    config: type[EditorConfig]
    make_editor: Callable[[Model, Any, Setup], Editor]
    presets: Mapping[str, Preset] = field(default_factory=dict)
    published: Mapping[Shape, Published] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)
    uses_second_moment: bool = False
    layer_auto: bool = False

    def __repr__(self) -> str:
        return f"<errata editor {self.name}: {self.summary}>"

    @overload
    def __call__(
        self, model: Model, rewrites: Rewrite, config: EditorConfig | None = None, **settings: Any
    ) -> Edit: ...

    @overload
    def __call__(
        self,
        model: Model,
        rewrites: Sequence[Rewrite],
        config: EditorConfig | None = None,
        *,
        errors: Literal["raise"] = "raise",
        **settings: Any,
    ) -> list[Edit]: ...

    @overload
    def __call__(
        self,
        model: Model,
        rewrites: Sequence[Rewrite],
        config: EditorConfig | None = None,
        *,
        errors: Literal["keep"],
        **settings: Any,
    ) -> list[Edit | ErrataError]: ...

    def __call__(
        self,
        model: Model,
        rewrites: Any,
        config: EditorConfig | None = None,
        *,
        sequential: bool = False,
        force: bool = False,
        errors: Literal["raise", "keep"] = "raise",
        progress: Progress | None = None,
        **settings: Any,
    ) -> Any:
        """The edit that makes the model say a rewrite's new object; or a list of edits for a list of rewrites.

        Rewrites are edited independently, each as if it were the only one, and computed together. (ROME writes requests
        of one subject with one value, see `RomeConfig.same_subject`.) The model is left as it is, byte for byte, on
        errors and interrupts too.

        Args:
            model: the model.
            rewrites: a fact with its new object, or a list of such.
            config: settings as an object; those that were set explicitly count as given.
            sequential: make each edit while the earlier ones are applied.
            force: keep edits that disable the model.
            errors: "raise" the first error; or "keep" each in the place of the edit that could not be made.
            progress: called after every step with a `Step`.
            **settings: any setting of the method by its name, and those of `bind`: `layer`, `preset`, `seed`,
                `second_moment`.

        Returns:
            One `Edit`, or a list. `notes` has the losses, how the layer was chosen, and the side effects (`health`).

        Raises:
            ConfigError: if a setting is unknown, wrong or missing, or there is no second moment.
            StaleStatistics: if the second moment is of another layer or size.
            FactError: if a text is too long for the model, or has no token in the wanted role.
            Diverged: if the optimisation meets a loss that is not a finite number.
            DisablingEdit: if an edit would disable the model; see `max_drift`.
            UnsupportedModel: if the weight to change is not there, or is offloaded.
        """
        require(model, "Model", f"{self.name}: model")
        facts = [one.fact for one in _listed(rewrites) if isinstance(one, Rewrite)]
        if isinstance(rewrites, (list, tuple)) and not rewrites:
            return []
        settings = {"facts": facts, **settings}
        editor = self.bind(model, config, sample_now=False, **settings) if facts else self._unbound(model)
        return editor(rewrites, sequential=sequential, force=force, errors=errors, progress=progress)

    @without_autocast
    def bind(
        self,
        model: Model,
        config: EditorConfig | None = None,
        *,
        layer: int | Literal["auto"] | LayerChoice | None = None,
        preset: str | None = None,
        seed: int = 0,
        second_moment: SecondMoments | None = None,
        facts: Sequence[Fact] = (),
        sample_now: bool = True,
        **settings: Any,
    ) -> Editor:
        """The method with its settings, ready for one model.

        Args:
            model: the model.
            config: settings as an object; those that were set explicitly count as given.
            layer: the layer to edit, from 0; "auto": chosen by a trace of `facts`; or what `choose_layer` found.
            preset: name of one of `presets`.
            seed: seed of everything random.
            second_moment: C of the keys of that layer; or by layer, as `errata.second_moments` gives it; or a function
                from the layer to it. None: the one that `errata stats` put into the cache; the atlas makes its own.
            facts: a sample of the facts to edit; the first ten are traced for layer="auto".
            sample_now: see `Setup`.
            **settings: any setting of the method by its name; they go before `config`.

        Raises:
            ConfigError: if a setting is unknown, wrong or missing, or there is no second moment.
        """
        require(model, "Model", f"{self.name}: model")
        if second_moment is not None:
            self._require_moments(second_moment)
        given = self._given(config)
        if layer is not None:
            given["layer"] = layer
        found, layer_by = self.resolve(model, {**given, **settings}, preset=preset, facts=facts, seed=seed)

        def of_layer(layer: int) -> SecondMoment | None:
            if second_moment is None:
                return known_second_moment(model, layer)
            if isinstance(second_moment, Mapping):
                return second_moment.get(layer)
            return second_moment(layer) if callable(second_moment) else second_moment

        unbounded = changed(found, max_drift=None, probes=None)
        editor = self.make_editor(model, unbounded, Setup(seed, of_layer, layer_by, sample_now))
        return dataclasses.replace(editor, model=model, bound=found.bound, seed=seed, layer_by=str(layer_by))

    def resolve(
        self,
        model: Model,
        given: Mapping[str, Any],
        *,
        preset: str | None = None,
        facts: Sequence[Fact] = (),
        seed: int = 0,
    ) -> tuple[Any, str | LayerChoice]:
        """All settings of the method for a model, and how the layer was chosen ("" if the method has none).

        Raises:
            ConfigError: if a setting is unknown, wrong or missing.
            FactError: if the layer is "auto" and no fact can be traced.
        """
        settings, source = self.known(model, given, preset)
        layer_by: str | LayerChoice = source
        if settings.get("layer") == "auto" and self.layer_auto:
            if not facts:
                raise ConfigError(
                    "layer='auto' traces facts to choose the layer, and there are none: give some (facts=[...]), or "
                    "name a layer"
                )
            settings["layer"] = choose_layer(model, facts, seed=seed)
        choice = settings.get("layer")
        if isinstance(choice, LayerChoice):
            settings["layer"], layer_by = choice.layer, choice
        config = self.config(**settings)
        for name, what in self.required.items():
            if getattr(config, name) is None:
                raise ConfigError(
                    f"{self.name} needs the setting {name!r}, and none is known for {model.name}: give {name}=..., "
                    f"{what.replace('{layers}', f'0 to {model.n_layers - 1}')}"
                )
        layer = getattr(config, "layer", None)
        if isinstance(layer, int):
            model.path(("key", layer))  # raises if there is no such layer
        return config, layer_by

    def known(self, model: Model, given: Mapping[str, Any], preset: str | None = None) -> tuple[dict[str, Any], str]:
        """Settings that differ from the defaults of `config`, not yet checked, and which source gave the layer.

        Raises:
            ConfigError: if there is no such preset, or the model's hints are not settings.
        """
        settings, layer_by = dict(self.defaults), ""
        for source, layer in self._layers(model, preset, given):
            settings |= layer
            layer_by = source if layer.get("layer") is not None else layer_by
        return settings, layer_by

    def _layers(
        self, model: Model, preset: str | None, given: Mapping[str, Any]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """Settings of each source, the weakest first, with the source's name."""
        published = self.published.get(shape_of(model)) if self.published else None
        hints = model.hints.get(self.name, {})
        if not isinstance(hints, dict):
            raise ConfigError(
                f"the config of {model.name} hints {hints!r} for {self.name!r}: it must be an object of settings"
            )
        if f"{self.name}_layer" in model.hints:
            hints = {"layer": model.hints[f"{self.name}_layer"], **hints}
        if preset is not None and not (isinstance(preset, str) and preset in self.presets):
            known = f"choose from {', '.join(map(repr, self.presets))}" if self.presets else "it has none"
            raise ConfigError(f"{self.name} has no preset {preset!r}: {known}")
        return [
            (f"published for {published.model}: {published.source}", published.settings) if published else ("", {}),
            ("the model's own hint", hints),
            (f"preset {preset}", self.presets[preset].settings if preset else {}),
            ("named", given),
        ]

    def _given(self, config: EditorConfig | None) -> dict[str, Any]:
        """The settings that were set explicitly in an object.

        Raises:
            ConfigError: if it is of another class.
        """
        if config is None:
            return {}
        if not isinstance(config, self.config):
            raise ConfigError(
                f"{self.name}: config is a {type(config).__name__}: write {self.config.__name__}(...), or give "
                "settings by name"
            )
        given = {name: getattr(config, name) for name in config.model_fields_set}
        return {name: value for name, value in given.items() if value is not None or name not in self.required}

    def _require_moments(self, second_moment: object) -> None:
        if not self.uses_second_moment:
            raise ConfigError(f"{self.name} uses no second moment: leave second_moment out")
        require(second_moment, "SecondMoment|callable|dict", f"{self.name}: second_moment")

    def _unbound(self, model: Model) -> Editor:
        """An editor that only refuses what is not a rewrite."""
        return Editor(self.name, {}, lambda model, rewrites, *, progress=None: [], model=model)


def _listed(rewrites: Any) -> Sequence[Any]:
    return rewrites if isinstance(rewrites, (list, tuple)) else [rewrites]
