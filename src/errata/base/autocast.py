"""Computation in the requested dtypes, even inside the caller's torch.autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

# Those that torch may be autocasting on.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(function: F) -> F:
    """Decorator that turns torch's autocast off, so that edits, statistics and traces are computed in their own dtypes.

    Under autocast matrix products give other dtypes than their factors have, and other numbers.
    """

    @functools.wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        import torch

        with contextlib.ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return cast(F, exact)
