"""Loading of a `Model` from a folder, a hub id or a live model. Only this file calls `from_pretrained`.

Nothing is downloaded unless asked for, no code of a repository is ever run, and weights are read from
safetensors only, because unpickling runs code.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, DeviceError, ErrataError, ModelNotFound, UnsupportedModel
from errata.base.extras import needed
from errata.base.files import expanded, resolved
from errata.models.anatomy import require_runnable
from errata.models.model import Model
from errata.models.quantised import method_of, refusal
from errata.models.start_token import with_start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

# Where each part of a model goes, by its dotted name; or how accelerate is to decide that.
DeviceMap = str | Mapping[str, str | int | torch.device]
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@without_autocast
def load_pretrained(
    source: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerFast],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    name: str | None = None,
    download: bool = False,
    device_map: DeviceMap | None = None,
    start_token: str | None = None,
) -> Model:
    """A model and its tokenizer, loaded and verified, with its parts found.

    A live model is put in eval mode; its dtype or device changes only if one is named. A model that accelerate has
    spread over several devices, or partly offloaded, stays so.

    Args:
        source: a folder, the id of a model on the Hugging Face hub, or a live (model, tokenizer).
        dtype: "auto" (as stored, or as the live model is), "float32", "bfloat16", "float16" or "float64".
        device: where to put it, such as "cuda" or "cuda:1". None: the CPU, or where a live model is.
        name: its name; None: the source's own name.
        download: whether a hub id that is not in the local cache may be downloaded.
        device_map: instead of a device, where each part of a model that is loaded goes, as accelerate takes it: "auto"
            fills the GPUs, then memory, then disk; or by name, as in {"model.embed_tokens": 0, "model.layers.0": 1}.
        start_token: a token to put before every text, where the tokenizer adds none; see `start_token`.

    Raises:
        ModelNotFound: if there is no such folder, or the id is not in the local cache.
        UnsupportedModel: if what is there cannot be loaded safely, or is not a decoder.
        DeviceError: if the device is not on this machine.
        ConfigError: if a setting is not valid, or settings contradict each other or a live model.
        MissingExtra: if a device_map is given and accelerate is not installed.
    """
    wanted_dtype = _dtype(dtype)
    wanted_device = None if device is None else usable_device(device)
    if isinstance(source, tuple):
        hf, tokenizer = _live(source)
        if device_map is not None:
            raise ConfigError(
                "a device_map says where a model is loaded to, and a live model is loaded: spread it with "
                "accelerate.dispatch_model, or name its folder"
            )
        if hasattr(hf, "_hf_hook") and not (wanted_dtype is None and wanted_device is None):
            raise ConfigError(
                "accelerate holds the parts of this model where they are, so it can be put onto no other device and "
                "into no other dtype: load it as you want it"
            )
        name = name or Path(getattr(hf.config, "name_or_path", "") or type(hf).__name__).name
        if wanted_dtype is not None:
            hf = hf.to(wanted_dtype)
    else:
        if device_map is not None and device is not None:
            raise ConfigError("device and device_map both say where the model goes: name one of them")
        hf, tokenizer = _from_disk(source, wanted_dtype, download, _usable_map(device_map))
        name = name or _name_of(source)
    _require_usable(tokenizer, name)
    if wanted_device is not None:
        hf = hf.to(wanted_device)
    if start_token is not None:
        tokenizer = with_start_token(tokenizer, start_token)
    model = Model(hf.eval(), tokenizer, name=name)
    model.start_token = start_token or ""
    _require_match(model)
    return model


def usable_device(device: str | torch.device) -> torch.device:
    """A device that is on this machine.

    Raises:
        DeviceError: if it is not, or the name is none.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"{device!r} is not a device: choose 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if wanted.type == "cpu":
        return wanted
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise DeviceError(f"'{wanted}' is not on this machine, or this torch has no CUDA: choose 'cpu'")
        if (wanted.index or 0) >= count:
            raise DeviceError(f"'{wanted}' is not on this machine: its GPUs are cuda:0 to cuda:{count - 1}")
        return wanted
    if wanted.type == "mps" and torch.backends.mps.is_available():
        return wanted
    raise DeviceError(f"'{wanted}' is not on this machine: choose 'cpu'")


def _usable_map(device_map: DeviceMap | None) -> dict[str, Any]:
    """The device map for `from_pretrained`."""
    if device_map is None:
        return {}
    needed("accelerate", "peft")
    if isinstance(device_map, str):
        if device_map not in _STRATEGIES:
            known = ", ".join(map(repr, _STRATEGIES))
            raise ConfigError(f"device_map is {device_map!r}: it is one of {known}, or says where each part goes")
        return {"device_map": device_map}
    for where in device_map.values():
        if where != "disk":
            usable_device(f"cuda:{where}" if isinstance(where, int) else where)
    return {"device_map": dict(device_map)}


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype, or None for "auto"."""
    if dtype == "auto":
        return None
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise ConfigError(f"{dtype!r} is not a dtype for a model: choose 'auto', {', '.join(map(repr, DTYPES))}")
    return wanted


def _live(source: tuple[Any, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if len(source) != 2:
        raise ConfigError(f"a live model is a pair (model, tokenizer), not {len(source)} things")
    hf, tokenizer = source
    if not isinstance(hf, PreTrainedModel):
        require_runnable(hf)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UnsupportedModel(f"{type(tokenizer).__name__} is not a tokenizer: load one with AutoTokenizer")
    return hf, tokenizer


def _name_of(source: str | Path) -> str:
    return resolved(source).name if Path(source).is_dir() else str(source)


def _from_disk(
    source: str | Path, dtype: torch.dtype | None, download: bool, placement: Mapping[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    where = _place(source)
    shared: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not download}
    with _brief_errors(source, "config", download):
        config = AutoConfig.from_pretrained(where, **shared)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{source}: an encoder with a decoder ({config.model_type}), and errata edits decoders alone"
        )
    told = method_of(config) or method_of(config.get_text_config())
    if told:
        raise refusal(str(source), "the model", told)
    with _brief_errors(source, "tokenizer", download):
        tokenizer = AutoTokenizer.from_pretrained(where, **shared)
    with _brief_errors(source, "weights", download), _quiet(download):
        hf, info = _auto_class(config).from_pretrained(
            where,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in `info`, and refused below
            output_loading_info=True,
            **placement,
            **shared,
        )
    _require_numbers(source, where, download)
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := sorted(item if isinstance(item, str) else item[0] for item in info.get(kind) or []):
            raise UnsupportedModel(
                f"{source}: {len(wrong)} weights are not in its files in the shape that its config asks for, "
                f"such as {wrong[0]}. They would be random: get weights and config that belong together"
            )
    _require_used(source, hf, sorted(info.get("unexpected_keys") or []))
    return hf, tokenizer


def _auto_class(config: Any) -> Any:
    """Auto class that loads a model of this config with its head, image-and-text models included."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    alone = type(config) in AutoModelForCausalLM._model_mapping
    both = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if both and not alone else AutoModelForCausalLM


# Buffers that older versions saved and newer ones compute.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|masked_bias|position_ids|\.attn\.bias|\.attention\.bias)$")


def _require_used(source: str | Path, hf: PreTrainedModel, unexpected: Sequence[str]) -> None:
    """Weights in the files that the model has no place for: within its parts they would make it another model.

    Raises:
        UnsupportedModel: if there are such.
    """
    unused = [name for name in unexpected if not _COMPUTED.search(name)]
    modules = {re.sub(r"\d+", "0", name) for name, _ in hf.named_modules()}
    prefix = hf.base_model_prefix
    roots = {"", prefix, "model", "model.language_model", "language_model"}

    def inside(name: str) -> bool:
        for path in (name, f"{prefix}.{name}"):
            parts = re.sub(r"\d+", "0", path).split(".")
            known = [".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[:i]) in modules]
            if known and known[-1] not in roots:
                return True
        return False

    if wrong := [name for name in unused if inside(name)]:
        layers = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
        raise UnsupportedModel(
            f"{source}: its files hold {len(wrong)} weights that its config has no place for, such as {wrong[0]} "
            f"(it says {layers} layers), so this would be another model than was saved. Get weights and config that "
            "belong together"
        )
    if unused:
        warnings.warn(
            f"{source}: {len(unused)} weights in its files belong to no part of the model that is loaded, such as "
            f"{unused[0]}; they are left out",
            stacklevel=4,
        )


def _require_numbers(source: str | Path, where: str, download: bool) -> None:
    """Weights that are stored as integers, or in 8 bits without their scale, are codes.

    Raises:
        UnsupportedModel: if there are such.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    with _brief_errors(source, "weights", download):
        config = cached_file(where, "config.json", local_files_only=not download)
        for path in sorted(Path(str(config)).parent.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    if name.endswith("weight") and len(part.get_shape()) > 1 and not re.match(r"(F|BF|C)\d\d", dtype):
                        raise UnsupportedModel(
                            f"{source}: {name} in {path.name} is stored as {dtype}, and its config names no "
                            "quantisation, so what these codes stand for is not known. Get the model that was quantised"
                        )


def _place(source: str | Path) -> str:
    """Source for `from_pretrained`: a folder with a config, or a hub id."""
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"a {type(source).__name__} names no model: give a folder, a hub id or a pair (model, tokenizer)"
        )
    text = str(source)
    if not text.strip():
        raise ModelNotFound("the name of the model is empty: name a folder or a hub id, such as 'gpt2'")
    path = expanded(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{source} is a folder without a config.json, so it holds no Hugging Face model")
        return str(path)
    if path.is_file():
        raise ModelNotFound(f"{source} is a file: name the folder that holds config.json, weights and tokenizer")
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ModelNotFound(f"there is no folder {source}")
    return text


@contextlib.contextmanager
def _quiet(download: bool) -> Iterator[None]:
    """No report tables, and no progress bars unless something is downloaded."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not download:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _brief_errors(source: str | Path, part: str, download: bool) -> Iterator[None]:
    """Context that turns errors of transformers and related libraries into one-line errors of errata."""
    try:
        yield
    except (ErrataError, MemoryError):
        raise
    except Exception as error:
        _explain(source, part, download, error)


def _explain(source: str | Path, part: str, download: bool, error: Exception) -> NoReturn:
    text = textwrap.shorten(str(error) or type(error).__name__, 240)
    if "trust_remote_code" in str(error):
        raise UnsupportedModel(f"{source} needs code of its own repository, which errata never runs") from error
    if not expanded(source).is_dir() and isinstance(error, OSError):
        if download:
            raise ModelNotFound(
                f"no model {str(source)!r}: there is no such folder, and its {part} cannot be fetched: {text}"
            ) from error
        raise ModelNotFound(
            f"no model {str(source)!r}: there is no such folder, and its {part} is not in the local cache; "
            "nothing is downloaded unless you say download=True (--download)"
        ) from error
    if part == "weights" and isinstance(error, OSError) and "safetensors" in str(error):
        raise ModelNotFound(
            f"{source} has no weights in safetensors, the one format errata reads: pickled weights can run "
            "code. Load them elsewhere and save them with model.save_pretrained(folder)"
        ) from error
    raise UnsupportedModel(f"{source}: its {part} cannot be loaded: {text}") from error


def _require_usable(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Character offsets, and no token of its own after the text."""
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"the tokenizer of {name} is not a fast one: it cannot say which characters a token stands for, "
            "and so not where the subject is. Convert it to a tokenizer.json"
        )
    if not _own_ids(tokenizer):
        raise ModelNotFound(
            f"the tokenizer of {name} has no vocabulary: its files are missing. Put its tokenizer.json there"
        )
    encoded = tokenizer("a", return_special_tokens_mask=True)
    if len(encoded["input_ids"]) > 1 and encoded["special_tokens_mask"][-1]:
        token = tokenizer.convert_ids_to_tokens(encoded["input_ids"][-1])
        raise UnsupportedModel(
            f"the tokenizer of {name} puts {token!r} after every text, so no prompt could go on; "
            "turn that off (add_eos_token=False)"
        )


def _require_match(model: Model) -> None:
    """Every word of the tokenizer has an embedding. Tokens that were added to it may have none (Gemma 3)."""
    rows = len(model.module(("embedding", 0)).get_parameter("weight"))
    highest = max(_own_ids(model.tokenizer))
    if highest >= rows:
        raise UnsupportedModel(
            f"the tokenizer is not that of {model.name}: it has token ids up to {highest}, "
            f"the model has embeddings for {rows}"
        )


def _own_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Token ids without the special and the added ones."""
    others = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return {index for token, index in tokenizer.get_vocab().items() if token not in others}
