"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from errata.models.model import Model

Subject = Annotated[str, typer.Option(help="What the fact is about.")]
Prompt = Annotated[str, typer.Option(help="A sentence up to its object, with {} where the subject stands.")]
ModelName = Annotated[str, typer.Option("--model", help="'atlas' (embedded), a folder, or a Hugging Face hub id.")]
Device = Annotated[Optional[str], typer.Option(help="Such as cuda. The CPU unless named.")]  # noqa: UP045
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The seed of everything random.")]


def require_outputs(*paths: Path | None) -> None:
    """Make sure, before long work, that its results can be written.

    Raises:
        OutputError: if one cannot.
    """
    from errata.base.files import require_writable

    for path in paths:
        if path is not None:
            require_writable(path)


def load(model: str, device: str | None, dtype: str, download: bool) -> Model:
    """The model that the options name, without the progress bars of its libraries."""
    from transformers.utils import logging

    from errata.api import load_model

    if not download:
        logging.disable_progress_bar()
    return load_model(model, device=device, dtype=dtype, download=download)
