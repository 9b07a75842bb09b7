"""Where is an edit best made? Every layer and token role, over many records: Figure 5 of the paper.

At each site the ROME edit of each record is made by itself, put on, scored with CounterFact's metrics and taken off. A
record that cannot be edited at a site, such as at the last layer before the last token, counts there with the unedited
model's scores, and the reason is kept.

What is done is in a file at once, a line a site and record. A run that is killed and started again goes on, and its
file is the same, byte for byte, as that of a run in one go: which records are edited together depends on the records
alone. Records can be added to a run behind those that it has.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import NotRequired, TypedDict

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.config import changed
from errata.base.errors import ConfigError, EditMismatch, ErrataError, FactError, ResultFileError
from errata.base.facts import as_plain
from errata.base.interrupt import deferred_interrupt
from errata.base.journal import Journal, read_journal
from errata.base.reading import of_type, taking_apart
from errata.benchmarks.records import Record
from errata.editors.rome import RomeConfig, contexts, rome
from errata.edits.edit import Edit
from errata.evaluation.run import begun_with, broken, digest, header, moment_digest, require_no_more
from errata.metrics.counterfact import RecordScores, score_record, summarise
from errata.metrics.summary import Estimate
from errata.models.model import Model
from errata.models.tokens import Role
from errata.plots.drawing import save
from errata.plots.sites import sites_figure
from errata.statistics.second_moment import SecondMoment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "site scores"
FORMAT = 2
METRICS = ("es", "ps", "ns", "s")
_TOGETHER = 16  # records that are edited at once: more is lost with a kill

Key = tuple[int | None, str | None, int | None]  # layer, token and case that a line is of

# Which of these there are: the unedited model's line of a case, a layer's own, and one of a site and case.
_PARTS = _OF_CASE, _OF_LAYER, _OF_SITE = (False, False, True), (True, False, False), (True, True, True)


class _Header(TypedDict):
    """Settings in the header of a run, as far as they are read."""

    model: str
    layers: list[int]
    tokens: list[Role]
    cases: list[int]


class _Line(TypedDict):
    layer: int | None
    token: str | None
    case: int | None
    scores: NotRequired[dict[str, float | None] | None]


@dataclass(frozen=True, eq=False)
class SiteScores:
    """Scores of edits by layer and token, as far as a run has come.

    Attributes:
        model: name of the model.
        layers: the layers, from 0.
        tokens: the roles of tokens.
        mean: for each of `METRICS` the mean over records `[tokens, layers]`, a fraction; NaN where none was scored.
            "es", "ps" and "ns" are efficacy, paraphrase and neighborhood scores, "s" is their harmonic mean.
        interval: half widths of the 95 % intervals, likewise; that of "s" is of its linear approximation.
        unedited: the same of the model without an edit.
        counts: how many records were scored `[tokens, layers]`.
        impossible: how many of these could not be edited and count as unedited, likewise.
        reasons: why not, and how often each, the most frequent first.
        settings: the header of the file, with the cases that were added later.
    """

    model: str
    layers: tuple[int, ...]
    tokens: tuple[Role, ...]
    mean: Mapping[str, NDArray[np.float64]]
    interval: Mapping[str, NDArray[np.float64]]
    unedited: Mapping[str, Estimate]
    counts: NDArray[np.int64]
    impossible: NDArray[np.int64]
    reasons: Mapping[str, int]
    settings: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> SiteScores:
        """What a file of `sweep_sites` holds, which may still be growing. No model is needed.

        Raises:
            ResultFileError: if the file is missing, not ours, or broken.
        """
        settings, lines = read_journal(path, KIND, FORMAT)
        with taking_apart(path, f"a file of {KIND}", advice="Begin another file"):
            of_type(settings, _Header)
        return _averaged(settings, _by_key(lines, settings, path))

    def best(self) -> tuple[Role, int, float]:
        """Token and layer with the highest score S, and that score.

        Raises:
            ConfigError: if no site has one.
        """
        scores = self.mean["s"]
        if np.isnan(scores).all():
            raise ConfigError("no site has a score yet, so none is the best: let the run go on")
        token, layer = np.unravel_index(int(np.nanargmax(scores)), scores.shape)
        return self.tokens[token], self.layers[layer], float(scores[token, layer])

    def figure(self, title: str | None = None) -> Figure:
        """The scores against layers, after Figure 5 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        return sites_figure(
            self.mean,
            {name: np.clip(self.mean[name] - self.interval[name], 0, 1) for name in METRICS},
            {name: np.clip(self.mean[name] + self.interval[name], 0, 1) for name in METRICS},
            self.tokens,
            self.layers,
            unedited={name: self.unedited[name].mean for name in METRICS},
            title=title,
        )

    def plot(self, path: str | Path) -> None:
        """Draw the figure into a .png, .svg or .pdf file.

        Raises:
            ConfigError: if the path ends otherwise.
            OutputError: if the file cannot be written.
            MissingExtra: if matplotlib is not installed.
        """
        save(self.figure(), path)


@checked(model="Model", records=["Record"], config="RomeConfig")
@without_autocast
def sweep_sites(
    model: Model,
    records: Sequence[Record],
    path: str | Path,
    config: RomeConfig | None = None,
    *,
    second_moments: Callable[[int], SecondMoment],
    layers: Sequence[int] | None = None,
    tokens: Sequence[Role] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> SiteScores:
    """Edit and score every record at every layer and token, and keep each result in a file as soon as it is there.

    If the file is there already, of the same model, records and settings, what it holds is not made again; records may
    have been added behind those that it was begun with. Ctrl-C ends the run after the records under way; a second
    one at once. The model is left as it was.

    Args:
        model: any decoder.
        records: what to edit, and the prompts to score it by; each with a case id of its own.
        path: the file, which `SiteScores.load` reads too.
        config: settings of ROME, its layer and token aside; None: the model's own.
        second_moments: gives C of a layer's keys, asked once a layer; of a dict, `moments.__getitem__`.
        layers: which, from 0; None: all.
        tokens: which roles; None: all four.
        seed: of the sampled prefixes.
        progress: called with edits done and edits in all.

    Raises:
        ConfigError: if there is nothing to do, a layer, token or case is unknown or there twice, or the file holds
            more records than are asked for.
        FactError: if a record's prompts or objects cannot be scored.
        StaleStatistics: if a second moment is of another layer or size.
        ResultFileError: if the file is of another model, other records or settings, or broken.
        OutputError: if the file cannot be written, or another run is writing to it.
        KeyboardInterrupt: after Ctrl-C, once the file is in order.
    """
    records = list(records)
    layers = _checked(layers, range(model.n_layers), "layer")
    tokens = _checked(tokens, get_args(Role), "token")
    cases = _checked(None, [record.case_id for record in records], "case")
    # Each site is edited at its own layer and nowhere else, as in the paper's Figure 5.
    given = {} if config is None else config.model_dump(exclude_unset=True)
    known, _ = rome.resolve(model, {**given, "layer": layers[0], "attention_sink": "ignore"})
    prefixes = contexts.prefixes(model, known.prefixes, seed)
    settled: RomeConfig = changed(known, prefixes=prefixes, same_subject="apart")
    begun = begun_with(path, KIND, FORMAT, "cases")
    begun = len(begun) if isinstance(begun, list) and begun == cases[: len(begun)] else len(cases)
    settings = header(
        model,
        # each site has its own layer and token
        changed(settled, layer=None, fact_token="subject_last", max_drift=None).model_dump(mode="json"),
        seed,
        layers=layers,
        tokens=tokens,
        cases=cases[:begun],
        records=digest([as_plain(record) for record in records[:begun]]),
    )
    groups = [records[begin : begin + _TOGETHER] for begin in range(0, len(records), _TOGETHER)]
    _require_no_fewer(path, cases)
    with Journal.open(path, KIND, FORMAT, settings, names=_NAMES) as journal, deferred_interrupt() as stop_here:
        lines = _by_key(journal.records, settings, path)
        for record in records[begun:]:
            line = lines.get((None, None, record.case_id))
            if line and line.get("record") != digest(as_plain(record)):
                raise ResultFileError(
                    f"case {record.case_id} of {path} is another record: give the records that it went on with, or "
                    "name another file"
                )

        def keep(key: Key, **values: Any) -> None:
            if key not in lines:
                line = {"layer": key[0], "token": key[1], "case": key[2], **values}
                journal.append(line)
                lines[key] = line

        def tell() -> None:
            if progress:
                done = sum(token is not None for _, token, _ in lines)
                progress(done, len(records) * len(layers) * len(tokens))

        for number, record in enumerate(records):
            if (None, None, record.case_id) not in lines:
                added = {} if number < begun else {"record": digest(as_plain(record))}
                keep((None, None, record.case_id), scores=_score(model, record), **added)
                stop_here()
        tell()
        for layer in layers:
            left = [
                (token, group)
                for token in tokens
                for group in groups
                if any((layer, token, record.case_id) not in lines for record in group)
            ]
            if not left:
                continue
            moment = second_moments(layer)
            numbers = moment_digest(moment)
            if lines.get((layer, None, None), {}).get("second_moment", numbers) != numbers:
                raise ResultFileError(
                    f"{path} was begun with another second moment of layer {layer}, so new records would not belong "
                    "with its old ones: give the same, or name another file"
                )
            for token, group in left:
                site = changed(settled, layer=layer, fact_token=token)
                rewrites = [record.rewrite for record in group]
                edits = rome.bind(model, site, second_moment=moment, seed=seed).make(model, rewrites)
                keep((layer, None, None), second_moment=numbers)  # now that it has proved to fit
                for record, edit in zip(group, edits, strict=True):
                    if (layer, token, record.case_id) not in lines:
                        keep((layer, token, record.case_id), **_tried(model, record, edit))
                        tell()
                stop_here()
    return _averaged(settings, lines)


def _checked(wanted: Sequence[Any] | None, possible: Sequence[Any], name: str) -> list[Any]:
    """What is wanted of what is possible, or all of it, once it is sure that it is something, and nothing twice."""
    wanted = possible if wanted is None else wanted
    if not len(wanted):
        raise ConfigError(f"there is no {name} to sweep over: give at least one")
    for each in wanted:
        if each not in possible:
            raise ConfigError(f"there is no {name} {each!r}: choose of {', '.join(map(str, possible))}")
    chosen = [possible[possible.index(each)] for each in wanted]  # 3 for numpy's 3, which JSON does not have
    twice = [each for each, count in Counter(chosen).items() if count > 1]
    if twice:
        raise ConfigError(
            f"the {name} {twice[0]!r} is there twice, and its results could not be told apart: give it once"
        )
    return chosen


def _tried(model: Model, record: Record, edit: Edit | ErrataError) -> dict[str, Any]:
    """Scores with the edit on the model; or why there are none."""
    if isinstance(edit, ErrataError):
        return {"scores": None, "reason": str(edit)}
    try:
        with edit.applied(model):
            return {"scores": _score(model, record), "reason": None}
    except EditMismatch as error:  # more than float16 can hold
        return {"scores": None, "reason": str(error)}


def _score(model: Model, record: Record) -> dict[str, float | None]:
    """A record's scores on the model as it stands, with null for NaN, which JSON does not have."""
    try:
        scores = score_record(model, record)
    except FactError as error:
        raise FactError(f"case {record.case_id} cannot be scored: {error}") from error
    return {name: None if math.isnan(value) else value for name, value in asdict(scores).items()}


# ---------------------------------------------------------------------------------------------
# From the file

_NAMES = {"fingerprint": "the weights of the model", "records": "the records"}


def _require_no_fewer(path: str | Path, cases: Sequence[int]) -> None:
    """Refuse to go on with a file for fewer records than it has.

    Raises:
        ConfigError: if it is.
    """
    with contextlib.suppress(ResultFileError):  # opening it will say what is wrong
        header, lines = read_journal(path, KIND, FORMAT)
        with taking_apart(path, f"a file of {KIND}"):
            of_type(header, _Header)
        there = _cases(header, lines)
        if there[: len(cases)] == list(cases):
            require_no_more(path, len(there), len(cases), "records")


def _cases(settings: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> list[int]:
    """Cases that a run was begun with, and those that were added, whose lines of the unedited model name a record."""
    added = (line.get("case") for line in lines if "record" in line)
    return list(dict.fromkeys([*settings["cases"], *(case for case in added if type(case) is int)]))


def _by_key(
    lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: str | Path
) -> dict[Key, Mapping[str, Any]]:
    """The lines by what they are of.

    Raises:
        ResultFileError: if one is there twice, or does not fit the header.
    """
    found: dict[Key, Mapping[str, Any]] = {}
    there = {**settings, "cases": set(_cases(settings, lines))}
    for line in lines:
        layer, token, case = key = cast("Key", tuple(line.get(name) for name in ("layer", "token", "case")))
        try:
            of_type(line, _Line)
            parts = (layer is not None, token is not None, case is not None)
            fits = parts in _PARTS and key not in found
            for name, value in (("layers", layer), ("tokens", token), ("cases", case)):
                fits &= value is None or value in there[name]
            if parts == _OF_LAYER:
                fits &= isinstance(line["second_moment"], str)
            elif parts == _OF_SITE and line["scores"] is None:
                fits &= isinstance(line["reason"], str)
            else:
                _scores(line)
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise broken(path, line)
        found[key] = line
    return found


def _scores(line: Mapping[str, Any]) -> RecordScores:
    return RecordScores(**{name: math.nan if value is None else float(value) for name, value in line["scores"].items()})


def _averaged(settings: Mapping[str, Any], lines: Mapping[Key, Mapping[str, Any]]) -> SiteScores:
    layers, tokens, cases = settings["layers"], settings["tokens"], _cases(settings, lines.values())
    settings = {**settings, "cases": cases}
    shape = len(tokens), len(layers)
    mean = {name: np.full(shape, np.nan) for name in METRICS}
    interval = {name: np.full(shape, np.nan) for name in METRICS}
    counts, impossible = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    reasons: Counter[str] = Counter()
    unedited = {case: _scores(lines[None, None, case]) for case in cases if (None, None, case) in lines}
    for row, token in enumerate(tokens):
        for column, layer in enumerate(layers):
            tried = {case: lines[layer, token, case] for case in cases if (layer, token, case) in lines}
            failed = [line["reason"] for line in tried.values() if line["scores"] is None]
            scores = [unedited[case] if line["scores"] is None else _scores(line) for case, line in tried.items()]
            counts[row, column], impossible[row, column] = len(tried), len(failed)
            reasons.update(failed)
            for name, each in summarise(scores).items():
                if name in METRICS:
                    mean[name][row, column], interval[name][row, column] = each.mean, each.half
    return SiteScores(
        model=settings["model"],
        layers=tuple(layers),
        tokens=tuple(tokens),
        mean=mean,
        interval=interval,
        unedited={name: each for name, each in summarise(list(unedited.values())).items() if name in METRICS},
        counts=counts,
        impossible=impossible,
        reasons=dict(reasons.most_common()),
        settings=settings,
    )
