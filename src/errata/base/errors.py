"""Exceptions, one class for each cause.

Every message says what was wrong, why it matters and what to do. The command line prints an
`ErrataError` as one line and leaves with exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from errata.base.display import shown


class ErrataError(Exception):
    """Base of every error that a user can cause and fix.

    A message may repeat what a user or a file gave: control characters are shown escaped, and a long one is cut.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class FactError(ErrataError, ValueError):
    """A fact, prompt, subject or target that cannot be used as given."""


class ConfigError(ErrataError, ValueError):
    """A setting that is out of range, unknown, or in conflict with another setting or with the model."""


class ModelNotFound(ErrataError, FileNotFoundError):
    """No model under that name or folder."""


class UnsupportedModel(ErrataError, TypeError):
    """A model whose parts could not be found or did not behave as a decoder's should."""


class DeviceError(ErrataError, RuntimeError):
    """A device that is not on this machine."""


class EditMismatch(ErrataError, ValueError):
    """An edit that was made for other weights than the model's."""


class EditStateError(ErrataError, RuntimeError):
    """An edit applied twice, undone twice, or undone out of order."""


class EditFileError(ErrataError, ValueError):
    """A file that is not an errata edit, or is damaged."""


class ResultFileError(ErrataError, ValueError):
    """A file that is not a result of errata (trace, statistics, records), or is damaged."""


class StaleStatistics(ErrataError, ValueError):
    """Second moments that were collected on another model, layer or corpus."""


class Diverged(ErrataError, ArithmeticError):
    """An optimisation whose loss is not a finite number. The model is unchanged."""


class DisablingEdit(ErrataError, ArithmeticError):
    """An edit that would change the model's predictions on everything. It was not made."""


class OutputError(ErrataError, OSError):
    """A place where nothing can be written."""


class MissingExtra(ErrataError, ImportError):
    """An optional dependency that this call needs and that is not installed."""
