"""Sweep of one editor over layers and token roles, one row of a run for each: the paper's Figure 5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from errata.base.arguments import checked
from errata.base.errors import ConfigError
from errata.base.roles import current_setting
from errata.editors.method import SecondMoments
from errata.editors.registry import method_of
from errata.evaluation.results import Run
from errata.evaluation.runner import evaluate
from errata.models.model import Model
from errata.models.tokens import Role
from errata.statistics.store import known_second_moment
from errata.tasks.registry import task_of_records
from errata.tasks.task import Case

TOKENS: tuple[Role, ...] = get_args(Role)
_SWEPT = ("layer", "fact_token")


@checked(model="Model")
def sweep(
    model: Model,
    records: Sequence[Case],
    folder: str | Path,
    method: str = "rome",
    *,
    layers: Sequence[int] | None = None,
    tokens: Sequence[Role] = TOKENS,
    second_moment: SecondMoments | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Run:
    """Edit and score every record at every layer and token role, with one loop over records (`evaluate`).

    The editors of one layer are made when their turn comes, so that one second moment is in memory at a time. The run
    can be stopped and continued; `evaluation.setting_scores.SettingScores.of(run, "layer")`
    has the scores and the figure.

    Args:
        model: the model; left as it was.
        records: records of one task.
        folder: the run folder.
        method: name of an editor with the settings `layer` and `fact_token`.
        layers: from 0; None: all.
        tokens: token roles at which the key is read.
        second_moment, seed: as of `Method.bind`.
        settings: other settings of the editor.
        progress: called with results there and results in all.
        **options: as of `evaluate`.

    Raises:
        ConfigError: if a layer or role does not exist or is given twice, the editor lacks one of the two settings, or
            they are among `settings`.
    """
    editor = method_of(method)
    missing = [name for name in _SWEPT if name not in editor.config.model_fields]
    if missing:
        raise ConfigError(f"{method} cannot be swept: it has no setting {missing[0]!r}. ROME has")
    for name in _SWEPT:
        if name in (settings or {}):
            raise ConfigError(f"a sweep goes through values of {name!r}: leave it out of the editor's settings")
    task_of_records(records)  # raises if they are of none
    numbers = list(range(model.n_layers) if layers is None else layers)
    _require(numbers, range(model.n_layers), "layer")
    tokens = current_setting(tuple(tokens))
    _require(tokens, TOKENS, "token role")
    # Each row is edited at its own layer and nowhere else, as in the paper.
    own = {"attention_sink": "ignore"} if "attention_sink" in editor.config.model_fields else {}
    of_layer: Any = second_moment  # the cached one is loaded once for all roles of a layer
    if second_moment is None and editor.uses_second_moment:
        of_layer = functools.partial(known_second_moment, model)
    if callable(of_layer):
        of_layer = functools.cache(of_layer)
    run: Run | None = None
    for number, layer in enumerate(map(int, numbers)):
        editors = {
            row_name(method, layer, token): editor.bind(
                model,
                layer=layer,
                fact_token=token,
                second_moment=of_layer,
                seed=seed,
                **{**own, **(settings or {})},
            )
            for token in tokens
        }
        before = number * len(tokens) * len(records)
        whole = (len(numbers) * len(tokens) + 1) * len(records)
        tell = None if progress is None else _offset(progress, before, whole)
        run = evaluate(model, records, editors, folder, progress=tell, **options)
        del editors
        if callable(of_layer):
            of_layer.cache_clear()
    assert run is not None  # there is a layer
    return run


def row_name(method: str, layer: int, token: str) -> str:
    """Name of the row of one layer and token role."""
    return f"{method}-layer={layer},fact_token={token}"


def _offset(progress: Callable[[int, int], object], before: int, whole: int) -> Callable[[int, int], object]:
    return lambda done, of: progress(before + done, whole)


def _require(wanted: Sequence[Any], possible: Sequence[Any], what: str) -> None:
    if not len(wanted):
        raise ConfigError(f"there is no {what} to sweep over: give at least one")
    for one in wanted:
        if one not in possible:
            raise ConfigError(f"unknown {what} {one!r}: choose from {', '.join(map(str, possible))}")
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"a {what} is given twice: give each once")
