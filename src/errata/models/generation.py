"""Text generation: sampling and greedy continuation of prompts.

Every text has its own random numbers, one for each token, from its own seed: a sample does not depend on the other
texts in the batch, up to rounding, and global random state is not changed. Two models that sample with the same seeds
differ only where their predictions differ.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer

from errata.base.autocast import without_autocast
from errata.base.budgets import cached_tokens
from errata.base.errors import ConfigError, Diverged, FactError
from errata.base.interrupt import unbroken
from errata.base.seeds import derive
from errata.base.text import moved_spaces
from errata.models.decoder import Decoder, cache_argument
from errata.models.quick import quick

# How far logits of a padded prompt may be from those of the prompt alone, relative to the largest.
_ALIKE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@without_autocast
def generate(
    model: Decoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    length: int | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int | Sequence[int] = 0,
    around: Callable[[Sequence[int]], AbstractContextManager[object]] | None = None,
    stop: bool = True,
) -> list[str]:
    """Each prompt and its continuation, by sampling, or greedily.

    Sampling draws from the `top_k` most probable tokens (None: from all) at a temperature. A text ends early at an
    end-of-text token (see `stop`), or where the model's longest length is reached.

    Args:
        model: any decoder.
        prompts: what to go on from; without any tokens to add, they are returned as they are. Spaces at the end of one
            are part of the word to come, in tokenizers: the model goes on from the text before them.
        max_new_tokens: how many tokens to add, at most.
        length: how many tokens a text may have with its prompt, at most; None: any.
        top_k, temperature, greedy: how to draw.
        seed: of all texts, each of which has its own derived from it by its place; or of each text.
        around: gives a context for the time in which the prompts with these indexes are run, one batch, in that order.
        stop: whether a text ends at an end-of-text token; else the token is left out and the text goes on.

    Raises:
        FactError: if a prompt has no tokens or leaves no room for one more.
        ConfigError: if a setting is out of range.
        Diverged: if the model's numbers are none.
    """
    if isinstance(prompts, str):
        raise FactError("generate takes a list of prompts: put the prompt in brackets, as in [prompt]")
    _check(max_new_tokens, length, top_k, temperature, greedy)
    if not prompts or max_new_tokens == 0:
        return list(prompts)
    seeds = [derive(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ConfigError(f"there are {len(prompts)} prompts and {len(seeds)} seeds: give one seed, or one a prompt")
    rows = [prompt_ids(model, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise FactError(f"the prompt {prompt!r} has no tokens: the model needs at least one to start from")
        if len(row) >= model.max_length:
            raise FactError(
                f"a prompt of {len(row)} tokens leaves no room to go on: "
                f"{model.name} reads at most {model.max_length}. Shorten it"
            )
    wanted = [max(0, min(max_new_tokens, max_new_tokens if length is None else length - len(row))) for row in rows]
    texts = dict(enumerate(prompts))
    for chosen, new_tokens in _batches(model, [len(row) for row in rows], wanted, _takes_padding(model)):
        settings = _settings(model, new_tokens, stop)
        draw = None if greedy else _Draw([seeds[i] for i in chosen], new_tokens, top_k, temperature, model)
        with around(chosen) if around else contextlib.nullcontext():
            new = _continue(model, [rows[i] for i in chosen], settings, draw)
        for index, tokens in zip(chosen, new, strict=True):
            said = _text_after(model, rows[index], tokens[: wanted[index]])
            there = len(moved_spaces(prompts[index])[1])  # spaces that the prompt shows already
            texts[index] += said[min(there, len(said) - len(said.lstrip(" "))) :]
    return [texts[i] for i in range(len(prompts))]


def prompt_ids(model: Decoder, prompt: str) -> list[int]:
    """Token ids of a prompt without the spaces at its end, which belong to what follows."""
    return model.ids(moved_spaces(prompt)[0])


def start_text(model: Decoder) -> str:
    """The prompt for free text: empty if the tokenizer adds a start token itself.

    Raises:
        ConfigError: if the tokenizer has no token to start from.
    """
    tokenizer = model.tokenizer
    if tokenizer("", verbose=False)["input_ids"]:
        return ""
    start = tokenizer.bos_token or tokenizer.eos_token
    if not start:
        raise ConfigError(
            f"the tokenizer of {model.name} has no start or end token, so no texts can be sampled from nothing. "
            'Give texts instead: RomeConfig(prefixes=("Yesterday. ", ...), probes=("It was a warm day.", ...))'
        )
    return str(start)


def _check(max_new_tokens: int, length: int | None, top_k: int | None, temperature: float, greedy: bool) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: say how many tokens to add, 0 or more")
    if length is not None and length < 1:
        raise ConfigError(f"length is {length}: say how many tokens a text may have, 1 or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}: at least one token must be left to draw; None draws from all")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}: it must be above 0; to draw nothing, say greedy=True")
    if greedy and (top_k is not None or temperature != 1.0):
        raise ConfigError("greedy=True takes the most probable token, so top_k and temperature have no use")


def _batches(
    model: Decoder, lengths: Sequence[int], wanted: Sequence[int], padded: bool
) -> Iterator[tuple[list[int], int]]:
    """(indexes, new tokens): prompts that have room for all go together, as many as memory is for, others alone; those
    of one length, if they cannot be padded."""
    if not padded:
        for length in sorted(set(lengths)):
            some = [i for i, its in enumerate(lengths) if its == length]
            for own, new in _batches(model, [length] * len(some), [wanted[i] for i in some], True):
                yield [some[i] for i in own], new
        return
    alone = [i for i, length in enumerate(lengths) if length + wanted[i] > model.max_length]
    roomy = [i for i, length in enumerate(lengths) if wanted[i] and length + wanted[i] <= model.max_length]
    per_token = 2 * model.n_layers * model.d_model * model.dtype.itemsize
    tokens = cached_tokens(model.device, per_token)
    batch: list[int] = []
    for i in roomy:
        new, longest = (max(of[j] for j in [*batch, i]) for of in (wanted, lengths))
        if batch and (longest + new > model.max_length or (longest + new) * (len(batch) + 1) > tokens):
            yield batch, max(wanted[j] for j in batch)
            batch = []
        batch.append(i)
    if batch:
        yield batch, max(wanted[j] for j in batch)
    yield from (([i], model.max_length - lengths[i]) for i in alone)


def _settings(model: Decoder, new_tokens: int, stop: bool) -> GenerationConfig:
    """A generation config that says all that matters."""
    end = model.hf.generation_config.eos_token_id
    end = model.tokenizer.eos_token_id if end is None else end
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=model.pad_id,
        eos_token_id=end if stop else None,
    )


@unbroken
def _no_settings_of_its_own(model: Decoder) -> Iterator[None]:
    """Context in which the model's own generation config is empty, since transformers fills gaps in ours from it."""
    own = model.hf.generation_config
    model.hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.hf.generation_config = own


class _Surest(LogitsProcessor):
    """Leaves all tokens: the most probable one is taken, if there is one."""

    def __init__(self, model: Decoder):
        self._name = model.name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise _no_numbers(self._name)
        return scores


def _no_numbers(name: str) -> Diverged:
    return Diverged(
        f"what {name} says next has no probabilities: its numbers overflow. Load it in a wider dtype, or take the edit "
        "off that did this"
    )


class _Draw(LogitsProcessor):
    """Leaves of the next tokens the one that is drawn, by the inverse of the distribution function."""

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int | None, temperature: float, model: Decoder):
        numbers = np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])
        self._numbers = torch.from_numpy(numbers).to(model.device)
        self._top_k, self._temperature, self._name = top_k, temperature, model.name
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        heights, tokens = (scores, None) if self._top_k is None else scores.topk(min(self._top_k, scores.shape[-1]))
        shares = (heights.double() / self._temperature).softmax(-1).cumsum(-1)
        if not torch.isfinite(shares).all():
            raise _no_numbers(self._name)
        drawn = torch.searchsorted(shares, self._numbers[:, self._step, None] * shares[:, -1:], right=True)
        drawn = drawn.clamp(max=shares.shape[-1] - 1)
        self._step += 1
        chosen = drawn if tokens is None else tokens.gather(-1, drawn)
        return scores.fill_(-torch.inf).scatter_(-1, chosen, 0)  # ours to change, and large


def _continue(
    model: Decoder, rows: Sequence[Sequence[int]], settings: GenerationConfig, draw: _Draw | None
) -> list[list[int]]:
    """The new tokens alone, of prompts padded on the left."""
    drawing = LogitsProcessorList([draw or _Surest(model)])
    with torch.no_grad(), quick(model.hf), _no_settings_of_its_own(model):
        output = _generate(model, rows, settings, _takes_padding(model), logits_processor=drawing)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    width = max(map(len, rows))
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in output[:, width:].tolist()]


def _generate(
    model: Decoder, rows: Sequence[Sequence[int]], settings: GenerationConfig, roomy: bool, **how: Any
) -> Any:
    width = max(map(len, rows))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    if roomy:
        length = width + (settings.max_new_tokens or 0)
        how[cache_argument(model.hf.forward)] = Cache([_Roomy(length) for _ in range(model.n_layers)])
    return model.hf.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **how)


_padding: WeakKeyDictionary[Decoder, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def _takes_padding(model: Decoder) -> bool:
    """Whether a padded prompt in a batch, with our cache, is continued as it is alone: recurrent layers may fail this.

    Measured once for a model with the attention that it has now.
    """
    known = _padding.setdefault(model, {})
    kind = (id(model.hf), model.device, model.dtype, model.hf.config.get_text_config()._attn_implementation)
    if kind not in known:
        known[kind] = _measured(model)
    return known[kind]


@torch.no_grad()
def _measured(model: Decoder) -> bool:
    long = [(17 * i + 5) % model.vocab_size for i in range(min(6, model.max_length - 2))]
    short = long[: len(long) // 2]
    if not short:  # no room for a trial
        return True
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=model.pad_id, return_dict_in_generate=True, output_logits=True
    )
    with _no_settings_of_its_own(model):
        try:
            both = _generate(model, [short, long], settings, roomy=True).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a foreign forward pass raises, it takes no such batch
            return False
        alone = _generate(model, [short], settings, roomy=False).logits
    if both[0][0].argmax() != alone[0][0].argmax():  # or else the second tokens follow others
        both, alone = both[:1], alone[:1]
    found, want = (torch.stack([each[0] for each in logits]).float() for logits in (both, alone))
    error = (found - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-30)
    return bool((error <= _ALIKE.get(model.dtype, 5e-2))[want.isfinite().all(-1)].all())


class _Roomy(DynamicLayer):
    """Keys and values of one layer with room for a whole text from the start: no token is ever copied."""

    keys: Tensor
    values: Tensor

    def __init__(self, length: int):
        super().__init__()
        self._length = length
        self._room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = tuple(each.new_empty(*each.shape[:-2], self._length, each.shape[-1]) for each in new)
        before = self.get_seq_length()
        end = before + key_states.shape[-2]
        for roomy, each in zip(self._room, new, strict=True):
            roomy[..., before:end, :] = each
        self.keys, self.values = (roomy[..., :end, :] for roomy in self._room)
        return self.keys, self.values


def _text_after(model: Decoder, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add. Some tokenizers (Llama's) drop the first space of a text, so the
    prompt is decoded with them and then taken off."""

    def decode(ids: Sequence[int]) -> str:
        return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)
