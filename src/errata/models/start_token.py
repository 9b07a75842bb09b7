"""Start token: a token put before every text that the tokenizer encodes.

Many decoders treat the first token of a text as an attention sink: from the lowest blocks on, its state is the same
whatever the token is (Xiao et al., 2024: Efficient Streaming Language Models with Attention Sinks; Sun et al., 2024:
Massive Activations in Large Language Models). If the tokenizer adds no start token, a subject at the beginning of a
text is in the sink, and the model keeps hardly any information about it. A start token takes the sink's position
instead.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tokenizers.processors import Sequence, TemplateProcessing

from errata.base.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def adds_start_token(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts a start token before every text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    return bool(encoded["special_tokens_mask"][0])


def with_start_token(tokenizer: PreTrainedTokenizerFast, token: str) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that puts `token` before every text.

    Raises:
        ConfigError: if `token` is not a single token of the vocabulary, or every text has a start token already.
    """
    ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"] if token else []
    if len(ids) != 1:
        known = ", ".join(map(repr, dict.fromkeys(tokenizer.all_special_tokens))) or "none"
        raise ConfigError(
            f"start_token={token!r} is not one token of this tokenizer, so it cannot be put before every text: "
            f"choose a single token; its special tokens: {known}"
        )
    if adds_start_token(tokenizer):
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", verbose=False)["input_ids"][0])
        raise ConfigError(f"the tokenizer begins every text with {first!r} already: leave start_token={token!r} out")
    changed = copy.deepcopy(tokenizer)
    backend = changed.backend_tokenizer
    name = tokenizer.convert_ids_to_tokens(ids[0])
    template = TemplateProcessing(
        single=["start", "$A"], pair=["start", "$A", "start", "$B"], special_tokens=[_special("start", name, ids[0])]
    )
    present = backend.post_processor
    backend.post_processor = template if present is None else Sequence([present, template])
    return changed


def _special(label: str, name: str, token_id: int) -> dict[str, object]:
    return {"id": label, "ids": [token_id], "tokens": [name]}
