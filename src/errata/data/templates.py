"""Sentence templates of relations, written by a person.

A JSON object has one entry for each relation:

    {"made by": {"templates": ["{} is made by", "The maker of {} is"], "generation": ["{}'s factory is in"]}}

An entry may also have "prompt": the template of every rewrite, which is otherwise drawn from the templates. A table
(.csv, .tsv, .jsonl) has one row for each template: columns `relation`, `template` and `kind`, which is template (or
blank), generation or prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.base.errors import FactError, ResultFileError
from errata.base.facts import Fact, require_characters
from errata.base.files import content
from errata.base.parsing import taking_apart
from errata.data.fact_table import TableKind, field_text, read_rows, unread_message

KINDS = ("template", "generation", "prompt")


@dataclass(frozen=True)
class Wordings:
    """Wordings of one relation. Each has one `{}` for the subject.

    Attributes:
        templates: sentences up to the object. The prompt is one of them, the first; each is there once.
        generation: openings that call the fact up indirectly, for free text.
        prompt: the template of every rewrite; None: any.

    Raises:
        FactError: if there is no template, or one has not exactly one `{}`.
    """

    templates: tuple[str, ...]
    generation: tuple[str, ...] = ()
    prompt: str | None = None

    def __post_init__(self) -> None:
        prompt = None if self.prompt is None else self.prompt.strip()
        templates = [each.strip() for each in self.templates]
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "templates", tuple(dict.fromkeys(([] if prompt is None else [prompt]) + templates)))
        object.__setattr__(self, "generation", tuple(dict.fromkeys(each.strip() for each in self.generation)))
        if not self.templates:
            raise FactError("there is no template: write some sentences up to the object, with {} for the subject")
        for each in (*self.templates, *self.generation):
            Fact("subject", each)  # which tells what is wrong with it


def read_templates(path: str | Path) -> tuple[dict[str, Wordings], str]:
    """Wordings by relation, and sha256 of the file's bytes, in hex.

    Raises:
        FactError: if a relation has no template, or one that will not do; all are needed, so none is left out.
        ConfigError: if the file's ending is none of .json, .csv, .tsv, .jsonl.
        ResultFileError: if it is missing, or no such file.
    """
    path = Path(path)
    if path.suffix.lower() != ".json" or not path.is_file():
        return _of_table(path)
    stored = content(path, "templates")
    try:
        with taking_apart(path, "JSON in UTF-8", advice="Mend it"):
            entries = json.loads(stored, object_pairs_hook=lambda pairs: _once(path, pairs))
    except ResultFileError as error:
        raise (error.__cause__ if isinstance(error.__cause__, FactError) else error) from None
    if not isinstance(entries, dict) or not entries:
        raise ResultFileError(
            f'{path} has no templates: it is {{"made by": {{"templates": ["{{}} is made by", ...]}}}}'
        )
    return {name: _checked(path, name, entry) for name, entry in entries.items()}, hashlib.sha256(stored).hexdigest()


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FactError(f"{path} has two entries {twice!r}, and one would replace the other: join them")
    return found


def _checked(path: Path, relation: str, entry: Any) -> Wordings:
    """The wordings of one entry of a JSON object."""
    where = f"{path}, relation {relation!r}"
    require_characters("relation", relation)
    if not relation.strip():
        raise FactError(f"{path} has a relation without a name: name it as the table of facts does")
    if not isinstance(entry, Mapping) or set(entry) - {"templates", "generation", "prompt"}:
        raise FactError(f'{where}: it is an object with "templates", and may have "generation" and "prompt", only')
    lists = [entry.get("templates", []), entry.get("generation", [])]
    prompt = entry.get("prompt")
    for each in lists:
        if not isinstance(each, list) or not all(isinstance(text, str) for text in each):
            raise FactError(f'{where}: "templates" and "generation" are lists of texts, as in ["{{}} is made by"]')
    if prompt is not None and not isinstance(prompt, str):
        raise FactError(f'{where}: "prompt" is one text, as in "{{}} is made by"')
    try:
        return Wordings(tuple(lists[0]), tuple(lists[1]), prompt)
    except FactError as error:
        raise FactError(f"{where}: {error}") from None


def _of_table(path: Path) -> tuple[dict[str, Wordings], str]:
    rows, bad, unit, digest, unread = read_rows(path, _TEMPLATES)
    if bad:
        raise FactError(f"{path}, {unit} {bad[0].line}: {bad[0].reason}")
    if unread:
        raise FactError(f"{path} has {unread_message(unread, _TEMPLATES)}")
    entries: dict[str, dict[str, list[str]]] = defaultdict(lambda: {kind: [] for kind in KINDS})
    for relation, template, kind in rows:
        entries[relation][kind].append(template)
    found = {}
    for relation, of in entries.items():
        if len(of["prompt"]) > 1:
            raise FactError(f"{path}: the relation {relation!r} has several templates of kind prompt: keep one")
        entry = {"templates": of["template"], "generation": of["generation"], "prompt": next(iter(of["prompt"]), None)}
        found[relation] = _checked(path, relation, entry)
    return found, digest


def _row(line: int, found: Mapping[str, Any]) -> tuple[str, str, str]:
    relation, template = field_text(found, "relation", number=True), field_text(found, "template")
    kind = field_text(found, "kind").casefold() or KINDS[0]
    if kind not in KINDS:
        raise FactError(f"its kind is {kind!r}, and must be one of {', '.join(KINDS)}")
    if not relation:
        raise FactError("it has no relation")
    Fact("subject", template)  # which tells what is wrong with the template
    return relation, template, kind


_TEMPLATES = TableKind(
    noun="template",
    needed=(("relation",), ("template",)),
    columns="relation and template, and may have kind",
    parse=_row,
    optional=(("kind",),),
    identity=lambda row: row,
)
