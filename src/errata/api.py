"""The functions that `import errata` offers and that need more than one floor: loading a model, and editors by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.facts import Fact
from errata.editors.editor import Editor
from errata.editors.method import SecondMoments
from errata.editors.registry import method_of
from errata.models.loading import DeviceMap, load_pretrained
from errata.models.model import Model

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
        UnsupportedModel: if what is there cannot be loaded safely, or is not a decoder.
        DeviceError: if the device is not on this machine.
        ConfigError: if a setting has no such value.
    """
    from errata import atlas

    if source == ATLAS and not Path(ATLAS).is_dir():
        return atlas.load(dtype=dtype, device=device, device_map=device_map, start_token=start_token)
    model = load_pretrained(
        source, dtype=dtype, device=device, download=download, device_map=device_map, start_token=start_token
    )
    if model.hints.get("corpus") == ATLAS:  # a copy of the atlas
        model.own_corpus = atlas.own_corpus
    return model


@checked(model="Model", facts=["Fact"])
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
    """An editor for one model: a method, by its name, with settings. Call it with rewrites, or give it to `evaluate`.

    Args:
        model: the model.
        method: such as "rome".
        second_moment, seed, facts: as of `Method.bind`.
        settings: any setting of the method by its name, `layer` and `preset` too.

    Raises:
        ConfigError: if there is no such method or setting, or it lacks what it needs.
    """
    return method_of(method).bind(model, second_moment=second_moment, seed=seed, facts=facts, **settings)
