"""`errata export`: edits as an adapter, as a whole model, or as one edit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from errata.cli import options

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.models.model import Model

Lora = Annotated[Optional[Path], typer.Option(help="Folder for a LoRA adapter, as PEFT and vLLM load it.")]  # noqa: UP045
Merge = Annotated[Optional[Path], typer.Option(help="Folder for the whole edited model, as transformers load it.")]  # noqa: UP045
Rank = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, help="Truncate dense changes to this rank, for --lora or --out. Without it an adapter refuses them."
    ),
]


def export(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Saved edits, applied in this order.")],
    model: options.ModelName = "atlas",
    lora: Lora = None,
    merge: Merge = None,
    out: Annotated[Optional[Path], typer.Option(help="File for the combined edit, .safetensors.")] = None,  # noqa: UP045
    scale: Annotated[Optional[float], typer.Option(help="Multiply every change by this.")] = None,  # noqa: UP045
    layers: Annotated[
        Optional[str], typer.Option(help="Keep only the changes in these layers, such as 3-5 or 2,4.")  # noqa: UP045
    ] = None,
    rank: Rank = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Write edits as a LoRA adapter, as a whole edited model, or together as one edit."""
    from errata.base.errors import ConfigError
    from errata.cli import show

    if not (lora or merge or out):
        raise ConfigError("nothing is to be written: give --lora FOLDER, --merge FOLDER or --out FILE")
    options.require_apart({"--lora": lora, "--merge": merge, "--out": out})
    if out:
        options.require_ending(out, [".safetensors"], "an edit")
        options.require_outputs(out)
    wanted = None if layers is None else options.layer_numbers(layers)
    require_free(lora, merge)

    from errata.edits.edit import Edit

    read = [Edit.load(path) for path in edits]
    loaded = options.load(model, device, dtype, download, start_token)
    whole = Edit.combine(read, loaded)
    if wanted is not None:
        whole = whole.restricted(wanted, loaded)
    if scale is not None:
        whole = whole.scaled(scale)
    # Merged, edits go on one by one, as `errata generate` puts them on, unless they were changed together.
    result = write(loaded, read if wanted is None and scale is None else [whole], lora, merge, rank)
    if out:
        kept = whole if rank is None else whole.truncated(rank)
        kept.save(out)
        result["residuals"] |= _residuals(kept)
    if json:
        named = {"lora": lora, "merge": merge, "out": out}
        written = {name: str(path) for name, path in named.items() if path}
        show.as_json({"model": loaded.name, "edits": [e.id for e in read], **result, "written": written})
    else:
        show_residuals(result)
        show.written(lora, merge, out)


def write(
    model: Model, edits: Sequence[Edit], lora: Path | None = None, merge: Path | None = None, rank: int | None = None
) -> dict[str, Any]:
    """Write edits as an adapter and as a whole model, where a folder is given. The model is as it was, afterwards.

    Returns:
        "residuals": of each weight of the adapter of which something was cut off by `rank`, the relative residual.

    Raises:
        ConfigError, EditMismatch, EditStateError: if they do not go together on the model, or in an adapter.
        OutputError: if a folder holds other things, or cannot be written.
    """
    from errata.edits.edit import Edit
    from errata.edits.ledger import save_merged

    residuals: dict[str, float] = {}
    if lora:
        residuals = Edit.combine(edits, model).to_lora(lora, model=model, rank=rank)
    if merge:
        with contextlib.ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit.applied(model))
            save_merged(model, merge)
    return {"residuals": {weight: residual for weight, residual in residuals.items() if residual}}


def show_residuals(result: dict[str, Any]) -> None:
    """Say what truncation lost."""
    from errata.cli import show

    for weight, residual in result["residuals"].items():
        show.line(f"{weight}: truncated; the residual is {show.percent(residual)} of the change's norm")


def require_free(lora: Path | None, merge: Path | None) -> None:
    """Check, before long work, that these folders may be written.

    Raises:
        OutputError: if one holds other things.
    """
    from errata.edits.lora import is_ours
    from errata.models import saving

    if lora:
        saving.require_free(lora, is_ours)
    if merge:
        saving.require_free(merge)


def _residuals(edit: Edit) -> dict[str, float]:
    """Residual of its last truncation, by weight."""
    steps = [step for step in edit.notes.get("derived", ()) if "truncated" in step]
    return {each["weight"]: each["residual"] for each in steps[-1]["residuals"]} if steps else {}
