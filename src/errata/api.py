"""Loading a model and rewriting a fact as most people call them.

They add one thing to the functions that they stand for: the embedded atlas by name, with its own corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import OutputError
from errata.base.facts import Fact
from errata.editors.editor import Editor
from errata.editors.registry import method_of
from errata.editors.rome.editor import SecondMoments
from errata.editors.rome.editor import rome as _rome
from errata.models.loading import DeviceMap, load_pretrained
from errata.models.model import Model
from errata.statistics.collect import collect
from errata.statistics.second_moment import SecondMoment
from errata.statistics.store import collect_cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ATLAS = "atlas"


def load_model(
    source: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerFast] = ATLAS,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    download: bool = False,
    device_map: DeviceMap | None = None,
    start_token: str | None = None,
) -> Model:
    """A model to trace and edit.

    Args:
        source: "atlas" (embedded; in float32 unless another dtype is named), the id of a model on the Hugging Face
            hub, a folder, or a live `(model, tokenizer)`.
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: such as "cuda"; None: the CPU, or where a live model is. Nothing moves to a GPU unasked.
        download: whether a hub id that is not in the local cache may be downloaded.
        device_map: instead of a device, "auto" to spread the model over the GPUs, memory and disk that are there, or
            where each part goes; see `load_pretrained`. What is offloaded can be traced and scored, not edited.
        start_token: a token to put before every text, such as "<|endoftext|>", where the tokenizer adds none; see
            `models.start_token`.

    Raises:
        ModelNotFound: if there is no such folder, or the id is not in the local cache.
        UnsupportedModel: if what is there cannot be loaded safely, or is no decoder.
        DeviceError: if the device is not on this machine.
        ConfigError: if a setting has no such value.
    """
    if source == ATLAS and not Path(ATLAS).is_dir():
        from errata import atlas

        return atlas.load(dtype=dtype, device=device, device_map=device_map, start_token=start_token)
    return load_pretrained(
        source, dtype=dtype, device=device, download=download, device_map=device_map, start_token=start_token
    )


def _with_own_corpus(model: Model, second_moment: SecondMoments | None) -> SecondMoments | None:
    """What is given; or, for the atlas, what makes its own."""
    if second_moment is None and model.hints.get("corpus") == ATLAS:
        return partial(atlas_second_moment, model)
    return second_moment


if TYPE_CHECKING:
    rome = _rome
else:

    @checked(model="Model")
    @wraps(_rome)
    def rome(model: Model, *arguments: Any, second_moment: SecondMoments | None = None, **settings: Any) -> Any:
        """As `errata.editors.rome.rome`, and the atlas brings its own second moment."""
        return _rome(model, *arguments, second_moment=_with_own_corpus(model, second_moment), **settings)


@checked(model="Model", second_moment="SecondMoment|callable|dict", facts=["Fact"])
@without_autocast
def editor(
    model: Model,
    method: str = "rome",
    *,
    second_moment: SecondMoments | None = None,
    seed: int = 0,
    facts: Sequence[Fact] = (),
    **settings: Any,
) -> Editor:
    """A method by its name, ready to edit many records of a model, as `evaluate` takes it.

    Args:
        model: as it will be edited.
        method: such as "rome".
        second_moment: as of `rome`; the atlas brings its own.
        seed: of everything random in it.
        facts: for ROME with `layer="auto"`: a sample of the facts to edit, of which the first ten are traced.
        settings: the method's own, over what is known for the model.

    Raises:
        ConfigError: if there is no such method or setting, or it lacks what it needs.
    """
    return method_of(method).editor(model, settings, _with_own_corpus(model, second_moment), seed, facts)


def atlas_second_moment(model: Model, layer: int, progress: Callable[[int, int], None] | None = None) -> SecondMoment:
    """The second moment of the atlas's keys over the atlas's corpus, from the cache folder if it is there.

    Raises:
        ConfigError: if there is no such layer.
    """
    from errata import atlas

    try:
        return collect_cached(model, [layer], atlas.own_corpus(), progress=progress)[layer]
    except OutputError:  # a home that cannot be written to: the numbers are the same, only not kept
        return collect(model, [layer], atlas.own_corpus(), progress=progress)[layer]
