"""Options that commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

if TYPE_CHECKING:
    from errata.base.facts import Fact
    from errata.cli.second_moments import Source
    from errata.editors.editor import Editor
    from errata.editors.method import Method
    from errata.models.model import Model
    from errata.tracing.average import AverageEffects
    from errata.tracing.result import CausalTrace

Subject = Annotated[str, typer.Option(help="What the fact is about.")]
Prompt = Annotated[str, typer.Option(help="A sentence up to its object, with {} for the subject.")]
ModelName = Annotated[str, typer.Option("--model", help="'atlas' (embedded), a folder, or a Hugging Face hub id.")]
Device = Annotated[
    Optional[str], typer.Option(help="Device such as cuda; auto: all devices of the machine. By default the CPU.")  # noqa: UP045
]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, float16 or float64.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not on this machine.")]
StartToken = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--start-token", help="A token to put before every text, if the tokenizer adds none itself."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The seed of everything random.")]

# Of a trace; the defaults stand with the commands, as those of `TraceConfig`.
Object = Annotated[str, typer.Option("--object", help="The object of the fact; for --answer object.")]
Separator = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="White space between prompt and object, such as '' or ' '. By default the text decides."),
]
Samples = Annotated[int, typer.Option(min=1, max=100_000, help="Number of noise samples.")]
Noise = Annotated[
    str,
    typer.Option(
        help="s3: Gaussian, 3σ of the subjects' embeddings; 0.1: Gaussian of that level; u3: uniform, ±3σ; "
        "m: multivariate; t5: Student's t. ! replaces embeddings; +1 also corrupts a token after the subject."
    ),
]
Window = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1,
        help="Layers whose MLP or attention is restored together; by default 10, below 30 layers a fifth.",
    ),
]
WindowEdges = Annotated[
    Literal["paper", "reference"],
    typer.Option(help="Position of a window of 10 layers: paper, l-4 to l+5; reference (published code), l-5 to l+4."),
]
SeveredNoise = Annotated[
    Literal["paper", "reference"],
    typer.Option(help="Noise of severed runs: paper, the corrupted run's; reference (published code), new noise."),
]
Answer = Annotated[
    Literal["model", "object"],
    typer.Option(help="The answer whose probability is traced: the model's own, or the fact's object."),
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Memory for the runs besides the model, such as 4GB or 500MB; by default half of the free memory."
    ),
]
MinEffect = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="Leave traces with a smaller total effect out of averages. Default: 0.01, in reference averages -1."
    ),
]
Averaging = Annotated[
    Literal["facts", "reference"],
    typer.Option(
        help="facts: each fact counts once in a role; reference: tokens are pooled, as in the published notebook."
    ),
]
Unknown = Annotated[
    bool, typer.Option("--unknown", help="Also average facts for which the model's answer is not the object.")
]
Picture = Annotated[Optional[Path], typer.Option("--out", help="Picture: .png, .svg or .pdf.")]  # noqa: UP045


def require_outputs(*paths: Path | None) -> None:
    """Check, before long work, that its results can be written.

    Raises:
        OutputError: if one cannot.
    """
    from errata.base.files import require_writable

    for path in paths:
        if path is not None:
            require_writable(path)


def require_picture(path: Path | None) -> None:
    """Check, before long work, that a figure can be written there.

    Raises:
        ConfigError: if its ending is none of a picture.
        OutputError: if it cannot be written.
        MissingExtra: if matplotlib is not installed.
    """
    from errata.base.extras import needed
    from errata.plots.drawing import require_ending

    if path is not None:
        require_ending(path)
        require_outputs(path)
        needed("matplotlib", "plots")


def require_apart(paths: Mapping[str, Path | None]) -> None:
    """Check that no two of these files are the same; the keys are the names of their options.

    Raises:
        ConfigError: if two are.
    """
    from errata.base.errors import ConfigError

    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        other = seen.setdefault(Path(os.path.realpath(path)), name)
        if other != name:
            raise ConfigError(f"{other} and {name} are both {path}, and one would replace the other: name two files")


def require_ending(path: Path, endings: Sequence[str], what: str) -> None:
    """Check that a file's ending fits its content.

    Raises:
        ConfigError: if its ending is none of these.
    """
    from errata.base.errors import ConfigError

    if path.suffix.lower() not in endings:
        raise ConfigError(f"{path} is to hold {what}, so its ending must be one of {', '.join(endings)}")


def comma_separated(text: str) -> tuple[str, ...]:
    """The values of a comma-separated option."""
    return tuple(word.strip() for word in text.split(","))


def layer_numbers(text: str) -> list[int]:
    """Layer numbers from a text such as 3, 3-5 or 2,4-6.

    Raises:
        ConfigError: if they are written otherwise.
    """
    from errata.base.errors import ConfigError

    found: list[int] = []
    for word in comma_separated(text):
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--layers is {text!r}, which names no layers: write 3, 3-5 or 2,4-6")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise ConfigError(f"--layers is {text!r}, which names no layers: the lower one comes first, as in 3-5")
    return found


def memory_bytes(text: str | None) -> int | None:
    """Number of bytes from a text such as 4GB, 1.5 GiB, 500M or 4096.

    Raises:
        ConfigError: if they are written otherwise, or are none.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from errata.base.errors import ConfigError

    if text is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValidationError:
        size = 0
    if size < 1:
        raise ConfigError(f"--memory is {text!r}, which is not a known size: write it like 4GB, 500MB or 1.5GiB")
    return size


def require_share(min_effect: float | None) -> None:
    """Check, before long work, that this is a valid bound for choosing traces.

    Raises:
        ConfigError: if they cannot.
    """
    from errata.base.errors import ConfigError

    if min_effect is not None and not -1 <= min_effect <= 1:
        raise ConfigError(f"--min-effect is {min_effect}, and effects are from -1 to 1: give one such as 0.01")


def averaged(
    traces: Sequence[CausalTrace], averaging: Literal["facts", "reference"], min_effect: float | None, unknown: bool
) -> AverageEffects:
    """Averages of traces, by the options.

    Raises:
        ConfigError: if none is left, or they do not belong together.
    """
    from errata.tracing.average import average_effects

    return average_effects(traces, averaging=averaging, min_effect=min_effect, known_only=not unknown)


def load(model: str, device: str | None, dtype: str, download: bool, start_token: str | None = None) -> Model:
    """The model that the options name, without the progress bars of its libraries."""
    from transformers.utils import logging

    from errata.api import load_model

    if not download:
        logging.disable_progress_bar()
    where: Any = {"device_map": "auto"} if device == "auto" else {"device": device}
    return load_model(model, dtype=dtype, download=download, start_token=start_token, **where)


def editor_spec(text: str) -> tuple[str, str, dict[str, Any]]:
    """Name of the row, method and settings of NAME=METHOD:KEY=VALUE,...

    Raises:
        ConfigError: if it is not so.
    """
    from errata.base.errors import ConfigError

    head, _, tail = text.partition(":")
    name, named, method = head.rpartition("=")
    settings: dict[str, Any] = {}
    for part in re.split(r",(?![^\[{]*[\]}])", tail) if tail else ():  # not within brackets
        key, given, value = part.partition("=")
        if not given or not key.strip():
            raise ConfigError(
                f"--editor {text!r}: {part!r} is not a setting: write KEY=VALUE, as in rome:key=reference"
            )
        if key.strip() in settings:
            raise ConfigError(f"--editor {text!r}: {key.strip()} is given twice: give it once")
        try:
            settings[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key.strip()] = {"None": None, "True": True, "False": False}.get(value, value)
    told = ",".join(f"{key}={value}" for key, value in settings.items())
    own = re.sub(r"[^\w.+=,-]", "", f"{method}-{told}" if told else method)
    if not named and len(own.encode()) > 100:
        raise ConfigError(f"--editor {text[:60]!r}… is too long to name a row: give a name, as in own={text[:20]}…")
    return name if named else own, method, settings


def bind(
    method: Method,
    model: Model,
    settings: Mapping[str, Any],
    source: Source,
    seed: int,
    facts: Sequence[Fact],
    *,
    sample_now: bool = True,
) -> Editor:
    """The editor of a method, with settings as texts from the command line.

    Args:
        sample_now: see `Method.bind`; False: prefixes and second moments wait for a rewrite that can be made.

    Raises:
        ConfigError: if a setting is unknown, wrong or missing.
    """
    unknown = settings.keys() - {*method.config.model_fields, "preset"}
    method.config(**{name: settings[name] for name in unknown})  # refuses them, with the nearest name
    second_moment = source.for_method(method, model)
    return method.bind(model, second_moment=second_moment, seed=seed, facts=facts, sample_now=sample_now, **settings)


def require_no_bound(settings: Mapping[str, Any]) -> None:
    """Refuse settings that bound side effects, in a run that measures them.

    Raises:
        ConfigError: if there is one.
    """
    from errata.base.errors import ConfigError

    for name in ("max_drift", "probes"):
        if settings.get(name) is not None:
            raise ConfigError(
                f"{name} has no effect here: a run measures side effects and refuses no edit. Leave it out; --probe "
                "names the texts"
            )


def source_name(data: Path | None) -> str:
    """Name of a set of records in a run."""
    from errata.base.files import resolved

    return resolved(data).name if data else "atlas"
