"""How a model goes on from a prompt. Seeded, and nothing outside is changed by it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig

from errata.base.errors import ConfigError, Diverged, FactError
from errata.models.model import Model

# What a model's own generation config may ask for, turned off.
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,
    "output_scores": False,
    "return_dict_in_generate": False,
}


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
) -> list[str]:
    """Each prompt and its continuation, by sampling, or greedily.

    Sampling draws from the `top_k` most probable tokens (None: from all) at a temperature. The same
    seed, prompts, order and machine give the same texts. A text ends early at an end-of-text token, or
    where the model's longest length is reached.

    Raises:
        FactError: if a prompt has no tokens or leaves no room for one more.
        ConfigError: if a setting is out of range.
        Diverged: if the model's numbers are none.
    """
    if isinstance(prompts, str):
        raise FactError("generate takes a list of prompts: put the prompt in brackets, as in [prompt]")
    _check(max_new_tokens, top_k, temperature, greedy)
    if not prompts or max_new_tokens == 0:
        return list(prompts)
    rows = [model.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise FactError(f"the prompt {prompt!r} has no tokens: the model needs at least one to start from")
        if len(row) >= model.max_length:
            raise FactError(
                f"a prompt of {len(row)} tokens leaves no room to go on: "
                f"{model.name} reads at most {model.max_length}. Shorten it"
            )
    texts: dict[int, str] = {}
    with _own_randomness(model.device, seed):
        for chosen, new_tokens in _by_room([len(row) for row in rows], max_new_tokens, model.max_length):
            settings = _settings(model, new_tokens, top_k, temperature, greedy)
            continuations = _continue(model, [rows[i] for i in chosen], settings)
            for index, continuation in zip(chosen, continuations, strict=True):
                texts[index] = prompts[index] + continuation
    return [texts[i] for i in range(len(prompts))]


def start_text(model: Model) -> str:
    """The text from which a model writes freely: empty, if the tokenizer puts a start token there itself.

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


def _check(max_new_tokens: int, top_k: int | None, temperature: float, greedy: bool) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: say how many tokens to add, 0 or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}: at least one token must be left to draw; None draws from all")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}: it must be above 0; to draw nothing, say greedy=True")
    if greedy and (top_k is not None or temperature != 1.0):
        raise ConfigError("greedy=True takes the most probable token, so top_k and temperature have no use")


def _by_room(lengths: Sequence[int], wanted: int, longest: int) -> Iterator[tuple[list[int], int]]:
    """(indexes, new tokens): the prompts that have room for all go together, each other one by itself."""
    roomy = [i for i, length in enumerate(lengths) if length + wanted <= longest]
    if roomy:
        yield roomy, wanted
    for i, length in enumerate(lengths):
        if length + wanted > longest:
            yield [i], longest - length


def _settings(model: Model, new_tokens: int, top_k: int | None, temperature: float, greedy: bool) -> GenerationConfig:
    """A generation config that says all that matters: what it left open, the model's own would fill in."""
    end = model.hf.generation_config.eos_token_id
    # 0 is all tokens; a setting that greedy decoding ignores draws a warning unless it is the default
    drawing = {"top_k": 50} if greedy else {"top_k": top_k or 0, "min_p": 0.0, "temperature": temperature}
    return GenerationConfig(
        **(_NEUTRAL | drawing),
        max_new_tokens=new_tokens,
        do_sample=not greedy,
        pad_token_id=model.pad_id,
        eos_token_id=model.tokenizer.eos_token_id if end is None else end,
    )


def _continue(model: Model, rows: Sequence[Sequence[int]], settings: GenerationConfig) -> list[str]:
    """The continuations alone, of prompts padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    try:
        with torch.no_grad():
            output = model.hf.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise Diverged(
            f"what {model.name} says next has no probabilities: its numbers overflow. Load it in a wider dtype, or "
            "take the "
            "edit off that did this"
        ) from error
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    new = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in output[:, width:].tolist()]
    return [_text_after(model, *pair) for pair in zip(rows, new, strict=True)]


def _text_after(model: Model, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add. Some tokenizers (Llama's) drop the first space of a text, so the
    prompt is decoded with them and then taken off."""

    def decode(ids: Sequence[int]) -> str:
        return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


@contextlib.contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """The generators of the CPU and of `device` seeded, and afterwards as they were.

    Not by `torch.manual_seed`, which would seed the other devices too and leave them so.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if device.type == "mps":
            state = torch.mps.get_rng_state()
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if device.type == "mps":
                torch.mps.set_rng_state(state)
