"""The command line: which commands there are. No torch is imported before a command runs."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from errata.base.errors import ErrataError
from errata.cli import demo, edit, generate, trace

app = typer.Typer(
    name="errata",
    help="Locate and edit factual associations in transformer language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("trace")(trace.trace)
app.command("edit")(edit.edit)
app.command("generate")(generate.generate)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"errata {metadata.version('errata')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Locate and edit factual associations in transformer language models."""


def main() -> None:
    """Run the command line: exit code 0 if it worked, 2 for bad input (one line says what), 130 if interrupted."""
    try:
        app()
    except ErrataError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
