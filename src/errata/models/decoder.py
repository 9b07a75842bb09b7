"""A decoder as the rest of errata sees it: a Hugging Face model, its tokenizer, and where its parts are.

A stream is a tensor `[b, t, d]` of the forward pass that can be read or replaced:

| stream | is | paper |
|---|---|---|
| `("embedding", 0)` | output of the token embedding | |
| `("state", l)` | output of block l | h |
| `("attention", l)` | output of the attention module of block l | a |
| `("mlp", l)` | output of the MLP module of block l | m |
| `("key", l)` | input of the MLP down-projection, `[b, t, d_mlp]` | k |
| `("value", l)` | output of the MLP down-projection | v |
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, FactError, UnsupportedModel
from errata.models.anatomy import Anatomy, find_anatomy, softcapped, verify
from errata.models.modules import linear_matrix, place
from errata.models.tokens import encode

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast

Stream = tuple[str, int]

PARTS = ("embedding", "state", "attention", "mlp", "key", "value")


@dataclass(frozen=True)
class Batch:
    """Texts as token ids, padded on the right.

    Attributes:
        input_ids: `[b, t]` long.
        attention_mask: `[b, t]` long, 1 on tokens and 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def last(self) -> Tensor:
        """Index `[b]` of the last token of each row."""
        return self.attention_mask.sum(1) - 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))


class Decoder:
    """A Hugging Face decoder whose anatomy has been found and verified: sizes, parts, text in, logits out.

    Attributes:
        hf: the live model, in eval mode.
        tokenizer: its fast tokenizer.
        anatomy: where its parts are.
        name: its name in results and messages.
        d_model: features of the state.
        d_mlp: features of a key.
        vocab_size: how many logits there are, which may be more than the tokenizer has tokens.
        source: where a loader finds it: {"path": absolute folder}, or {"hub": id, "revision": commit}; empty for a live
            model that came from nowhere.
        start_token: the token that `load_model` was asked to put before every text; empty if none.

    Raises:
        UnsupportedModel: if its parts cannot be found or do not behave as a decoder's should.
    """

    @without_autocast
    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        name: str = "",
        anatomy: Anatomy | None = None,
    ):
        if anatomy is None:
            anatomy = find_anatomy(hf)
            verify(hf, anatomy)
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.anatomy = anatomy
        self.name = name or type(hf).__name__
        self.start_token = ""
        self.source = _source(hf)
        self.d_model, self.d_mlp = _matrix_shape(self.module(("key", 0)))
        self.vocab_size = _matrix_shape(hf.get_submodule(anatomy.head))[0]

    def __repr__(self) -> str:
        sizes = f"{self.n_layers} layers, d_model {self.d_model}, d_mlp {self.d_mlp}"
        return f"{type(self).__name__}({self.name!r}, {sizes}, {self.dtype}, {self.device})"

    # ---- sizes and places -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the weights; for a model spread over several devices, that of the embedding, where texts enter.

        What is read off the model stands there too, wherever it was made.
        """
        return place(self.module(("embedding", 0)))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold weights, or to which they are moved for use; `device` is the first."""
        return tuple(dict.fromkeys([self.device, *map(place, self.blocks)]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.hf.dtype

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens, that the model supports; a very large number if its config names none."""
        config = self.hf.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            length = getattr(config, name, None)
            if isinstance(length, int) and length > 0:
                return length
        return 10**9

    @property
    def hints(self) -> dict[str, Any]:
        """Settings for errata in the model's own config (its attribute `errata`), such as {"rome_layer": 4}.

        Raises:
            UnsupportedModel: if that is not what errata reads there.
        """
        hints = getattr(self.hf.config, "errata", None) or {}
        types: dict[str, tuple[type, ...]] = {
            "corpus": (str,),
            "rome": (dict,),
            "rome_layer": (int,),
            "subject_sigma": (int, float),
        }
        wrong = not isinstance(hints, dict) or any(
            name in hints and not isinstance(hints[name], wanted) for name, wanted in types.items()
        )
        if wrong:
            raise UnsupportedModel(
                f"the config of {self.name} has an entry 'errata' that errata cannot read: it is an object with "
                f"{', '.join(types)}. Mend or remove it in config.json"
            )
        return dict(hints)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks themselves, from the embedding to the final norm."""
        return cast(nn.ModuleList, self.hf.get_submodule(self.anatomy.blocks))

    def path(self, stream: Stream) -> str:
        """The dotted name of the module that a stream belongs to.

        Raises:
            ConfigError: if the model has no such stream.
        """
        try:
            part, layer = stream
        except (TypeError, ValueError):
            raise ConfigError(f"{stream!r} is not a stream: name a part and a layer, as in ('mlp', 3)") from None
        if part not in PARTS:
            raise ConfigError(f"{part!r} is not a part of a model: choose one of {', '.join(PARTS)}")
        if part == "embedding":
            if layer != 0:
                raise ConfigError("the embedding is ('embedding', 0): it belongs to no layer")
            return self.anatomy.embedding
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
            raise ConfigError(f"{self.name} has layers 0 to {self.n_layers - 1}, so there is no layer {layer!r}")
        block = f"{self.anatomy.blocks}.{layer}"
        inside = {
            "state": "",
            "attention": self.anatomy.attention_of(layer),
            "mlp": self.anatomy.mlp,
            "key": self.anatomy.down,
            "value": self.anatomy.down,
        }[part]
        return f"{block}.{inside}" if inside else block

    def module(self, stream: Stream) -> nn.Module:
        """The module whose output a stream is; for a key, whose input.

        Raises:
            ConfigError: if the model has no such stream.
        """
        return self.hf.get_submodule(self.path(stream))

    def weight(self, name: str) -> nn.Parameter:
        """A parameter by its name in the Hugging Face model.

        Raises:
            ConfigError: if there is none of that name.
            UnsupportedModel: if it is not at hand, because accelerate has offloaded it.
        """
        try:
            weight = self.hf.get_parameter(name)
        except AttributeError:
            raise ConfigError(
                f"{self.name} has no weight named {name!r}: names look like '{self.path(('key', 0))}.weight'"
            ) from None
        if weight.is_meta:
            raise UnsupportedModel(
                f"{name} of {self.name} is offloaded: every pass reads a copy of it, so it can be neither changed nor "
                "put back here. Load the model with a device_map that gives this block a device of its own"
            )
        return weight

    # ---- text in, numbers out -----------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """The padding id: the tokenizer's own, else end of text, else 0. Padding is always masked."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def ids(self, text: str) -> list[int]:
        """Token ids of one text, with the tokenizer's own special tokens, as `models.tokens.encode` gives them."""
        return list(encode(self.tokenizer, text)["input_ids"])

    def encode(self, texts: Sequence[str]) -> Batch:
        """Token ids of texts, with the tokenizer's own special tokens, as a batch on the model's device.

        Raises:
            FactError: if there is no text, or one has no tokens or more than the model can read.
        """
        if isinstance(texts, str):
            raise FactError("encode takes a list of texts: put the text in brackets, as in [text]")
        if not texts:
            raise FactError("there is no text to encode")
        return self.batch([self.ids(text) for text in texts], texts)

    def batch(self, rows: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> Batch:
        """A batch of token ids, one list a row, on the model's device. Errors name a row by its text, if any.

        Raises:
            FactError: if a row is empty or longer than the model can read.
        """
        for index, row in enumerate(rows):
            self.require_room(row, texts[index] if texts else None, f"row {index}")
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)].fill_(1)
        return Batch(ids, mask).to(self.device)

    def require_room(self, ids: Sequence[int], text: str | None, name: str = "the text") -> None:
        """Check that a text is not too long for the model.

        Raises:
            FactError: if it has no tokens, or more than the model can read.
        """
        name = name if text is None else f"the text {_shortened(text)}"
        if not len(ids):
            raise FactError(f"{name} has no tokens: the model needs at least one to start from")
        if len(ids) > self.max_length:
            raise FactError(f"{name} has {len(ids)} tokens; {self.name} reads at most {self.max_length}. Shorten it")

    @without_autocast
    def forward(self, batch: Batch, keep: int = 0, cache: Cache | None = None) -> Tensor:
        """Logits `[b, t, v]` of the model in its current state, or `[b, keep, v]` at the last `keep` positions.

        Logits at padded positions mean nothing. An empty `cache` is filled with attention's keys and values.
        """
        # No mask: padding is on the right, where no token looks. With one, positions that may see no
        # token at all come out as NaN in some families (Gemma 2 in float64) and spoil the next layer.
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": torch.ones_like(batch.input_ids),
        }
        if keep and "logits_to_keep" in inspect.signature(self.hf.forward).parameters:
            inputs["logits_to_keep"] = keep
        if cache is not None:
            inputs[cache_argument(self.hf.forward)] = cache
        logits = self.hf(**inputs, use_cache=cache is not None).logits
        return logits[:, -keep:]

    @without_autocast
    def added(self, layer: int, mlp: Tensor) -> Tensor:
        """The change of the state that block `layer` makes for an output `[..., d_model]` of its MLP."""
        path = self.anatomy.mlp_norm
        norm = None if path is None else self.hf.get_submodule(f"{self.anatomy.blocks}.{layer}.{path}")
        normed = mlp if norm is None else norm(mlp).to(mlp.device)
        return normed if self.anatomy.residual_scale == 1.0 else normed * self.anatomy.residual_scale

    @without_autocast
    def unembed(self, states: Tensor) -> Tensor:
        """Logits `[..., v]` that the head reads off states `[..., d_model]` of the last block."""
        normed = self.hf.get_submodule(self.anatomy.final_norm)(states)
        return softcapped(self.hf.get_submodule(self.anatomy.head)(normed).to(states.device), self.anatomy)


def _source(hf: PreTrainedModel) -> dict[str, str]:
    """See `Model.source`; told when it is loaded, for a relative path is true only until the folder is changed."""
    name = str(getattr(hf.config, "name_or_path", "") or "")
    if Path(name).is_dir() and name:
        return {"path": os.path.abspath(name)}
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return {}
    revision = getattr(hf.config, "_commit_hash", None)
    return {"hub": name} | ({"revision": str(revision)} if revision else {})


def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a function of transformers takes a cache: "cache" from 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear map."""
    matrix = linear_matrix(module)
    if matrix is None:
        raise UnsupportedModel(f"{type(module).__name__} is not a linear map with a weight of its own")
    return matrix.shape[0], matrix.shape[1]


def _shortened(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[: length - 3] + "...")
