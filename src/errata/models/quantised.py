"""Detection of quantised weights in the live modules, for any quantisation library.

bitsandbytes, GPTQ, AWQ, HQQ and compressed-tensors keep integers; fp8 keeps numbers of 8 bits whose scale stands beside
them; torchao keeps tensors of its own class. Only the library knows the numbers that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errata.base.errors import UnsupportedModel


def require_unquantised(hf: nn.Module) -> None:
    """Refuse a model in which a linear map's weight is quantised.

    Raises:
        UnsupportedModel: if one is; the message names the module.
    """
    told = method_of(getattr(hf, "config", None))
    for path, module in hf.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        plain = any(name == "weight" and _is_plain(tensor, told) for name, tensor in tensors)
        for name, tensor in tensors:
            if not plain and _is_weight(name, tensor) and not _is_plain(tensor, told):
                raise refusal(path, type(module).__name__, told or _kind(tensor))


def refusal(path: str, what: str, how: str) -> UnsupportedModel:
    """Message about a quantised module or model."""
    return UnsupportedModel(
        f"{path}: {what} is quantised ({how}): its weights are codes, not numbers, so they can be neither measured nor "
        "edited. Load the model that was quantised, or turn it into numbers with model.dequantize() and give errata "
        "that live model or the folder that it is saved to"
    )


def method_of(config: Any) -> str | None:
    """The method that a model's config names, such as "gptq, 4 bits"; None if it names none."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    settings = told if isinstance(told, dict) else vars(told)
    method = settings.get("quant_method") or type(told).__name__
    method = str(getattr(method, "value", method))
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("nbits")
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        bits = 8
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        bits = 4
    return f"{method}, {bits} bits" if bits else method


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Beside weights there are masks and positions."""
    named = "weight" in name or name in ("W_q", "B_q")
    return named and "scale" not in name and "zero" not in name and "shape" not in name


def _is_plain(tensor: Tensor, told: str | None) -> bool:
    wrapped = told is not None and type(tensor.data) is not Tensor and tensor.device.type != "meta"
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not wrapped


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.") if tensor.dtype != torch.bool else "bits"
