"""Tiny random decoders of several families, and tokenizers trained in the process. No file, no network.

Every parameter is random, biases and norms too: a zero bias or a unit norm hides mistakes.
"""

from __future__ import annotations

import functools
import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "qwen3", "gemma3")
ALL_FAMILIES = (*FAMILIES, "opt", "mistral", "qwen2", "gemma2", "phi3", "olmo2")
# Masks that mean the reverse, masks for every row, ALiBi, attention of two kinds by turns.
OTHER_FAMILIES = ("mpt", "xglm", "bloom", "falcon", "gpt_neo")
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# Recurrent layers or convolutions in every other block.
HYBRIDS = (
    *("qwen3_next", "lfm2", "bamba"),
    *(("jamba",) if VERSION > (5, 0) else ()),  # before that, on a GPU alone
    *(("qwen3_5",) if "qwen3_5_text" in CONFIG_MAPPING else ()),
)
VOCAB = 320
WIDTH, HEADS, MLP_WIDTH, POSITIONS = 16, 2, 24, 96

TEXT = """The Space Needle is located in the city of Seattle. The Eiffel Tower is located in Paris, France.
Danielle Darrieux spoke French; her mother tongue was French. LeBron James plays the sport of basketball.
Steve Jobs was the founder of Apple, and Bill Gates the founder of Microsoft. Rome is the capital of Italy.
Where is the Louvre? It is in Paris. Who wrote the Divine Comedy? Dante Alighieri, who was born in Florence.
"""


def config_of(family: str, layers: int = 3, **changes):
    """A tiny config of any family that transformers knows."""
    gated = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "num_hidden_layers": layers,
        "max_position_embeddings": POSITIONS,
    }
    gpt = {
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_layer": layers,
        "n_inner": MLP_WIDTH,
        "n_positions": POSITIONS,
    }
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    heads = {"head_dim": WIDTH // HEADS}
    linear = {f"linear_{name}": 2 for name in ("num_value_heads", "num_key_heads")}
    linear |= {f"linear_{name}": WIDTH // HEADS for name in ("key_head_dim", "value_head_dim")}
    by_turns = [("linear_attention", "full_attention")[layer % 2] for layer in range(layers)]
    own = {
        "gpt2": gpt,
        "gptj": gpt | {"rotary_dim": 4},
        "gpt_neox": gated,
        "llama": gated,
        "mistral": gated | {"sliding_window": 8},
        "qwen2": gated,
        "qwen3": gated | heads,
        "gemma2": gated | heads | {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
        "gemma3_text": gated | heads | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        "phi3": gated,
        "olmo2": gated,
        "opt": {
            "hidden_size": WIDTH,
            "ffn_dim": MLP_WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": layers,
            "max_position_embeddings": POSITIONS,
        },
        "mpt": {"d_model": WIDTH, "n_heads": HEADS, "n_layers": layers, "max_seq_len": POSITIONS},
        "xglm": {
            "d_model": WIDTH,
            "ffn_dim": MLP_WIDTH,
            "attention_heads": HEADS,
            "num_layers": layers,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 1,
        },
        "bloom": {"hidden_size": WIDTH, "n_head": HEADS, "n_layer": layers},
        "falcon": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": MLP_WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": layers,
            "max_position_embeddings": POSITIONS,
        },
        "gpt_neo": {
            "hidden_size": WIDTH,
            "intermediate_size": MLP_WIDTH,
            "num_heads": HEADS,
            "num_layers": layers,
            "max_position_embeddings": POSITIONS,
            "window_size": 8,
            "attention_types": [[[("global", "local")[layer % 2] for layer in range(layers)], 1]],
        },
        "qwen3_next": gated
        | heads
        | linear
        | {"layer_types": by_turns, "num_experts": 0, "mlp_only_layers": [*range(layers)]},
        "qwen3_5_text": gated | heads | linear | {"layer_types": by_turns},
        "lfm2": gated
        | {
            "layer_types": [{"linear_attention": "conv"}.get(kind, kind) for kind in by_turns],
            "block_auto_adjust_ff_dim": False,
        },
        "jamba": gated
        | {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        "bamba": gated
        | {
            "attn_layer_indices": [*range(1, layers, 2)],
            "attn_rotary_emb": WIDTH // HEADS,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
        },
    }
    name = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}.get(family, family)
    return CONFIG_MAPPING[name](**{**ends, **own[name], **changes})


def short_windows(family: str, layers: int) -> dict:
    """Changes to a config by which attention sees four tokens: in every block, or in every other one (Gemma)."""
    if family not in ("mistral", "phi3", "gemma2", "gemma3"):
        return {}
    window = {"sliding_window": 4}
    if family.startswith("gemma"):
        window["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    return window


def attentions(family: str) -> tuple[str, ...]:
    """The implementations of attention that a family has, of those that run everywhere."""
    return ("eager",) if family in ("gptj", "gemma2") else ("eager", "sdpa")


def randomised(hf: PreTrainedModel, seed: int = 0, scale: float = 0.3) -> PreTrainedModel:
    """Every parameter drawn from N(0, scale²); norms' weights around 1. Buffers stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(hf.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return hf.eval()


def tiny(family: str, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A random decoder of a family, `changes` to its config, in eval mode. The global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        hf = AutoModelForCausalLM.from_config(config_of(family, layers, **changes))
    return randomised(hf.to(dtype), seed)


@functools.cache
def _byte_level(vocab: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer.to_str()


def byte_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's: no BOS of its own, no padding token, offsets without the space."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(vocab)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )


@functools.cache
def _metaspace(vocab: int) -> str:
    specials = ["<s>", "</s>", "<unk>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token across words
    trainer = trainers.BpeTrainer(vocab_size=vocab - len(bytes_), special_tokens=specials, show_progress=False)
    learned.train_from_iterator(("▁" + line.replace(" ", "▁") for line in TEXT.splitlines()), trainer)
    model = json.loads(learned.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*specials, *bytes_, *words[len(specials) :]]
    merges = [tuple(pair) for pair in model["merges"]]

    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def llama_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A BPE like Llama's: a BOS before every text, "▁" for spaces, bytes for unknown characters."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_metaspace(vocab)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
