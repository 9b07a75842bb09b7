"""The texts that a fact's edit is made from, as tokens: contexts with their target, the KL prompt, the bare prompt, and
subjects behind prefixes where their keys are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.base.errors import FactError
from errata.base.facts import Fact, Rewrite
from errata.base.text import joined
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.contexts import Context
from errata.models.model import Model
from errata.models.scoring import target_ids

Kind = Literal["context", "kl", "bare", "subject"]


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        kind: a context, in which the target is to be predicted; the prompt whose next-token distribution is to stay;
            the bare prompt, or a prefix and the subject alone, of which key and value are read.
        ids: its tokens, no further than the last one that matters.
        lookup: index of the token whose value is changed.
        targets: what a context's last tokens are to predict, one each.
    """

    kind: Kind
    ids: tuple[int, ...]
    lookup: int
    targets: tuple[int, ...] = ()


def texts_of(
    model: Model, rewrites: Sequence[Rewrite], prefixes: Sequence[str], config: RomeConfig, first: bool | None = None
) -> tuple[Text, ...]:
    """The texts of one edit: a context for each rewrite and prefix, one KL prompt, a bare prompt for each rewrite;
    and the subject behind each prefix, if keys are read there.

    Args:
        rewrites: rewrites of one subject.
        prefixes: to put before each prompt.
        first: keep only contexts and subjects in which the fact's token is the first of the text (True) or is not
            (False), and put a prefix before the KL prompt where it is not. None: keep all.

    Raises:
        FactError: if a text is too long for the model, a role has no token, or the target melts into the prompt.
    """
    # Bare prompts come first, so that an error quotes the prompt as it was written.
    texts = [
        _until_lookup(model, "bare", Context.of(rewrite.fact, "", model.tokenizer), config) for rewrite in rewrites
    ]
    if config.kl_factor:
        before = next((prefix for prefix in prefixes if prefix), "") if first is False else ""
        kl = Context.of(Fact(rewrites[0].subject, config.kl_prompt), before, model.tokenizer)
        texts.append(_until_lookup(model, "kl", kl, config, whole=config.kl_at == "end"))
    contexts = [
        _with_target(model, Context.of(rewrite.fact, prefix, model.tokenizer), rewrite, config)
        for rewrite in rewrites
        for prefix in prefixes
    ]
    subjects = []
    if config.key_context == "subject" and config.fact_token.startswith("subject_"):
        alone = Fact(rewrites[0].subject, "{}")
        subjects = [
            _until_lookup(model, "subject", Context.of(alone, prefix, model.tokenizer), config) for prefix in prefixes
        ]
    return (*(text for text in (*contexts, *subjects) if first is None or (text.lookup == 0) == first), *texts)


def _until_lookup(model: Model, kind: Kind, context: Context, config: RomeConfig, whole: bool = False) -> Text:
    ids, index = context.lookup(model, config.fact_token)
    model.require_room(ids, context.text)
    return Text(kind, ids if whole else ids[: index + 1], index)


def _with_target(model: Model, context: Context, rewrite: Rewrite, config: RomeConfig) -> Text:
    ids, index = context.lookup(model, config.fact_token)
    whole, n_prompt = target_ids(model.tokenizer, context.text, rewrite.new_object, rewrite.separator)
    if tuple(whole[: index + 1]) != ids[: index + 1] or index >= n_prompt:
        raise FactError(
            f"the tokenizer joins the end of {context.text!r} with the target {rewrite.new_object!r}, "
            f"so that the token {config.fact_token} is another one with and without it. Reword the prompt"
        )
    model.require_room(whole[:-1], joined(context.text, rewrite.new_object, rewrite.separator))
    return Text("context", tuple(whole[:-1]), index, tuple(whole[n_prompt:]))
