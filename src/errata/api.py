"""Loading a model and rewriting a fact as most people call them.

They add one thing to the functions that they stand for: the embedded atlas by name, with its own corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata.base.errors import OutputError
from errata.base.facts import Rewrite
from errata.editors.rome import RomeConfig
from errata.editors.rome import rome as _rome
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
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
) -> Model:
    """A model to trace and edit.

    Args:
        source: "atlas" (embedded; in float32 unless another dtype is named), the id of a model on the Hugging Face
            hub, a folder, or a live `(model, tokenizer)`.
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: such as "cuda"; None: the CPU, or where a live model is. Nothing moves to a GPU unasked.
        download: whether a hub id that is not in the local cache may be downloaded.

    Raises:
        ModelNotFound: if there is no such folder, or the id is not in the local cache.
        UnsupportedModel: if what is there cannot be loaded safely, or is no decoder.
        DeviceError: if the device is not on this machine.
        ConfigError: if a setting has no such value.
    """
    if source == ATLAS and not Path(ATLAS).is_dir():
        from errata import atlas

        return atlas.load(dtype=dtype, device=device)
    return load_pretrained(source, dtype=dtype, device=device, download=download)


def rome(
    model: Model,
    rewrite: Rewrite,
    config: RomeConfig | None = None,
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    seed: int = 0,
    progress: Callable[[Any], None] | None = None,
) -> Edit:
    """A rank-one edit. As `errata.editors.rome.rome`, and the atlas brings its own second moment.

    The first edit of the atlas collects it, in seconds, and keeps it in the cache folder ($ERRATA_HOME).
    """
    if second_moment is None and model.hints.get("corpus") == ATLAS:
        named = (layer, config.layer if config else None, model.hints.get("rome_layer"))
        chosen = next((candidate for candidate in named if candidate is not None), None)
        if chosen is not None:
            second_moment = atlas_second_moment(model, chosen)
    return _rome(model, rewrite, config, layer=layer, second_moment=second_moment, seed=seed, progress=progress)


def atlas_second_moment(model: Model, layer: int, progress: Callable[[int, int], None] | None = None) -> SecondMoment:
    """The second moment of the atlas's keys over the atlas's corpus, from the cache folder if it is there.

    Raises:
        ConfigError: if there is no such layer.
    """
    from errata import atlas

    try:
        return collect_cached(model, [layer], atlas.own_corpus(), batch_size=32, progress=progress)[layer]
    except OutputError:  # a home that cannot be written to: the numbers are the same, only not kept
        return collect(model, [layer], atlas.own_corpus(), batch_size=32, progress=progress)[layer]
