"""`errata generate`: text from the model, unedited or with edits."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Optional

import typer

from errata.base.display import tell
from errata.cli import options


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: options.ModelName = "atlas",
    edit: Annotated[Optional[list[Path]], typer.Option(help="An edit to apply; any number, in order.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum number of new tokens.")] = 30,
    top_k: Annotated[Optional[int], typer.Option(help="Sample from the k most probable tokens.")] = None,  # noqa: UP045
    temperature: Annotated[Optional[float], typer.Option(help="Sample at this temperature.")] = None,  # noqa: UP045
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Continue a prompt: greedily, or by sampling if --top-k or --temperature is given."""
    from errata.base.errors import FactError
    from errata.base.facts import require_characters
    from errata.cli import show
    from errata.edits.edit import Edit

    if not prompt.strip():
        raise FactError("the prompt is empty: write the text that the model is to go on from")
    require_characters("prompt", prompt)
    edits = [Edit.load(path) for path in edit or []]
    loaded = options.load(model, device, dtype, download, start_token)
    with contextlib.ExitStack() as stack:
        for each in edits:
            stack.enter_context(each.applied(loaded))
        text = loaded.complete(prompt, max_new_tokens, top_k=top_k, temperature=temperature, seed=seed)
    if json:
        show.as_json(
            {"model": loaded.name, "prompt": prompt, "text": text, "edits": [e.id for e in edits], "seed": seed}
        )
    else:
        tell(text)
