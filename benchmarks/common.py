"""What benchmarks share: models of known shapes with random weights, seconds, and the table that they print."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from errata.base.facts import Fact
from errata.models.loading import load_pretrained
from errata.models.model import Model

VOCABULARY = 50257


def gpt2(layers: int, width: int, dtype: torch.dtype = torch.float32) -> Model:
    """A random decoder of GPT-2's shape, whose tokens are numbers written in a text."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, dtype=dtype)
    hf = GPT2LMHeadModel(config).to(dtype).eval()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return load_pretrained((hf, PreTrainedTokenizerFast(tokenizer_object=words)), name=f"{layers} x {width}")


def fact_of(length: int, subject: int = 4, seed: int = 0) -> Fact:
    """A fact of so many tokens, with its subject first, as in the published code's own examples."""
    numbers = random.Random(seed).sample(range(1, VOCABULARY), length)
    words = [f"w{number}" for number in numbers]
    return Fact(" ".join(words[:subject]), " ".join(["{}", *words[subject:]]))


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def timed(work: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[Any, float]:
    """What it gives, and the seconds that it took."""
    begin = time.perf_counter()
    found = work(*arguments, **settings)
    return found, time.perf_counter() - begin


def row(work: str, plain: float | None, ours: float, **more: object) -> dict[str, object]:
    ratio = None if plain is None else plain / ours
    return {"work": work, "plain_s": plain, "errata_s": ours, "ratio": ratio, **more}


def main(description: str | None, works: Mapping[str, Callable[[], list[dict]]]) -> None:
    """Run the works that the command line names, and print what they found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(works)}; all if none is named")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    unknown = set(arguments.works) - set(works)
    if unknown:
        parser.error(f"no work {', '.join(sorted(unknown))}: choose from {', '.join(works)}")
    rows = []
    for name in arguments.works or works:
        print(f"{name} ...", file=sys.stderr)
        rows += works[name]()
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
        return
    table = Table(header_style="bold")
    for column in ("work", "plain s", "errata s", "ratio", "more"):
        table.add_column(column, overflow="fold")
    for each in rows:
        more = {k: v for k, v in each.items() if k not in ("work", "plain_s", "errata_s", "ratio")}
        numbers = [each[k] for k in ("plain_s", "errata_s", "ratio")]
        shown = ["" if n is None else f"{n:.2f}" for n in numbers]
        table.add_row(str(each["work"]), *shown, ", ".join(f"{k} {v:.3g}" for k, v in more.items()))
    Console().print(table)
