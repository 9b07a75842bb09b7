"""`errata data`: download the published sets, list the local ones, and describe files of records."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from errata.base.display import tell
from errata.cli import options, tables

app = typer.Typer(help="Download published sets, and describe sets of records.", no_args_is_help=True)

Folder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of the files; by default `data` in the cache folder."),
]


def get(
    names: Annotated[list[str], typer.Argument(help="Names of sets, as in errata data list.")],
    folder: Folder = None,
    json: options.Json = False,
) -> None:
    """Fetch published sets, and check that they are complete. Stopped downloads continue; existing files are kept."""
    from errata.cli import show
    from errata.data.sources import source
    from errata.tasks.fetching import fetch

    told = []
    for each in [source(name) for name in dict.fromkeys(names)]:
        with show.progress(each.file, "MB") as bar:
            path = fetch(each, folder, functools.partial(_in_megabytes, bar))
        told.append({"name": each.name, "path": str(path), "licence": each.licence, "citation": each.citation})
        if not json:
            show.line(f"{each.name}: {path}")
            show.line(f"  licence: {each.licence}")
            show.line(f"  cite: {each.citation}")
    if json:
        show.as_json({"files": told})


def _in_megabytes(bar: Callable[[int, int | None], None], done: int, of: int | None) -> None:
    bar(done // 10**6, None if of is None else -(-of // 10**6))


def list_sets(folder: Folder = None, json: options.Json = False) -> None:
    """Name the published sets, where they come from, their licences, and which are here."""
    from errata.cli import show
    from errata.data.sources import SOURCES
    from errata.tasks.fetching import place, state

    states = {name: state(each, folder) for name, each in SOURCES.items()}
    places = {name: place(each, folder) for name, each in SOURCES.items()}
    if json:
        show.as_json(
            {
                "files": [
                    {**asdict(each), "url": each.url, "state": states[name], "path": str(places[name])}
                    for name, each in SOURCES.items()
                ]
            }
        )
        return
    rows = [(name, each.what, each.licence, states[name]) for name, each in SOURCES.items()]
    show.table(("set", "what", "licence", "state"), rows, f"in {next(iter(places.values())).parent}")
    changed = [str(places[name]) for name, found in states.items() if found == "changed"]
    if changed:
        show.line(f"not what was fetched any more: {', '.join(changed)}")


def describe_file(
    file: Annotated[Path, typer.Argument(help="Records (.json, .jsonl, or their folder), or a table of facts.")],
    json: options.Json = False,
) -> None:
    """Describe a set: records, subjects, objects, prompts of each kind; in total, by relation, by record.

    Bad records are reported and skipped; the exit code is then 1.
    """
    from errata.base.errors import ResultFileError
    from errata.cli import show
    from errata.data.fact_table import FactTable
    from errata.tasks.describe import describe
    from errata.tasks.records import FACTS, RecordSet, read_records, what_is_in

    found: RecordSet | FactTable
    if file.suffix.lower() in (".csv", ".tsv"):
        found = tables.facts_of(file)
    else:
        try:
            found = read_records(file, with_snippets=False)
        except ResultFileError:
            if file.is_dir() or what_is_in(file) not in FACTS:
                raise
            found = tables.facts_of(file)
    unit = found.unit if isinstance(found, FactTable) else "entry"
    tables.tell_bad_lines(found.bad, file, unit)
    made_of = describe(found)
    if json:
        bad = [{unit: each.line, "reason": each.reason} for each in found.bad]
        show.as_json({"file": str(file), **asdict(made_of), "bad": bad})
    else:
        rows = [
            (
                item.name,
                f"{item.all:,}",
                f"{item.total:,}",
                "–" if item.per_relation is None else f"{item.per_relation:,.1f}",
                f"{item.per_record:.1f}",
            )
            for item in made_of.items
        ]
        show.line(f"{file}: {made_of.kind}; relations: {made_of.relations or 'none named'}")
        show.table(("", "all", "different", "per relation", "per record"), rows)
    if found.bad:
        tell(f"left out: {len(found.bad)} of {len(found.bad) + made_of.records}", err=True)
        raise typer.Exit(1)
