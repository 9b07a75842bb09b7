"""Edits as LoRA adapters: folders that PEFT, vLLM and others load.

LoRA's ΔW = (alpha / r) · B @ A is errata's with B = write `[d_out, r]` and A = read `[r, d_in]`, however the model
stores its weights. Adapters are written with alpha = r, so that nothing is scaled; several changes of one weight are
stacked, one rank a rank-one change. The metadata of errata's adapters contains the header of the edit's file under the
key "errata", so that reading one gives back the edit. Neither reading nor writing needs PEFT, and reading runs no code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.base.errors import ConfigError, EditFileError, OutputError
from errata.base.parsing import format_of, load_json, of_type, taking_apart
from errata.base.tensor_files import KEY, read_safetensors
from errata.edits.delta import Delta, Dense, LowRank, RankOne
from errata.models.saving import written_folder

VERSION = 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings under which an adapter is more than ΔW = scale · B @ A, and what they would add.
MORE_THAN_LOW_RANK = {
    "use_dora": "DoRA rescales the rows of the weight",
    "lora_bias": "it has biases",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes embeddings of tokens",
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters that are not a linear map",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "it pools the input of the weight",
    "arrow_config": "it chooses among adapters",
    "monteclora_config": "it is random",
    "kasa_config": "it changes the weight before it adds to it",
    "velora_config": "it is a variant of LoRA",
    "use_bdlora": "it is block-diagonal",
}
# How B and A began. Others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) changed the weight itself, which no file here tells.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def write(
    folder: str | Path,
    deltas: Iterable[Delta],
    header: Mapping[str, Any],
    *,
    base: str,
    revision: str | None = None,
    transposed: bool,
) -> None:
    """Write an adapter atomically. One that errata wrote at the same place is replaced.

    Args:
        folder: where to.
        deltas: low-rank changes of linear maps.
        header: its origin, JSON-able, for the file.
        base: hub id or path of the model, for `base_model_name_or_path`.
        revision: the commit of a model on the hub.
        transposed: whether the model stores these weights as `[d_in, d_out]` (GPT-2).

    Raises:
        ConfigError: if a change is dense, or of something that is not a linear map.
        OutputError: if the folder holds anything but an adapter of ours, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    factors = _stacked(deltas)
    ranks = {module: len(read) for module, (_, read) in factors.items()}
    rank = max(ranks.values())
    others = {module: its for module, its in ranks.items() if its != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),  # whole names: PEFT matches by their ends
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{module}.{part}.weight": tensor.contiguous()
        for module, (write, read) in factors.items()
        for part, tensor in (("lora_A", read), ("lora_B", write))
    }
    text = json.dumps({"kind": "lora", "version": VERSION, **header}, ensure_ascii=False, allow_nan=False)
    with written_folder(folder, is_ours) as temporary:
        try:
            save_file(tensors, temporary / TENSORS, metadata={"format": "pt", KEY: text})
        except SafetensorError as error:
            raise OutputError(f"cannot write {folder}: {error}. Make room, or choose another place") from error
        (temporary / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path) -> tuple[tuple[Delta, ...], dict[str, Any], dict[str, Any] | None]:
    """The changes of an adapter, its settings, and, if errata wrote it, its header.

    Rank-one changes come as `RankOne`, others as `LowRank`; alpha / r is in `write`.

    Raises:
        EditFileError: if there is no whole adapter in safetensors, or it does more than ΔW = scale · B @ A.
    """
    folder = Path(folder)
    config = _config(folder)
    tensors, metadata = _tensors(folder)
    with taking_apart(folder, "a whole adapter", EditFileError, "Save it again"):
        deltas = _deltas(tensors, config, folder)
        header = of_type(load_json(metadata[KEY]), dict[str, Any]) if KEY in metadata else None
        if header is not None and format_of(header) > VERSION:
            raise EditFileError(f"{folder} is of format {header['version']}, newer than {VERSION}. Upgrade errata")
    named = ("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "peft_version")
    return deltas, {name: config[name] for name in named if config.get(name) is not None}, header


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an adapter that errata wrote, and nothing else."""
    if {path.name for path in folder.iterdir()} != {CONFIG, TENSORS}:
        return False
    try:
        return KEY in _tensors(folder)[1]
    except EditFileError:
        return False


def _stacked(deltas: Iterable[Delta]) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, in order: write `[d_out, r]` and read `[r, d_in]` of all its changes together."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for delta in deltas:
        if isinstance(delta, Dense):
            raise ConfigError(
                f"the change of {delta.weight} is dense, and an adapter holds changes of low rank: give a rank to "
                "truncate it to by SVD (the residual is told), or write the whole model, merged"
            )
        module = delta.weight.removesuffix(".weight")
        if module == delta.weight:
            raise ConfigError(f"{delta.weight} is not the weight of a linear map, which alone an adapter can change")
        parts.setdefault(module, []).append(delta.factors())
    return {
        module: (torch.cat([write for write, _ in each], 1), torch.cat([read for _, read in each]))
        for module, each in parts.items()
    }


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise EditFileError(f"there is no {CONFIG} in {folder}. Give the folder of a saved LoRA adapter")
    with taking_apart(folder / CONFIG, "the config of an adapter", EditFileError, "Fetch or save the adapter again"):
        config = of_type(load_json((folder / CONFIG).read_bytes()), dict[str, Any])
    kind = config.get("peft_type")
    if kind != "LORA":
        raise EditFileError(f"{folder} is an adapter of type {kind!r}: only LoRA can be read as an edit")
    for name, reason in MORE_THAN_LOW_RANK.items():
        if config.get(name):
            raise _no_plain_change(folder, name, config[name], reason)
    if config.get("bias", "none") != "none":
        raise _no_plain_change(folder, "bias", config["bias"], "it changes biases")
    if config.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        reason = "training began by changing the weight itself (PEFT's save_pretrained can convert such an adapter)"
        raise _no_plain_change(folder, "init_lora_weights", config["init_lora_weights"], reason)
    return config


def _no_plain_change(folder: Path, name: str, value: Any, reason: str) -> EditFileError:
    return EditFileError(
        f"{folder} is not a plain LoRA adapter ({name} is {json.dumps(value)}): {reason}, so it is not a low-rank "
        "change of weights. Merge it with PEFT, and load the merged model"
    )


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        pickled = (
            " The pickled .bin is not read: unpickling can run code." if (folder / "adapter_model.bin").exists() else ""
        )
        raise EditFileError(f"there is no {TENSORS} in {folder}.{pickled} Save the adapter with PEFT as safetensors")
    metadata, tensors = read_safetensors(path, "an adapter's tensors", EditFileError)
    return tensors, metadata


def _deltas(tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> tuple[Delta, ...]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if found is None:
            raise EditFileError(
                f"{folder} holds {name}, which is not a part of a low-rank change of a linear map. Merge the adapter "
                "with PEFT, and load the merged model"
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if not pairs:
        raise EditFileError(f"{folder} is an adapter that changes nothing. Save it again")
    # Safetensors sorts by name; our configs list the modules in the edit's order.
    order = {module: place for place, module in enumerate(config.get("target_modules") or ())}
    modules = sorted(pairs, key=lambda module: order.get(module, len(order)))
    return tuple(_delta(module, pairs[module], config) for module in modules)


def _delta(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Delta:
    delta = LowRank(f"{module}.weight", pair["B"], pair["A"])
    rank = _of(module, config.get("rank_pattern"), config["r"])
    if rank != delta.rank:
        raise ValueError(f"{module} has rank {delta.rank}, {rank} by {CONFIG}")
    alpha = _of(module, config.get("alpha_pattern"), config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if scale != 1:
        delta = delta.scaled(scale)
    return RankOne(delta.weight, delta.write[:, 0], delta.read[0]) if rank == 1 else delta


def _of(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """A setting of one module, as PEFT finds it: patterns are regular expressions for the ends of names."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
