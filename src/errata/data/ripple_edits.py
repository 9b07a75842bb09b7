"""Edits of RippleEdits.

An entry has one sentence for the new fact and one for the old. It names subject and objects by Wikidata ids only, so
their names are taken from the sentences, which follow a few forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from errata.base.errors import FactError
from errata.base.facts import SLOT
from errata.data.fact_table import shortened

_OF = (  # attributes of a subject; those that contain "of" come first
    "country of citizenship|place of birth|place of death|place of burial|field of work|head of government|"
    "head of state|date of birth|date of death|[a-z ]+?"
)
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"The name of the anthem that is most likely to be performed in (?P<subject>.+?) is (?P<object>.+)",
        r"The name of the [a-z ]+? which (?P<subject>.+?) "
        r"(?:is associated with|is a member of|is part of|is the capital of|plays in) is (?P<object>.+)",
        r"The name of the award (?P<subject>.+?) won is (?P<object>.+)",
        r"The number of children (?P<subject>.+?) has is (?P<object>.+)",
        rf"The (?:names? of the )?(?!names? )(?:{_OF}) of (?P<subject>.+?) (?:is|are) (?P<object>.+)",
        r"The name of the [a-z ]+? (?:held by|in) (?P<subject>.+?) is (?P<object>.+)",
        r"(?P<subject>.+?) (?:follows|is followed by) (?P<object>.+)",
    )
)


def is_ripple_edit(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is in RippleEdits' format."""
    edit = entry.get("edit")
    return isinstance(edit, Mapping) and {"prompt", "subject_id"} <= edit.keys()


def ripple_edit(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's edit as the fields of a request.

    Raises:
        FactError: if its sentences are of no known form.
    """
    edit = entry["edit"]
    prompt, subject, new = _taken_apart(edit["prompt"])
    fields = {"subject": subject, "prompt": prompt, "new_object": new}
    old = edit.get("original_fact")
    if isinstance(old, Mapping) and isinstance(old.get("prompt"), str):
        before, of, its_object = _taken_apart(old["prompt"])
        if (before, of) != (prompt, subject):
            raise FactError(
                f"its original_fact {shortened(old['prompt'])} is not told as its edit {shortened(edit['prompt'])}"
            )
        fields["object"] = its_object
    return fields


def _taken_apart(sentence: Any) -> tuple[str, str, str]:
    """Prompt with `{}`, subject and object of a sentence."""
    if not isinstance(sentence, str):
        raise FactError(f"the prompt of its edit is text, not {type(sentence).__name__}")
    whole = sentence.strip().removesuffix(".")
    for form in _FORMS:
        if found := form.fullmatch(whole):
            begin, end = found.span("subject")
            prompt = whole[:begin] + SLOT + whole[end : found.start("object")].rstrip()
            return prompt, found["subject"], found["object"]
    raise FactError(f"the subject of {shortened(sentence)} cannot be told: the sentence is of no form of RippleEdits")
