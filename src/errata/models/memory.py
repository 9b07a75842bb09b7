"""How much memory is free."""

from __future__ import annotations

import psutil
import torch


def free_memory(*devices: torch.device) -> int:
    """Bytes that can be had now on each of some devices."""
    return min(map(_free_memory, devices))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free to us
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
