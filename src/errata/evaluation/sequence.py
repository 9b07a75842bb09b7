"""Sequential edits on one model: how long edited facts and untouched facts are recalled.

Each edit is made with the earlier ones on the model, and keeps what earlier ones wrote about its own subject, unless
the settings say `same_subject="apart"`. A fact is recalled if every token of its object is the model's most probable
one. Each measurement is written to a file at once, and each edit to a folder beside it. So a run that is killed and
started again continues from the same weights, and its files equal those of an uninterrupted run, byte for byte. A
finished run can be continued with more rewrites. At the end the model is unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, EditFileError, EditMismatch, ErrataError, ResultFileError
from errata.base.facts import Fact, Rewrite, as_plain
from errata.base.interrupt import deferred_interrupt
from errata.base.journal import Journal, read_journal
from errata.base.parsing import of_type, taking_apart
from errata.editors.editor import Editor
from errata.editors.rome import RomeConfig, rome
from errata.edits.edit import Edit
from errata.evaluation.run_header import begun_with, broken, header, moment_digest, require_no_more, sha256
from errata.models.model import Model
from errata.models.scoring import Score, score
from errata.plots.drawing import save
from errata.plots.sequence import sequence_figure
from errata.statistics.second_moment import SecondMoment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "sequential edits"
FORMAT = 1
NEWEST = 10  # edits over which the recall of the newest is averaged: by itself it is yes or no


class _Header(TypedDict):
    """Settings in the header of a run, as far as they are read."""

    model: str
    every: Annotated[int, Field(ge=1)]
    rewrites: Annotated[int, Field(ge=1)]
    untouched: Annotated[int, Field(ge=1)]


class _Line(TypedDict):
    edits: int
    edit: str | None
    reason: str | None
    recalled: bool | None
    lost: list[int] | None
    untouched_lost: list[int] | None


@dataclass(frozen=True, eq=False)
class SequenceScores:
    """Results of sequential edits so far.

    Attributes:
        model: name of the model.
        edits: how many edits had been tried at each measurement, `[points]`; the first is 0.
        edited: share of them that was recalled then; NaN at 0.
        newest: share that was recalled just when it was made, of the newest ten (`NEWEST`); NaN at 0.
        untouched: share of the untouched facts that was recalled.
        refused: (number of the edit, from 1, and reason) of those that could not be made: the model went on
            without them, and they count among the edits.
        settings: the header of the file.
    """

    model: str
    edits: NDArray[np.int64]
    edited: NDArray[np.float64]
    newest: NDArray[np.float64]
    untouched: NDArray[np.float64]
    refused: tuple[tuple[int, str], ...]
    settings: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> SequenceScores:
        """Load a file of `edit_in_sequence`, which may still be growing. No model is needed.

        Raises:
            ResultFileError: if the file is missing, not ours, or broken.
        """
        settings, lines = read_journal(path, KIND, FORMAT)
        with taking_apart(path, f"a file of {KIND}", advice="Begin another file"):
            of_type(settings, _Header)
        return _counted(settings, _checked(lines, settings, path))

    def figure(self, title: str | None = None) -> Figure:
        """Recall against the number of edits.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        lines = {"untouched": self.untouched, "edited": self.edited, "newest": self.newest}
        return sequence_figure(self.edits.tolist(), lines, newest=NEWEST, title=title)

    def plot(self, path: str | Path) -> None:
        """Draw the figure into a .png, .svg or .pdf file.

        Raises:
            ConfigError: if the path ends otherwise.
            OutputError: if the file cannot be written.
            MissingExtra: if matplotlib is not installed.
        """
        save(self.figure(), path)


def edits_folder(path: str | Path) -> Path:
    """Folder of the edits of the run at `path`: "0001.safetensors" is applied first."""
    return Path(path).with_name(f"{Path(path).name}.edits")


@without_autocast
def recalled(model: Model, facts: Sequence[Fact]) -> list[bool]:
    """Whether every token of each fact's object is the model's most probable one.

    Raises:
        FactError: if a fact has no object, or is too long for the model.
    """
    return [each.greedy for each in _scored(model, facts)]


def _scored(model: Model, facts: Sequence[Fact]) -> list[Score]:
    texts, objects = [fact.text for fact in facts], [fact.object for fact in facts]
    return score(model, texts, objects, [fact.separator for fact in facts])


@checked(model="Model", rewrites=["Rewrite"], untouched=["Fact"], config="RomeConfig", second_moment="SecondMoment")
@without_autocast
def edit_in_sequence(
    model: Model,
    rewrites: Sequence[Rewrite],
    untouched: Sequence[Fact],
    path: str | Path,
    config: RomeConfig | None = None,
    *,
    second_moment: SecondMoment,
    layer: int | None = None,
    every: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> SequenceScores:
    """Make ROME edits one after the other, each on top of the earlier ones, and measure what is recalled.

    If the file exists, with the same model, rewrites and settings, the run continues where it stopped; rewrites may
    have been added behind those that it was begun with. Ctrl-C ends it after the edit under way; a
    second one at once. The model is left as it was, byte for byte.

    Args:
        model: any decoder; the second moment and the prefixes are of it as it is now, without the edits.
        rewrites: the rewrites to make, in this order.
        untouched: facts with objects that should stay.
        path: the file, which `SequenceScores.load` reads too; `edits_folder` tells where the edits are.
        config: settings of ROME; None: the model's own.
        second_moment: C, of the keys of the edited layer.
        layer: the layer to edit, from 0; it goes before the config's, which goes before the model's hint.
        every: number of edits between measurements of all edits so far and the untouched facts; the last edit is always
            followed by one.
        seed: seed of the sampled prefixes.
        progress: called with edits done and edits in all.

    Raises:
        ConfigError: if there is nothing to edit or to watch, a number is out of range, no layer is named, or the file
            holds more edits than are asked for.
        FactError: if a fact has no object, or cannot be scored.
        StaleStatistics: if the second moment is of another layer or size.
        ResultFileError: if the file is of another model, other rewrites or settings, or broken, or an edit is missing.
        OutputError: if a file cannot be written, or another run is writing to it.
        KeyboardInterrupt: after Ctrl-C, once the files are in order.
    """
    rewrites, untouched = list(rewrites), list(untouched)
    if not rewrites or not untouched or every < 1:
        raise ConfigError(
            f"there are {len(rewrites)} rewrites and {len(untouched)} untouched facts, measured every {every} edits: "
            "give at least one of each"
        )
    facts = [each.fact for each in rewrites]
    editor = rome.bind(model, config, layer=layer, seed=seed, second_moment=second_moment, facts=facts)
    wanted = [Fact(each.subject, each.prompt, each.new_object, each.separator) for each in rewrites]
    recalled(model, [*wanted, *untouched])  # what cannot be scored is told before any work
    begun = begun_with(path, KIND, FORMAT, "rewrites")
    begun = begun if isinstance(begun, int) and 0 < begun < len(rewrites) else len(rewrites)
    settings = header(
        model,
        {**editor.config, "same_subject": "joint" if editor.together else "apart"},
        seed,
        second_moment=moment_digest(second_moment),
        every=every,
        rewrites=begun,
        untouched=len(untouched),
        facts=sha256([[as_plain(rewrite) for rewrite in rewrites[:begun]], [as_plain(fact) for fact in untouched]]),
    )
    with (
        Journal.open(path, KIND, FORMAT, settings, names=_NAMES) as journal,
        deferred_interrupt() as stop_here,
        contextlib.ExitStack() as on_model,
    ):
        lines = _checked(journal.records, settings, path)
        require_no_more(path, len(lines) - 1, len(rewrites), "edits")
        for line, rewrite in zip(lines[begun + 1 :], rewrites[begun:], strict=False):
            if line.get("rewrite") != sha256(as_plain(rewrite)):
                raise ResultFileError(
                    f"edit {line['edits']} of {path} is of another rewrite than {rewrite.text!r} to "
                    f"{rewrite.new_object!r}: give the rewrites that it went on with, or name another file"
                )
        if progress:
            progress(max(0, len(lines) - 1), len(rewrites))
        for number, line in enumerate(lines if len(lines) <= len(rewrites) else ()):
            if line["edit"] is not None:
                on_model.enter_context(_kept(path, number, line["edit"]).applied(model))
        for number in range(len(lines), len(rewrites) + 1):
            line = {
                "edits": number,
                "edit": None,
                "reason": None,
                "recalled": None,
                "lost": None,
                "untouched_lost": None,
            }
            if number > begun:  # the header does not know it
                line["rewrite"] = sha256(as_plain(rewrites[number - 1]))
            if number:
                made = _put_on(model, rewrites[number - 1], editor, on_model)
                if isinstance(made, Edit):
                    made.save(_edit_path(path, number))
                    line["edit"] = made.id
                else:
                    line["reason"] = str(made)
                line["recalled"] = recalled(model, [wanted[number - 1]])[0]
            if number % every == 0 or number == len(rewrites):
                line["lost"] = _lost(model, wanted[:number])
                line["untouched_lost"] = _lost(model, untouched)
            journal.append(line)
            lines.append(line)
            if progress:
                progress(number, len(rewrites))
            stop_here()
    return _counted(settings, lines)


def _put_on(
    model: Model,
    rewrite: Rewrite,
    editor: Editor,
    on_model: contextlib.ExitStack,
) -> Edit | ErrataError:
    """An edit, applied until the exit stack is closed; or the reason why there is none.

    Raises:
        ConfigError: if the settings allow of none.
    """
    (made,) = (editor.together or editor.make)(model, [rewrite])
    if isinstance(made, ConfigError):  # no other rewrite would do better
        raise made
    if isinstance(made, Edit):
        try:
            on_model.enter_context(made.applied(model))
        except EditMismatch as error:  # more than float16 can hold
            return error
    return made


def _lost(model: Model, facts: Sequence[Fact]) -> list[int]:
    """Indexes of the facts that are not recalled."""
    return [index for index, known in enumerate(recalled(model, facts)) if not known]


# ---------------------------------------------------------------------------------------------
# From the files

_NAMES = {"fingerprint": "the weights of the model", "facts": "the rewrites or the untouched facts"}


def _edit_path(path: str | Path, number: int) -> Path:
    return edits_folder(path) / f"{number:04d}.safetensors"


def _kept(path: str | Path, number: int, wanted: str) -> Edit:
    """The edit of that number.

    Raises:
        ResultFileError: if it is missing, broken or another.
    """
    place = _edit_path(path, number)
    try:
        edit = Edit.load(place)
    except EditFileError as error:
        raise ResultFileError(f"{path} cannot be gone on with, for an edit of its is not there: {error}") from error
    if edit.id != wanted:
        raise ResultFileError(
            f"{place} is not the edit that {path} was made with: put that back, or begin another file"
        )
    return edit


def _checked(
    lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: str | Path
) -> list[Mapping[str, Any]]:
    """The lines, once it is sure that each is what a run has written at its place.

    Raises:
        ResultFileError: if one is not.
    """
    for number, line in enumerate(lines):
        try:
            of_type(line, _Line)
            # A run that was gone on with for more rewrites has measured after its former last one too.
            due = number % settings["every"] == 0 or number == settings["rewrites"]
            measured = due or line["lost"] is not None
            fits = line["edits"] == number
            fits &= isinstance(line["recalled"], bool) == (number > 0)
            fits &= isinstance(line["edit"], str) or number == 0 or isinstance(line["reason"], str)
            for name, of in (("lost", number), ("untouched_lost", settings["untouched"])):
                fits &= set(line[name]) <= set(range(of)) if measured else line[name] is None
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise broken(path, line)
    return list(lines)


def _counted(settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> SequenceScores:
    points = [number for number, line in enumerate(lines) if line["lost"] is not None]
    new = [[line["recalled"] for line in lines[max(1, n - NEWEST + 1) : n + 1]] for n in points]
    of = settings["untouched"]
    return SequenceScores(
        model=settings["model"],
        edits=np.array(points, np.int64),
        edited=np.array([1 - len(lines[n]["lost"]) / n if n else np.nan for n in points]),
        newest=np.array([np.mean(each) if each else np.nan for each in new]),
        untouched=np.array([1 - len(lines[n]["untouched_lost"]) / of for n in points]),
        refused=tuple((n, line["reason"]) for n, line in enumerate(lines) if line["reason"] is not None),
        settings=settings,
    )
