"""`errata data build`: a CounterFact built from the user's own facts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from errata.base.display import tell
from errata.cli import options, tables

if TYPE_CHECKING:
    from errata.base.facts import Rewrite
    from errata.data.build import Built, LessLikely, Maker
    from errata.data.fact_table import BadLine
    from errata.data.templates import Wordings
    from errata.data.triples import Triple
    from errata.models.model import Model

RECORDS, SNIPPETS, CARD = "counterfact.json", "attribute_snippets.json", "build.json"
KIND, VERSION = "counterfact", 1
SAMPLED, TOKENS = 100, 30  # sentences that a model writes, and how long they may be
UNKNOWN = "the model does not know it"

Table = Annotated[
    Path, typer.Argument(help="Facts: subject, relation, object (.csv, .tsv, .jsonl, .json or .parquet).")
]
Templates = Annotated[Path, typer.Option(help="Sentence templates of each relation: .json, .csv, .tsv or .jsonl.")]
Out = Annotated[Path, typer.Option(help=f"Folder for {RECORDS}, {SNIPPETS} and {CARD}.")]
Neighbors = Annotated[
    int,
    typer.Option(min=1, help="Neighborhood and attribute prompts for each record; a fact with fewer makes no record."),
]
Limit = Annotated[Optional[int], typer.Option(min=1, help="Maximum number of records.")]  # noqa: UP045
Texts = Annotated[Optional[Path], typer.Option(help="A table of subjects and texts, used as reference texts.")]  # noqa: UP045
Sentences = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="File of sentences to put before paraphrases, one on each line; by default other facts."),
]
Writer = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model", help="Model that writes the sentences unless --sentences is given: 'atlas', a folder, or a hub id."
    ),
]
KnownTo = Annotated[Optional[str], typer.Option(help="Rewrite only facts that this model knows.")]  # noqa: UP045
Less = Annotated[
    bool,
    typer.Option(
        "--less-likely",
        help="Take only new objects that --model, or else --known-to, finds less probable than the old one.",
    ),
]


def build(
    facts: Table,
    templates: Templates,
    out: Out,
    neighbors: Neighbors = 10,
    paraphrases: Annotated[int, typer.Option(min=1, help="Paraphrases for each record.")] = 2,
    limit: Limit = None,
    once: Annotated[bool, typer.Option("--once", help="Make at most one record for each subject.")] = False,
    texts: Texts = None,
    sentences: Sentences = None,
    model: Writer = None,
    known_to: KnownTo = None,
    less_likely: Less = False,
    seed: options.Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace another build in that folder.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    download: options.Download = False,
    start_token: options.StartToken = None,
    json: options.Json = False,
) -> None:
    """Make a CounterFact from a table of facts and templates for their relations.

    It lists the facts that make no record, with reasons. Bad lines are reported and skipped; the exit code is then 1.
    """
    from errata.base.errors import ConfigError, FactError
    from errata.cli import show
    from errata.data.build import BuildConfig, Maker

    if less_likely and not (model or known_to):
        raise ConfigError("--less-likely asks a model: name it by --model or --known-to")
    if model and sentences and not less_likely:
        raise ConfigError("--model is given for nothing, as --sentences has what it would write: leave one of them out")
    config = BuildConfig(seed=seed, count=limit, neighbors=neighbors, paraphrases=paraphrases, once=once)
    given = _read(facts, templates, texts, sentences, strict)
    card: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "settings": {**config.model_dump(), "model": model, "known_to": known_to, "less_likely": less_likely},
        "inputs": given.inputs,
    }
    if model or known_to:
        card["settings"]["dtype"] = dtype
    _require_place(out, card, force)
    maker = Maker(given.facts, given.wordings, config, sentences=given.sentences, texts=given.texts)
    _tell_unused(maker, given, templates, texts or facts)

    chosen, ask = None, None
    if model or known_to:
        # Torch comes only now: bad input is told at once.
        from errata.models.fingerprint import weights_digest

        names = filter(None, dict.fromkeys((known_to, model)))
        loaded = {name: options.load(name, device, dtype, download, start_token) for name in names}
        card["weights"] = {name: weights_digest(each.hf) for name, each in loaded.items()}
        _require_place(out, card, force)
        if model and not sentences:
            written = _written(loaded[model], seed)
            maker = Maker(given.facts, given.wordings, config, sentences=written, texts=given.texts)
        if known_to:
            digests = [given.inputs[name]["sha256"] for name in ("facts", "templates")]
            chosen = _known(loaded[known_to], maker, _progress(out), " ".join([*digests, str(seed)]))
        if less_likely:
            ask = _comparison(loaded[model or known_to or ""])
    with show.progress("drawing", "facts") as bar:
        made = maker.build(chosen, ask, bar)
    missed = dict(made.missed)
    if chosen is not None and (unknown := tuple(fact for fact in maker.facts if fact not in chosen)):
        missed[UNKNOWN] = unknown
    missed = dict(sorted(missed.items(), key=lambda item: -len(item[1])))
    if not made.records:
        why = "; ".join(f"{reason} ({len(its)})" for reason, its in missed.items())
        raise FactError(f"no fact of {facts} makes a record: {why}. Give more facts or templates, or fewer --neighbors")
    card |= {"records": len(made.records), "facts": len(maker.facts), "bad_lines": len(given.bad)}
    card["missed"] = {reason: Counter(sorted(fact.relation for fact in its)) for reason, its in missed.items()}
    _write(out, made, card)
    if json:
        bad = [{"line": each.line, "reason": each.reason} for each in given.bad]
        show.as_json({**card, "bad": bad, "written": str(out)})
    else:
        show.line(f"{len(made.records)} records of {len(maker.facts)} facts")
        if missed:
            rows = [(reason, str(len(its)), " – ".join(its[0].names)) for reason, its in missed.items()]
            show.table(("no record, because", "facts", "such as"), rows)
        show.written(out)
    if given.bad:
        tell(f"left out: {len(given.bad)} lines", err=True)
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------
# What goes in


@dataclass(frozen=True)
class _Given:
    """Content of the input files; `inputs` has their names and digests, for the card."""

    facts: Sequence[Triple]
    wordings: Mapping[str, Wordings]
    texts: Mapping[str, str]
    sentences: Sequence[str]
    bad: Sequence[BadLine]
    inputs: Mapping[str, Mapping[str, str]]


def _read(facts: Path, templates: Path, texts: Path | None, sentences: Path | None, strict: bool) -> _Given:
    """The content of the files; bad lines are reported.

    Raises:
        FactError: of the first bad line, if strict; or of a template that will not do.
    """
    from errata.data.templates import read_templates
    from errata.data.triples import TRIPLES, read_texts, read_triples

    table = read_triples(facts)
    wordings, digest = read_templates(templates)
    tables.tell_unread(table.unread, facts, TRIPLES)
    tables.tell_bad_lines(table.bad, facts, table.unit, strict)
    digests = {"facts": (facts, table.digest), "templates": (templates, digest)}
    about, bad = table.texts, list(table.bad)
    if texts:
        found, wrong, unit, digest = read_texts(texts)
        tables.tell_bad_lines(wrong, texts, unit, strict)
        about, bad = about | found, bad + list(wrong)
        digests["texts"] = texts, digest
    lines: Sequence[str] = ()
    if sentences:
        lines, digest = _lines(sentences)
        digests["sentences"] = sentences, digest
    inputs = {name: {"file": path.name, "sha256": digest} for name, (path, digest) in digests.items()}
    return _Given([row.triple for row in table.rows], wordings, about, lines, bad, inputs)


def _tell_unused(maker: Maker, given: _Given, templates: Path, texts: Path) -> None:
    """Name relations and subjects that no fact has, on standard error."""
    from errata.data.triples import folded

    for name in maker.unused:
        tell(f"{templates}: there are templates for {name!r}, and no fact", err=True)
    if strangers := given.texts.keys() - {folded(fact.subject) for fact in maker.facts}:
        tell(f"{texts}: of {len(strangers)} subjects there are texts, and no fact", err=True)


def _lines(path: Path) -> tuple[list[str], str]:
    """The lines of a text file that are not blank, and the digest of its bytes."""
    from errata.base import files
    from errata.base.errors import ResultFileError

    content = files.content(path, "sentences")
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ResultFileError(f"{path} is not text in UTF-8 ({error}): save it again as UTF-8") from error
    if not lines:
        raise ResultFileError(f"there is no sentence in {path}: write one a line")
    return lines, hashlib.sha256(content).hexdigest()


def _written(model: Model, seed: int) -> list[str]:
    """Sentences that a model writes freely, each to its last full stop if it has one."""
    from errata.base.errors import ConfigError
    from errata.base.seeds import derive
    from errata.models.generation import generate, start_text

    try:
        start = start_text(model)
    except ConfigError as error:
        raise ConfigError(f"{model.name} has no token to start writing from: give --sentences") from error
    texts = generate(model, [start] * SAMPLED, TOKENS, seed=derive(seed, "sentences"))
    plain = [" ".join(text[len(start) :].split()) for text in texts]
    whole = [match[0] if (match := re.match(r".*[.!?。！？]", text)) else f"{text}." for text in plain if text]
    return list(dict.fromkeys(whole))


def _known(model: Model, maker: Maker, progress: Path, made_from: str) -> set[Triple]:
    """The facts that the model knows, and those of which no record can be made anyway."""
    from errata.cli.facts import ask
    from errata.data.fact_table import FactRow
    from errata.metrics.knowledge import judge, refusal

    rows = {
        fact: FactRow(line, maker.asked(fact), fact.relation, " – ".join(fact.names))
        for line, fact in enumerate(maker.facts, 1)
        if fact.relation in maker.wordings
    }
    asked = [fact for fact, row in rows.items() if not maker.unfit(fact) and not refusal(model, row.fact.text)]
    said = dict(zip(asked, ask(model, [rows[fact] for fact in asked], progress, made_from, 20, 32), strict=True))
    # The others are not asked, but their objects compete.
    verdicts = judge(list(rows.values()), [said.get(fact, "") for fact in rows])
    known = {fact for fact, verdict in zip(rows, verdicts, strict=True) if verdict.known}
    return known | {fact for fact in maker.facts if maker.unfit(fact)}


def _comparison(model: Model) -> LessLikely:
    """Whether new objects are less probable than old ones, by log-probability per token, as CounterFact's scores."""

    def less_likely(rewrites: Sequence[Rewrite]) -> list[bool]:
        from errata.models.scoring import score

        objects = [rewrite.new_object for rewrite in rewrites] + [rewrite.fact.object for rewrite in rewrites]
        scores = score(
            model, [rewrite.text for rewrite in rewrites] * 2, objects, [each.separator for each in rewrites] * 2
        )
        return [new.mean < old.mean for new, old in zip(scores[: len(rewrites)], scores[len(rewrites) :], strict=True)]

    return less_likely


# ---------------------------------------------------------------------------------------------
# What comes out


def _require_place(out: Path, card: Mapping[str, Any], force: bool) -> None:
    """Check, before long work, that the folder may be written.

    Raises:
        OutputError: if it holds another build and that is not to be replaced, or other things.
    """
    from errata.base.errors import OutputError
    from errata.models.saving import require_free

    require_free(out, _is_ours)
    stored = _card(out)
    names = [
        name
        for name in ("settings", "inputs", "weights")
        if name in card and stored is not None and stored.get(name) != card[name]
    ]
    if names and not force:
        raise OutputError(
            f"{out} holds a build from other {' and '.join(names)}, which would be lost: name a new folder, or give "
            "--force"
        )
    options.require_outputs(_progress(out))


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a build, and nothing else."""
    return _card(folder) is not None and {each.name for each in folder.iterdir()} <= {RECORDS, SNIPPETS, CARD}


def _card(folder: Path) -> dict[str, Any] | None:
    """The card of the build in a folder; None if there is none."""
    import json

    try:
        card = json.loads((folder / CARD).read_bytes())
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and card.get("kind") == KIND else None


def _progress(out: Path) -> Path:
    """File that keeps a model's answers until the build is done."""
    return out.with_name(f"{out.name}.progress.jsonl")


def _write(out: Path, made: Built, card: Mapping[str, Any]) -> None:
    import json

    from errata.data.counterfact import write_records
    from errata.data.snippets import write_snippets
    from errata.models.saving import written_folder

    with written_folder(out, _is_ours) as folder:
        write_records(folder / RECORDS, made.records)
        write_snippets(folder / SNIPPETS, made.snippets)
        text = json.dumps(card, ensure_ascii=False, indent=1)
        (folder / CARD).write_text(text + "\n", encoding="utf-8")
    _progress(out).unlink(missing_ok=True)
