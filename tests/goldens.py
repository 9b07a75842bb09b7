"""Golden numbers: results of the published code on one small GPT-2, in the folder `goldens/` beside this file.

`tiny_np(dtype)` builds the model from its recipe; `arrays`, `matrix` and `info` read the files. A test that uses
them is never skipped: `conftest.py` turns such a skip into a failure.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDENS = Path(__file__).parent / "goldens"
GPT2_FILES = GOLDENS / "gpt2-tokenizer"


def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of `name`.npz."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def matrix(name: str) -> np.ndarray:
    """The one array of `name`.npy."""
    return np.load(GOLDENS / f"{name}.npy", allow_pickle=False)


def info(name: str) -> Any:
    """The content of `name`.json."""
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def gpt2_tokenizer():
    """GPT-2's own tokenizer, padding with the end of text."""
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(str(GPT2_FILES))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.lru_cache(maxsize=2)
def tiny_np(dtype: torch.dtype = torch.float32):
    """The model of the goldens, wrapped: 6 layers of width 128, 4 heads, parameters from `RandomState(0)`.

    It is cached per process and dtype: a test that changes its weights must restore them.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    from errata.models.loading import load_pretrained

    hf = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=128, n_head=4)).to(dtype).eval()
    state = np.random.RandomState(0)
    with torch.no_grad():
        parameters = dict(hf.named_parameters())
        for name in sorted(parameters):
            values = state.standard_normal(tuple(parameters[name].shape)) * 0.1
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                values = values + 1
            # Rounded to float32 in every dtype: the float64 run starts from the same weights.
            parameters[name].copy_(torch.from_numpy(values.astype(np.float32)))
    return load_pretrained((hf, gpt2_tokenizer()), name="tiny_np")


def difference(ours: Any, theirs: Any) -> tuple[float, float]:
    """Largest absolute difference, and that difference over the largest magnitude of `theirs`."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    absolute = float(np.abs(ours - theirs).max())
    return absolute, absolute / float(np.abs(theirs).max())
