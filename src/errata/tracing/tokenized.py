"""Tokenized facts: a prompt's tokens, the subject among them, and the answer that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.base.errors import FactError
from errata.base.facts import Fact
from errata.models.model import Model
from errata.models.scoring import target_ids
from errata.models.tokens import Span, check_length, locate_fact
from errata.passes.sinks import first_token_cosines, warn_of_sink
from errata.tracing.config import TraceConfig
from errata.tracing.result import token_roles


@dataclass(frozen=True)
class TokenizedFact:
    """A tokenized fact.

    Attributes:
        fact: the fact.
        span: the prompt's tokens and the subject among them.
        target: token ids of the answer that is scored; None: the model's own.
        begins: the first token id of the fact's object; None if it has none.
    """

    fact: Fact
    span: Span
    target: tuple[int, ...] | None
    begins: int | None

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the run: the prompt, and all but the last token of a longer answer."""
        return (*self.span.ids, *(self.target or ())[:-1])


def tokenize_fact(model: Model, fact: Fact, config: TraceConfig) -> TokenizedFact:
    """Tokens of a fact.

    Raises:
        FactError: if the text does not fit the model's context, or there is no object where one is needed.
    """
    span = locate_fact(model.tokenizer, fact)
    check_length(span, model.max_length)
    roles = token_roles(len(span.ids), span.first, span.last)
    if config.tokens and not set(config.tokens) & set(roles):
        raise FactError(
            f"no token of {fact.text!r} is a {' or '.join(config.tokens)} token, so no site is left to restore: "
            "ask for other tokens"
        )
    if not fact.object:
        if config.answer == "object":
            raise FactError(f"the fact on {fact.subject!r} names no object, and answer='object' asks for one")
        return TokenizedFact(fact, span, None, None)
    ids, n_prompt = target_ids(model.tokenizer, fact.text, fact.object, fact.separator)
    if config.answer == "model":
        return TokenizedFact(fact, span, None, ids[n_prompt])
    if tuple(ids[:n_prompt]) != span.ids:
        raise FactError(
            f"the prompt {fact.text!r} has other tokens when {fact.object!r} follows, so its answer cannot be scored: "
            "end it with a whole word, or name another separator"
        )
    target = tuple(ids[n_prompt:] if config.scored == "whole" else ids[n_prompt : n_prompt + 1])
    tokenized = TokenizedFact(fact, span, target, ids[n_prompt])
    if len(tokenized.ids) > model.max_length:
        raise FactError(f"prompt and answer on {fact.subject!r} have more than {model.max_length} tokens: shorten them")
    return tokenized


def warn_of_sinks(model: Model, tokenized: Sequence[TokenizedFact]) -> None:
    """Warn of subjects that end at the first token of their text, if the model keeps an attention sink there."""
    subjects = [each.fact.subject for each in tokenized if each.span.last == 0]
    if subjects and first_token_cosines(model, model.n_layers // 2).sink:
        others = f" (and {len(subjects) - 1} more subjects)" if subjects[1:] else ""
        warn_of_sink(
            model,
            f"the subject {subjects[0]!r}{others}",
            "restoring it there in middle layers restores little of the subject",
        )
