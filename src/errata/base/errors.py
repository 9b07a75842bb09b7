"""Exceptions, one class for each cause.

Every message says what was wrong, why it matters and what to do. The command line prints an
`ErrataError` as one line and leaves with exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from errata.base.display import shown


class ErrataError(Exception):
    """Base of every error that a user can cause and mend.

    A message may repeat what a user or a file gave: control characters are shown escaped, and a long one is cut.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class FactError(ErrataError, ValueError):
    """A fact, prompt, subject or target that cannot be used as given."""


class ConfigError(ErrataError, ValueError):
    """A setting out of range, unknown, or at odds with another or with the model."""


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
    """A file that is not an edit of ours, or no longer whole."""


class ResultFileError(ErrataError, ValueError):
    """A stored result (trace, statistics, records) that is not ours, or no longer whole."""


class StaleStatistics(ErrataError, ValueError):
    """Second moments that were collected on another model, layer or corpus."""


class Diverged(ErrataError, ArithmeticError):
    """An optimisation that met a loss that is not a finite number. The model is as it was."""


class DisablingEdit(ErrataError, ArithmeticError):
    """An edit that would change what the model says of everything. It was not made."""


class OutputError(ErrataError, OSError):
    """A place where nothing can be written."""


class MissingExtra(ErrataError, ImportError):
    """An optional dependency that this call needs and that is not installed."""
