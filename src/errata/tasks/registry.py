"""The registries of tasks and metrics: built-in ones and those of other packages.

[project.entry-points."errata.tasks"]
mine = "my_package.task:TASK"             # a Task whose name is "mine"

[project.entry-points."errata.metrics"]
counterfact.length = "my_package:LENGTH"  # a Column called "length" of the task counterfact
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from errata.base.errors import ConfigError
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.task import Case, Column, Task
from errata.tasks.wikibigedit import WIKIBIGEDIT
from errata.tasks.zsre import ZSRE

TASKS = {task.name: task for task in (COUNTERFACT, ZSRE, WIKIBIGEDIT)}

T = TypeVar("T", Task, Column)


def tasks() -> dict[str, Task]:
    """All tasks by name, built-in ones first, each with the metrics that other packages add.

    Raises:
        ConfigError: if another package brings one that cannot be used.
    """
    points = sorted(entry_points(group="errata.tasks"), key=lambda point: point.name)
    names = [*TASKS, *(point.name for point in points)]
    for point in points:
        if names.count(point.name) > 1:
            raise ConfigError(f"{_named(point)} has the name of another task: rename it")
    for point in entry_points(group="errata.metrics"):
        if point.name.partition(".")[0] not in names:
            raise ConfigError(f"{_named(point)} belongs to no task that is installed: name it TASK.METRIC")
    return {name: task_of(name) for name in names}


def task_of(name: str) -> Task:
    """The task with this name, and the metrics that other packages add to it.

    Raises:
        ConfigError: if there is none, or a package that brings it or a metric of it cannot be used.
    """
    task = TASKS.get(name)
    if task is None:
        points = entry_points(group="errata.tasks")
        point = next((point for point in points if point.name == name), None)
        if point is None:
            known = ", ".join([*TASKS, *sorted(point.name for point in points)])
            raise ConfigError(f"unknown task {name!r}: choose from {known}, or install the package that has it")
        task = _loaded(point, Task, name)
    for point in sorted(entry_points(group="errata.metrics"), key=lambda point: point.name):
        of, _, column = point.name.partition(".")
        if of == name:
            if task.column(column):
                raise ConfigError(f"{_named(point)} has the name of another metric of {name}: rename it")
            task = task.with_columns([_loaded(point, Column, column)])
    return task


def task_of_records(records: Sequence[Case]) -> Task:
    """The task that records belong to, by their class.

    Raises:
        ConfigError: if there are none, or they are of no task or of several.
    """
    if not records:
        raise ConfigError("there are no records: give at least one")
    classes = {type(record) for record in records}
    own = {task.record: task for task in TASKS.values()}
    known = own if classes <= own.keys() else {task.record: task for task in tasks().values()}
    other = next((each for each in classes if each not in known), None)
    if other is not None:
        titles = ", ".join(task.title for task in known.values())
        raise ConfigError(
            f"records are of class {other.__name__}, which belongs to no known task ({titles}): read them from a file "
            "with errata.read_records"
        )
    if len(classes) > 1:
        titles = ", ".join(sorted(known[each].title for each in classes))
        raise ConfigError(f"there are records of several tasks ({titles}), whose numbers differ: give one kind")
    return task_of(known[classes.pop()].name)


def _named(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "another package"
    return f"{point.name!r} of {package} ({point.value})"


def _loaded(point: EntryPoint, kind: type[T], name: str) -> T:
    """The object of an entry point.

    Raises:
        ConfigError: if it cannot be loaded, or is something else.
    """
    try:
        found: Any = point.load()
    except Exception as error:  # whatever its package raises
        raise ConfigError(
            f"{_named(point)} cannot be loaded: {type(error).__name__}: {error}. Repair or remove that package"
        ) from error
    if not isinstance(found, kind) or found.name != name:
        raise ConfigError(f"{_named(point)} is not a {kind.__name__} called {name!r}: see `errata.tasks.task`")
    return found
