"""Work in the dtypes that are asked for, whatever autocast is on around it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

# Those that torch may be autocasting on.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(function: F) -> F:
    """A function that runs with torch's autocast off: edits, statistics and traces are what their dtypes say.

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
