"""Plain forward passes of Hugging Face models with hooks of their own, one site and one sample of noise at a time.

What replayed and traced runs are held against. Nothing here comes from the package: paths of modules are written out,
noise is drawn with numpy, and every pass runs every block on every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

Stream = tuple[str, int]
Change = Callable[[Tensor], Tensor | None]

# Blocks, embedding, and in a block attention (of hybrids, in even and odd ones), MLP and down-projection.
_LLAMA = ("model.layers", "model.embed_tokens", "self_attn", "mlp", "mlp.down_proj")
_PATHS: dict[str, tuple] = {
    "gpt2": ("transformer.h", "transformer.wte", "attn", "mlp", "mlp.c_proj"),
    "gptj": ("transformer.h", "transformer.wte", "attn", "mlp", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", "attention", "mlp", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "model.decoder.embed_tokens", "self_attn", "fc2", "fc2"),
    "xglm": ("model.layers", "model.embed_tokens", "self_attn", "fc2", "fc2"),
    "mpt": ("transformer.blocks", "transformer.wte", "attn", "ffn.down_proj", "ffn.down_proj"),
    # BLOOM's attention and MLP add the state themselves.
    "bloom": (
        *("transformer.h", "transformer.word_embeddings", "self_attention.dense"),
        *("mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    ),
    "falcon": ("transformer.h", "transformer.word_embeddings", "self_attention", "mlp", "mlp.dense_4h_to_h"),
    "gpt_neo": ("transformer.h", "transformer.wte", "attn", "mlp", "mlp.c_proj"),
    "qwen3_next": (*_LLAMA[:2], ("linear_attn", "self_attn"), *_LLAMA[3:]),
    "qwen3_5": (*_LLAMA[:2], ("linear_attn", "self_attn"), *_LLAMA[3:]),
    "lfm2": (*_LLAMA[:2], ("conv", "self_attn"), "feed_forward", "feed_forward.w2"),
    "jamba": (*_LLAMA[:2], ("mamba", "self_attn"), "feed_forward", "feed_forward.down_proj"),
    "bamba": (*_LLAMA[:2], ("mamba", "self_attn"), "feed_forward", "feed_forward.down_proj"),
}
# What a module is given ("entering" a block, "key" of a down-projection), or what it returns.
_GIVEN = ("entering", "key")
_ORDER = ("embedding", "entering", "key", "value", "mlp", "attention", "state")


def plain_run(
    hf: PreTrainedModel, family: str, ids: Sequence[Sequence[int]], changes: Mapping[Stream, Change]
) -> Tensor:
    """Logits `[b, t, v]` of one pass. Changes get a stream `[b, t, d]`, and give what takes its place, or None."""
    blocks, embedding, attention, mlp, down = _PATHS.get(family, _LLAMA)
    inside = {"entering": "", "state": "", "attention": attention, "mlp": mlp, "key": down, "value": down}
    handles = []
    for part, layer in sorted(changes, key=lambda stream: _ORDER.index(stream[0])):
        own = inside[part][layer % 2] if isinstance(inside.get(part), tuple) else inside.get(part)
        path = embedding if part == "embedding" else f"{blocks}.{layer}.{own}".removesuffix(".")
        module, change = hf.get_submodule(path), _shaped(changes[part, layer], len(ids))
        handles.append(
            module.register_forward_pre_hook(_before(change))
            if part in _GIVEN
            else module.register_forward_hook(_after(change))
        )
    try:
        return hf(torch.as_tensor(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _shaped(change: Change, rows: int) -> Change:
    """A change for modules that are given `[b * t, d]` too (OPT's MLP)."""

    def shaped(tensor: Tensor) -> Tensor | None:
        new = change(tensor.reshape(rows, -1, tensor.shape[-1]))
        return None if new is None else new.reshape(tensor.shape)

    return shaped


def _before(change: Change) -> Callable[..., Any]:
    def hook(module: Any, args: tuple) -> tuple | None:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    return hook


def _after(change: Change) -> Callable[..., Any]:
    def hook(module: Any, args: tuple, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        return new if new is None or not isinstance(output, tuple) else (new, *output[1:])

    return hook


class PlainTrace:
    """Causal tracing of one prompt.

    Args:
        hf: the model, of a family whose paths are written out here.
        family: its name.
        ids: tokens of the prompt.
        target: tokens whose joint probability is traced; None: the most probable next one.
        corrupted: the tokens that are disturbed.
        noise: `[samples, tokens, d]`.
        again: that of the passes in which severed states are restored; None: `noise`.
        replace: whether noise takes the embeddings' place.

    Attributes:
        clean: P[o].
        disturbed: P*[o], mean over samples.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        family: str,
        ids: Sequence[int],
        corrupted: range,
        noise: np.ndarray,
        target: Sequence[int] | None = None,
        replace: bool = False,
        again: np.ndarray | None = None,
    ):
        self.hf, self.family, self.prompt = hf, family, len(ids)
        self.layers = hf.config.num_hidden_layers
        self.noise = [torch.from_numpy(sample) for sample in noise]
        self._again = self.noise if again is None else [torch.from_numpy(sample) for sample in again]
        self.corrupted, self.replace = corrupted, replace
        self.ids = [*ids, *(target or ())[:-1]]
        logits, self._clean = self._kept({})
        self.target = list(target or [int(logits[len(ids) - 1].argmax())])
        self.clean = self._probability(logits)
        runs = [self._kept({("embedding", 0): self._disturb(sample)}) for sample in self.noise]
        self._corrupted = [kept for _, kept in runs]
        self.disturbed = float(np.mean([self._probability(logits) for logits, _ in runs]))

    def restored(self, part: str, token: int, layer: int, window: Iterable[int] = ()) -> float:
        """P*,clean[o] of one site, mean over samples; an MLP's or attention's is restored in all layers of a window."""
        found = []
        noise = self._again if part.startswith("severed_") else self.noise
        for sample, kept in zip(noise, self._corrupted, strict=True):
            changes = {("embedding", 0): self._disturb(sample)}
            if part in ("mlp", "attention"):
                changes |= {(part, one): self._put(self._clean[part, one], token) for one in window}
            else:
                changes["state", layer] = self._put(self._clean["state", layer], token)
            if part.startswith("severed_"):
                held = part.removeprefix("severed_")
                changes |= {(held, one): self._put(kept[held, one], token) for one in range(self.layers)}
            found.append(self._probability(self._logits(changes)))
        return float(np.mean(found))

    @torch.no_grad()
    def _logits(self, changes: Mapping[Stream, Change]) -> Tensor:
        return plain_run(self.hf, self.family, [self.ids], changes)[0]

    def _kept(self, changes: Mapping[Stream, Change]) -> tuple[Tensor, dict[Stream, Tensor]]:
        """Logits `[t, v]`, and states, MLP and attention outputs `[t, d]` of all layers."""
        kept: dict[Stream, Tensor] = {}
        streams = [(part, layer) for part in ("state", "mlp", "attention") for layer in range(self.layers)]
        keepers = {stream: lambda tensor, stream=stream: kept.update({stream: tensor[0].clone()}) for stream in streams}
        return self._logits({**changes, **keepers}), kept

    def _disturb(self, sample: Tensor) -> Change:
        def change(tensor: Tensor) -> Tensor:
            tensor, its_noise = tensor.clone(), sample.to(tensor)
            for token, one in zip(self.corrupted, its_noise, strict=True):
                tensor[0, token] = one if self.replace else tensor[0, token] + one
            return tensor

        return change

    @staticmethod
    def _put(values: Tensor, token: int) -> Change:
        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            tensor[0, token] = values[token]
            return tensor

        return change

    def _probability(self, logits: Tensor) -> float:
        probabilities = logits[self.prompt - 1 :].double().softmax(-1)
        return float(np.prod([float(line[token]) for line, token in zip(probabilities, self.target, strict=True)]))


def window_around(layer: int, width: int, edges: str, layers: int) -> list[int]:
    """The layers around one: of 10 in the middle of a model, 4 before it and 5 after ("paper"), or the reverse."""
    fewer, more = (width - 1) // 2, width // 2
    before, after = (fewer, more) if edges == "paper" else (more, fewer)
    return [other for other in range(layer - before, layer + after + 1) if 0 <= other < layers]
