"""The command line: the list of commands. No torch is imported before a command runs."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from errata.base.display import shown
from errata.base.errors import ErrataError
from errata.base.versions import __version__
from errata.cli import (
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
    progress_lines,
    report,
    stats,
    sweep,
    trace,
    train,
)

app = typer.Typer(
    name="errata",
    help="Locate and edit factual associations in transformer language models.",
    pretty_exceptions_enable=False,
    epilog="Example: errata demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Groups of commands as the help lists them, each with one example.
_PANELS: dict[str, tuple[tuple[str, Callable[..., None], str], ...]] = {
    "Start": (("demo", demo.demo, "errata demo"),),
    "Find facts": (
        ("trace", trace.trace, 'errata trace --subject "Roy Hargrove" --prompt "{} is known for playing the"'),
        ("average", average.average, "errata average traces.jsonl"),
        (
            "gradients",
            gradients.gradients,
            'errata gradients --subject "Roy Hargrove" --prompt "{} plays the" --out g.svg',
        ),
        ("figure", figure.figure, "errata figure trace doyle.jsonl --out doyle.svg"),
        ("facts", facts.facts, "errata facts facts.csv --known --out known.csv"),
    ),
    "Change facts": (
        (
            "edit",
            edit.edit,
            'errata edit --subject "Roy Hargrove" --prompt "{} plays the" --to violin --out e.safetensors',
        ),
        ("stats", stats.stats, "errata stats --model FOLDER --layers 5 --corpus text.txt"),
        ("export", export.export, "errata export e.safetensors --lora adapter"),
        ("generate", generate.generate, 'errata generate "Roy Hargrove" --edit e.safetensors'),
    ),
    "Measure edits": (
        ("sweep", sweep.sweep, "errata sweep --limit 2 --layers 3-5 --out sweep"),
        ("sequence", sweep.sequence, "errata sequence --edits 3 --untouched 20 --save sequence.jsonl"),
        ("editors", editors.editors, "errata editors rome"),
        ("train-editor", train.train_editor, "errata train-editor mend --out mend"),
        ("evaluate", evaluate.evaluate, "errata evaluate --limit 4 --editor rome --no-generation --out run"),
        ("report", report.report, "errata report run --page run.html"),
    ),
}
_DATA: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("list", data.list_sets, "errata data list"),
    ("get", data.get, "errata data get counterfact"),
    ("describe", data.describe_file, "errata data describe records.json"),
    ("build", build.build, "errata data build facts.csv --templates templates.json --out mine"),
)
for _panel, _commands in _PANELS.items():
    for _name, _command, _example in _commands:
        app.command(_name, rich_help_panel=_panel, epilog=f"Example: {_example}")(_command)
for _name, _command, _example in _DATA:
    data.app.command(_name, epilog=f"Example: {_example}")(_command)
app.add_typer(data.app, name="data", rich_help_panel="Measure edits", epilog="Example: errata data list")


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
        with progress_lines.lines(" ".join(["errata", *sys.argv[1:2]])):
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
