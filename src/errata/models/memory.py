"""How much memory is free."""

from __future__ import annotations

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free to us
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
