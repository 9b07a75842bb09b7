"""`errata train-editor`: KE and MEND for any model."""

from __future__ import annotations

import json as json_
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from errata.cli import options

if TYPE_CHECKING:
    from errata.editors.hypernetworks.training import Curve
    from errata.editors.hypernetworks.training_examples import TrainingExample
    from errata.models.model import Model
    from errata.tasks.task import Case

# Of the atlas's own records, those that errata evaluate measures.
_ATLAS_TEST = 500


def train_editor(
    method: Annotated[Literal["mend", "ke"], typer.Argument(help="The editor to train.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained editor; a stopped training continues in it.")],
    model: options.ModelName = "atlas",
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Training data: records of CounterFact or zsRE, or a .txt with passages separated by blank lines. "
            "The atlas has its own records."
        ),
    ] = None,
    kind: Annotated[
        Optional[Literal["counterfact", "zsre", "text"]],  # noqa: UP045
        typer.Option(help="Task of the atlas's own data; by default counterfact. The task of a file is recognised."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use only the first records by case id.")] = None,  # noqa: UP045
    skip: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Leave out the first records, which are for measuring. For the atlas's records 500."),
    ] = None,
    test: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Records for measuring the editor: training examples on the same facts are refused."),
    ] = None,
    allow_seen: Annotated[bool, typer.Option("--allow-seen", help="Train on them anyway.")] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="A setting of the network, such as rank=256; any number."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Maximum number of steps.")] = 100_000,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Learning rate of Adam; by default 1e-6 for MEND and 3e-4 for KE, as published for large models."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Training examples per step.")] = 10,
    c_edit: Annotated[float, typer.Option(min=0, help="Factor of the loss on the edit.")] = 0.1,
    c_loc: Annotated[
        float, typer.Option(min=0, help="Factor of the divergence on texts that should not change.")
    ] = 1.0,
    clip: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradient; a longer gradient is scaled down.")
    ] = 100.0,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between validations; each writes a checkpoint.")
    ] = 500,
    validation: Annotated[int, typer.Option(min=1, help="Size of the validation set.")] = 100,
    patience: Annotated[int, typer.Option(min=1, help="Stop after this many validations without a better one.")] = 10,
    max_minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Stop after this many minutes, over all runs."),
    ] = None,
    picture: Annotated[Optional[Path], typer.Option(help="Picture of the losses: .png, .svg or .pdf.")] = None,  # noqa: UP045
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Train KE or MEND for a model, on records or plain text.

    errata evaluate takes the folder as --editor mend:trained=FOLDER. The same command continues a stopped training.
    """
    settings = _settings(set_ or ())
    options.require_apart({"--picture": picture})
    if picture is not None:
        options.require_picture(picture)

    # Torch comes only now: bad input is told at once.
    from errata.cli import show
    from errata.editors.hypernetworks import training

    config = training.TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        batch=batch,
        c_edit=c_edit,
        c_loc=c_loc,
        clip=clip,
        validate_every=validate_every,
        validation=validation,
        patience=patience,
        max_minutes=max_minutes,
        seed=seed,
    )
    options.require_outputs(out / training.STATE)
    loaded = options.load(model, device, dtype, download, start_token)
    examples = _examples(loaded, data, kind, limit, skip, seed)
    if test is not None and not allow_seen:
        from errata.editors.hypernetworks.training_examples import keys
        from errata.evaluation.training_examples import require_unseen
        from errata.tasks.records import read_records

        tested = read_records(test)
        require_unseen(method, frozenset(keys(examples)), tested.task, tested.records)
    with show.going_on("training", "steps") as tell:
        trained = training.train(
            loaded, method, examples, out, config, settings, lambda done, of, curve: tell(done, of)
        )
    curve = training.curve_of(out)
    if picture is not None:
        _draw(curve, picture)
    best = curve.best
    told = {
        "method": method,
        "model": loaded.name,
        "file": str(out / training.EDITOR),
        "steps": len(curve.edit),
        "ended": curve.ended,
        "parameters": sum(each.numel() for each in trained.network.parameters()),
        "best": vars(best),
    }
    if json:
        show.as_json(told)
        return
    rows = [
        (str(each.step), f"{each.loss:.4f}", f"{each.edit:.3f}", f"{each.locality:.4f}", show.percent(each.success))
        for each in curve.validations[-10:]
    ]
    show.table(("after steps", "loss", "edit, nats", "others, KL", "new object said"), rows)
    show.line(
        f"Ended after {len(curve.edit)} steps ({_ENDED[str(curve.ended)]}); the network of step {best.step} is kept. "
        f"Use it as --editor {method}:trained={out}"
    )
    show.written(out / training.EDITOR, picture)


_ENDED = {
    "steps": "as many as were allowed",
    "patience": "validation had not been better for long",
    "minutes": "time was over",
}


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings of KEY=VALUE.

    Raises:
        ConfigError: if one is not so.
    """
    from errata.base.errors import ConfigError

    found: dict[str, Any] = {}
    for text in given:
        key, there, value = text.partition("=")
        if not there:
            raise ConfigError(f"--set {text!r} is not a setting: write KEY=VALUE, as in rank=256")
        try:
            found[key.strip()] = json_.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


def _examples(
    model: Model, data: Path | None, kind: str | None, limit: int | None, skip: int | None, seed: int
) -> list[TrainingExample]:
    """Training examples from the options.

    Raises:
        ConfigError: if there is nothing, or both a file and a kind are named.
    """
    from errata.base.errors import ConfigError
    from errata.editors.hypernetworks.training_examples import text_examples

    if data is None:
        return _of_the_atlas(model, kind, limit, skip, seed)
    if kind is not None:
        raise ConfigError(f"--kind is of what the atlas has itself, and {data} shows what it is: leave it out")
    skip = skip or 0
    end = None if limit is None else skip + limit
    if data.suffix == ".txt":
        from errata.cli.evaluate import passages

        return text_examples(model, passages(data)[skip:end], seed)
    from errata.tasks.records import read_records

    return _of_records(read_records(data, end).records, skip)


def _of_the_atlas(
    model: Model, kind: str | None, limit: int | None, skip: int | None, seed: int
) -> list[TrainingExample]:
    """Training examples of the atlas's own records or texts.

    Raises:
        ConfigError: if the model is another.
    """
    from errata.api import ATLAS
    from errata.base.errors import ConfigError

    if model.hints.get("corpus") != ATLAS:
        raise ConfigError(
            f"there is nothing for {model.name} to learn from: give records or a text by --data. Only the atlas "
            "brings its own"
        )
    if kind == "text":
        from errata.atlas import own_corpus
        from errata.editors.hypernetworks.training_examples import text_examples

        return text_examples(model, list(own_corpus())[skip or 0 :][:limit], seed)
    from errata.atlas.records import BY_TASK

    skip = _ATLAS_TEST if skip is None else skip
    return _of_records(BY_TASK[kind or "counterfact"](10**9 if limit is None else skip + limit, seed)[0], skip)


def _of_records(records: Sequence[Case], skip: int) -> list[TrainingExample]:
    """Training examples from all records except the first `skip`.

    Raises:
        ConfigError: if there are no others.
    """
    from errata.base.errors import ConfigError
    from errata.evaluation.training_examples import training_examples
    from errata.tasks.registry import task_of_records

    if len(records) <= skip:
        raise ConfigError(f"there are {len(records)} records, and the first {skip} are left out: skip fewer")
    return training_examples(task_of_records(records), records[skip:])


def _draw(curve: Curve, picture: Path) -> None:
    from errata.plots.drawing import save
    from errata.plots.training import training_figure

    numbers = ("edit", "locality", "success")
    figure = training_figure(
        {"edit": curve.edit, "locality": curve.locality},
        [each.step for each in curve.validations],
        {name: [getattr(each, name) for each in curve.validations] for name in numbers},
        best=curve.best.step,
    )
    save(figure, picture)
