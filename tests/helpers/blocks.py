"""Blocks of a llama that behave unlike others: they keep a memory, fail, or have no cache."""

from __future__ import annotations


def plainly(block, states, **kwargs):
    return type(block).forward(block, states, **kwargs)


def cache_in(kwargs: dict) -> object:
    """By the name that transformers gives it."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def without_cache(block, states, **kwargs):
    return plainly(
        block, states, **{name: None if value is cache_in(kwargs) else value for name, value in kwargs.items()}
    )


def with_a_memory(block, states, **kwargs):
    """It mixes earlier tokens in outside attention, as convolutions and recurrent layers do."""
    block.input_layernorm.forward = lambda x: x.cumsum(1)
    return plainly(block, states, **kwargs)


def failing(error: type[Exception]):
    def forward(block, states, **kwargs):
        cache = cache_in(kwargs)
        if cache is not None and cache.get_seq_length(block.self_attn.layer_idx):
            raise error("no such\nthing")
        return plainly(block, states, **kwargs)

    return forward
