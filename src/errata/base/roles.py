"""Token roles in earlier spellings: settings in one are read with a warning, files without one."""

from __future__ import annotations

import warnings
from typing import Any

EARLIER = {
    "first subject": "subject_first",
    "middle subject": "subject_middle",
    "last subject": "subject_last",
    "first after": "after_subject",
    "subject_first_after": "after_subject",
}


def current(value: Any) -> Any:
    """A value of a file with all token roles in it, at any depth, in their present spelling."""
    if isinstance(value, dict):
        return {name: current(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(current, value))
    return EARLIER.get(value, value) if isinstance(value, str) else value


def current_setting(value: Any) -> Any:
    """A setting with token roles in their present spelling; warns of an earlier one."""
    found = current(value)
    if found != value:
        warnings.warn(
            f"token roles have one spelling now: write {found!r} for {value!r}; the earlier one will be refused",
            DeprecationWarning,
            stacklevel=2,
        )
    return found
