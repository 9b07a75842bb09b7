"""The command line: which commands there are. No torch is imported before a command runs."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from errata import __version__
from errata.base.display import shown
from errata.base.errors import ErrataError
from errata.cli import (
    alive,
    average,
    build,
    data,
    demo,
    edit,
    editors,
    evaluate,
    export,
    facts,
    figure,
    generate,
    gradients,
    report,
    stats,
    sweep,
    trace,
    train,
)

app = typer.Typer(
    name="errata",
    help="Locate and edit factual associations in transformer language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("trace")(trace.trace)
app.command("average")(average.average)
app.command("gradients")(gradients.gradients)
app.command("figure")(figure.figure)
app.command("facts")(facts.facts)
app.command("edit")(edit.edit)
app.command("stats")(stats.stats)
app.command("export")(export.export)
app.command("sweep")(sweep.sweep)
app.command("sequence")(sweep.sequence)
app.command("generate")(generate.generate)
app.command("editors")(editors.editors)
app.command("train-editor")(train.train_editor)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
data.app.command("build")(build.build)
app.add_typer(data.app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Locate and edit factual associations in transformer language models."""


def main() -> None:
    """Run the command line.

    Exit codes: 0, it worked; 1, it worked, but some lines of a table could not be used; 2, bad input (one line on
    standard error says what); 130, interrupted.
    """
    warnings.showwarning = _warn  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):  # what they cannot show is replaced; half a character becomes an escape
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.casefold().replace("-", "") == "utf8"
            stream.reconfigure(errors="backslashreplace" if utf8 else "replace")
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        with alive.lines(" ".join(["errata", *sys.argv[1:2]])):
            code = app(standalone_mode=False)
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _leave(130, "interrupted")
    except ErrataError as error:
        _leave(2, f"error: {error}")
    except OSError as error:  # a name too long, a disk that fails: the user's to mend
        _leave(2, f"error: {error.strerror or error}: {error.filename or ''}")
    except MemoryError as error:
        _leave(2, f"error: out of memory{f' ({error})' if str(error) else ''}: ask for less at once")
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be there yet
            what = str(error).partition(". ")[0]
            _leave(2, f"error: {what}: model and work do not fit there. Give --dtype bfloat16, or --device auto or cpu")
        if not hasattr(error, "format_message"):  # a bug of ours keeps its traceback
            raise
        _leave(2, f"error: {error.format_message()} See errata --help")


def _warn(message: Warning | str, *details: object) -> None:
    """A warning as one line, without the place in the code."""
    print(f"warning: {shown(' '.join(str(message).split()))}", file=sys.stderr)


def _leave(code: int, message: str) -> NoReturn:
    print(shown(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
