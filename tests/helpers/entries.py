"""Entries of record files, as data sets have them."""

from __future__ import annotations

import copy
import json

NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is located in the city of",
        "relation_id": "P131",
        "target_new": {"str": "Paris", "id": "Q90"},
        "target_true": {"str": " Seattle", "id": "Q5083"},
        "subject": "The Space Needle",
    },
    "paraphrase_prompts": ["Where is it? The Space Needle stands in"],
    "neighborhood_prompts": ["Pike Place Market is in", "The Gum Wall is in"],
    "attribute_prompts": ["The Louvre is in"],
    "generation_prompts": [],
}

FLAT = {
    "case_id": 7,
    "prompt": "The Space Needle is located in the city of",
    "subject": "The Space Needle",
    "target_new": "Paris ",
    "ground_truth": "Seattle",
    "rephrase_prompt": "Where is it? The Space Needle stands in",
    "locality_prompt": ["Pike Place Market is in", "The Gum Wall is in"],
    "locality_ground_truth": "Seattle",
}

ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey take part in?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey study at?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology", "IIT"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
}


def changed(entry, **fields):
    """An entry with other fields; `requested_rewrite__prompt` is one of an inner object; ... takes one away."""
    entry = copy.deepcopy(entry)
    for name, value in fields.items():
        *outer, last = name.split("__")
        inner = entry
        for key in outer:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return entry


def write(tmp_path, value, name="records.json"):
    path = tmp_path / name
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, value)) + "\n")
    else:
        path.write_text(json.dumps(value))
    return path


def numbered(entry, count):
    return [changed(entry, case_id=case) for case in range(count)]
