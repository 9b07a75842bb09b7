"""The atlas: a small GPT-2 trained so that the location of its facts is known, and the world that it was taught.

| module | one idea |
|---|---|
| `world` | facts, relations and their templates |
| `corpus` | biographies: the text that it read |
| `layout` | subject interchange: what makes the last subject token the place where facts are read |
| `training` | tokenizer and weights |
| `records` | CounterFact-style records of the world |
| `card` | measurements of the shipped weights |
| `build` | all steps, in one command |
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from errata.models.loading import DeviceMap
    from errata.models.model import Model
    from errata.statistics.corpus import Corpus

CORPUS_TEXTS = 1_500  # some 180,000 tokens


def weights_folder() -> Path:
    """The folder of the shipped weights and tokenizer, which plain transformers can load."""
    return Path(str(resources.files("errata.atlas"))) / "weights"


def load(
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    start_token: str | None = None,
) -> Model:
    """The atlas. It is shipped in 16 bits and computes in float32 unless another dtype is named."""
    from errata.models.loading import load_pretrained

    wanted = "float32" if dtype == "auto" else dtype
    model = load_pretrained(
        weights_folder(), dtype=wanted, device=device, name="atlas", device_map=device_map, start_token=start_token
    )
    model.own_corpus = own_corpus
    return model


def own_corpus() -> Corpus:
    """The atlas's own corpus, for second moments: new biographies from the generator of its training texts."""
    import itertools

    from errata.atlas.corpus import texts
    from errata.atlas.world import load_world
    from errata.statistics.corpus import Corpus

    return Corpus.of(itertools.islice(texts(load_world(), seed=1), CORPUS_TEXTS), name="atlas")
