"""CounterFact records, in the published schema (nested) and in the schema of other tools (flat).

| nested | flat | is |
|---|---|---|
| `case_id` | `case_id` | a number; the flat schema may omit it, and it is then the entry's position, from 0 |
| `requested_rewrite.subject` | `subject` | what the fact is about |
| `.prompt` | `prompt` | the rewrite prompt, with `{}` for the subject, or with the subject itself, once |
| `.target_new.str`, `.target_true.str` | `target_new`, `ground_truth` | new and old object |
| `.separator` | `separator` | white space between prompts and objects, if the text does not decide it |
| `.target_new.id`, `.target_true.id` | | ids of the objects in the set; optional |
| `.relation_id` | `relation_id` | name of the relation; optional |
| `paraphrase_prompts` | `rephrase_prompt` | whole texts; in the flat schema one, or a list |
| `neighborhood_prompts` | `locality_prompt` | the same |
| | `locality_ground_truth` | the neighbours' object; optional |
| `attribute_prompts`, `generation_prompts` | | lists of whole texts |

A neighbourhood prompt is scored by the record's own old object. A flat record with another object for a neighbour would
be scored by a wrong answer, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata.base.errors import ConfigError, FactError
from errata.base.facts import Fact, Rewrite
from errata.base.files import written_whole
from errata.data.entries import case_id, optional_text, require_keys, text_in, texts_in
from errata.data.fact_table import separator_in, shortened, with_slot
from errata.data.records import Record

_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")


def nested_record(entry: Mapping[str, Any]) -> Record:
    """A record from an entry of the published schema.

    Raises:
        FactError: if it makes none.
    """
    require_keys(entry, "case_id", "requested_rewrite", *_PROMPTS)
    asked = entry["requested_rewrite"]
    if not isinstance(asked, Mapping):
        raise FactError(f"its requested_rewrite is an object with the request, not {type(asked).__name__}")
    require_keys(asked, "subject", "prompt", "target_new", "target_true")
    old, old_id = _target(asked, "target_true")
    new, new_id = _target(asked, "target_new")
    relation, rewrite = optional_text(asked, "relation_id"), _rewrite(asked, old, new)
    paraphrase, neighborhood, attribute, generation = (texts_in(entry, key) for key in _PROMPTS)
    return Record(case_id(entry), relation, rewrite, paraphrase, neighborhood, attribute, generation, (old_id, new_id))


def flat_record(entry: Mapping[str, Any], place: int) -> Record:
    """A record from an entry of the flat schema.

    Args:
        entry: an entry of the file.
        place: its place there, from 0, which is its number where it has none.

    Raises:
        FactError: if it makes none.
    """
    require_keys(entry, "subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt")
    rewrite = _rewrite(entry, text_in(entry, "ground_truth"), text_in(entry, "target_new"))
    if entry.get("locality_ground_truth") is not None:
        for known in texts_in(entry, "locality_ground_truth"):
            if known.strip() != rewrite.fact.object.strip():
                raise FactError(
                    f"its locality_ground_truth {shortened(known)} is not its ground_truth "
                    f"{shortened(rewrite.fact.object)}, by which locality_prompt is scored: leave that prompt out"
                )
    paraphrase, neighborhood = texts_in(entry, "rephrase_prompt"), texts_in(entry, "locality_prompt")
    relation, number = optional_text(entry, "relation_id"), case_id({"case_id": place, **entry})
    return Record(number, relation, rewrite, paraphrase, neighborhood, attribute=(), generation=())


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records atomically in the published schema, one on each line. `read_records` reads them back.

    Raises:
        ConfigError: if the file's ending is none of .json, .jsonl.
        OutputError: if it cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".json", ".jsonl"):
        raise ConfigError(f"cannot write records to {path}: its ending must be .json or .jsonl")
    before, between, after = ("[\n", ",\n", "\n]\n") if ending == ".json" else ("", "\n", "\n")
    lines = (json.dumps(_entry(record), ensure_ascii=False) for record in records)
    with written_whole(path) as temporary:
        temporary.write_text(before + between.join(lines) + after, encoding="utf-8")


def _entry(record: Record) -> dict[str, Any]:
    rewrite, (old_id, new_id) = record.rewrite, record.object_ids
    return {
        "case_id": record.case_id,
        "requested_rewrite": {
            "prompt": rewrite.prompt,
            "relation_id": record.relation,
            "target_new": {"str": rewrite.new_object, "id": new_id},
            "target_true": {"str": rewrite.fact.object, "id": old_id},
            "subject": rewrite.subject,
            **({} if rewrite.separator is None else {"separator": rewrite.separator}),
        },
        **{key: getattr(record, key.removesuffix("_prompts")) for key in _PROMPTS},
    }


def _target(asked: Mapping[str, Any], key: str) -> tuple[str, str]:
    """An object and what the set calls it; it may stand as a text alone."""
    found = asked[key]
    if isinstance(found, Mapping):
        require_keys(found, "str")
        return text_in(found, "str"), optional_text(found, "id")
    return text_in(asked, key), ""


def _rewrite(fields: Mapping[str, Any], old: str, new: str) -> Rewrite:
    subject = text_in(fields, "subject")
    rewrite = Fact(subject, with_slot(subject, text_in(fields, "prompt")), old, separator_in(fields)).rewrite(new)
    if rewrite.new_object == rewrite.fact.object:
        raise FactError(f"its new object is its old one, {shortened(new)}: there is nothing to rewrite")
    return rewrite
