"""How fast causal tracing is: the plain way against replay, in one run on one machine.

The plain way is what the published code does: a batch of one clean and ten noisy rows, one full forward pass for every
site, the head on every position. Models have random weights: speed does not depend on what they know.

    python benchmarks/tracing.py                    # all of it, some 40 minutes
    python benchmarks/tracing.py one bfloat16       # some of it, by name
    python benchmarks/tracing.py --json             # the same as JSON
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import VOCABULARY, fact_of, gpt2, main, row, seconds

from errata.base.facts import Fact
from errata.models.model import Model
from errata.tracing.many import trace_facts
from errata.tracing.sweep import window_layers
from errata.tracing.trace import trace

SAMPLES, WINDOW, NOISE = 10, 10, 0.1
PARTS = ("state", "mlp", "attention")
MODULES = {"state": "transformer.h.{}", "mlp": "transformer.h.{}.mlp", "attention": "transformer.h.{}.attn"}


# ---- the plain way ------------------------------------------------------------------------------------


def plain_map(model: Model, fact: Fact, part: str) -> np.ndarray:
    """Probabilities `[tokens, layers]` of the answer with a site restored, one full forward pass a site."""
    hf = model.hf
    ids = model.tokenizer(fact.text, return_tensors="pt")["input_ids"].expand(SAMPLES + 1, -1)
    subject, tokens, layers = len(fact.subject.split()), ids.shape[1], model.n_layers
    noise = NOISE * torch.from_numpy(np.random.RandomState(1).randn(SAMPLES, subject, model.d_model)).to(model.dtype)

    def disturb(module, args, output):
        output[1:, :subject] += noise
        return output

    def run(restored: Iterable[int], token: int) -> torch.Tensor:
        def put_back(module, args, output):
            state = output[0] if isinstance(output, tuple) else output
            state[1:, token] = state[0, token]
            return output

        hooks = [hf.transformer.wte.register_forward_hook(disturb)]
        hooks += [hf.get_submodule(MODULES[part].format(i)).register_forward_hook(put_back) for i in restored]
        try:
            return hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()

    with torch.no_grad():
        answer = int(run([], 0)[0].argmax())
        found = np.zeros((tokens, layers))
        for token in range(tokens):
            for layer in range(layers):
                window = [layer] if part == "state" else window_layers(layer, WINDOW, "paper", layers)
                found[token, layer] = run(window, token)[1:, answer].double().mean()
    return found


# ---- what replay has to do ----------------------------------------------------------------------------


def multiply_adds(layers: int, width: int, length: int) -> float:
    """Products that replay takes for the three maps of a fact whose subject is first: blocks, attention and head."""
    block, head = 12 * width**2, VOCABULARY * width

    def per_token(token: int, last: bool) -> float:
        """One row of one block on the tokens from `token` on; of the last one keys, values and the last token alone."""
        count = length - token
        linear = (count - 1) * 3 * width**2 + block if last else count * block
        return linear + 2 * width * length * (1 if last else count)

    total = float((SAMPLES + 1) * layers * length * (block + 2 * width * length))  # the recording
    for part in PARTS:
        windows = [
            window_layers(i, WINDOW, "paper", layers) if part != "state" else range(i, i + 1) for i in range(layers)
        ]
        begins: dict[int, list[int]] = {}
        for window in windows:
            begins.setdefault(window[0], []).append(window[-1])
        for token in range(length):
            for first, ends in begins.items():
                if first == layers - 1 and token < length - 1:
                    continue
                for layer in range(first + 1, layers):
                    apart = sum(end < layer for end in set(ends)) + any(end >= layer for end in ends)
                    total += SAMPLES * apart * per_token(token, layer == layers - 1)
                total += SAMPLES * len(set(ends)) * head
    return total


def peak() -> float:
    """Multiply-adds a second of a large float32 product, the best of several."""
    a, b = torch.randn(1024, 768), torch.randn(768, 3072)
    best = min(seconds(lambda: a @ b) for _ in range(20))
    return 1024 * 768 * 3072 / best


# ---- the table ----------------------------------------------------------------------------------------


def replayed(model: Model, fact: Fact, parts: Iterable[str] = PARTS) -> dict[str, np.ndarray]:
    return trace(model, fact, parts=tuple(parts), noise=NOISE, window=WINDOW, samples=SAMPLES).restored


def largest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[part] - b[part]).max()) for part in a)


def one() -> list[dict]:
    """Maps of one fact, GPT-2 small's shape, one thread, float32."""
    torch.set_num_threads(1)
    model, fact = gpt2(12, 768), fact_of(10)
    replayed(model, fact_of(4), ["state"])  # warm
    plain, maps = {}, {}
    for part in PARTS:
        begin = time.perf_counter()
        maps[part] = plain_map(model, fact, part)
        plain[part] = time.perf_counter() - begin
    states = seconds(lambda: replayed(model, fact, ["state"]))
    found: dict[str, np.ndarray] = {}
    three = seconds(lambda: found.update(replayed(model, fact)))
    difference = largest(maps, found)
    shape = "12 x 768, 10 tokens, 1 thread, float32"
    return [
        row(f"states of one fact ({shape})", plain["state"], states, largest_difference=difference),
        row(f"three maps of one fact ({shape})", sum(plain.values()), three, largest_difference=difference),
    ]


def bfloat16() -> list[dict]:
    """The same in bfloat16, against the plain way in float32."""
    torch.set_num_threads(1)
    fact = fact_of(10)
    model = gpt2(12, 768)
    plain = sum(seconds(partial(plain_map, model, fact, part)) for part in PARTS)
    exact = replayed(model, fact)
    model = gpt2(12, 768, torch.bfloat16)
    replayed(model, fact_of(4), ["state"])
    states = seconds(lambda: replayed(model, fact, ["state"]))
    found: dict[str, np.ndarray] = {}
    three = seconds(lambda: found.update(replayed(model, fact)))
    change = {"largest_change": largest(exact, found), "largest_probability": float(exact["state"].max())}
    shape = "12 x 768, 10 tokens, 1 thread, plain in float32"
    return [
        row(f"states of one fact in bfloat16 ({shape})", plain / 3, states, **change),
        row(f"three maps of one fact in bfloat16 ({shape})", plain, three, **change),
    ]


def many() -> list[dict]:
    """A hundred facts of mixed lengths, two threads; the plain way on ten of them, the same mixture."""
    torch.set_num_threads(2)
    model = gpt2(12, 768)
    lengths = (4, 5, 6, 7, 8, 9, 10, 7, 6, 8) * 10
    facts = [fact_of(length, subject=1 + i % 3, seed=i) for i, length in enumerate(lengths)]

    def run(some: list[Fact]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "traces.jsonl"
            return seconds(lambda: trace_facts(model, some, path, noise=NOISE, window=WINDOW, samples=SAMPLES))

    run(facts[:1])  # warm
    plain = sum(seconds(partial(plain_map, model, fact, part)) for fact in facts[:10] for part in PARTS)
    ten, hundred = run(facts[:10]), run(facts)
    shape = "12 x 768, 4 to 10 tokens, 2 threads, float32"
    return [
        row(f"three maps of 10 facts ({shape})", plain, ten, seconds_a_fact=ten / 10),
        row(
            f"three maps of 100 facts ({shape}; the plain way's seconds are 10 times those of 10)",
            10 * plain,
            hundred,
            seconds_a_fact=hundred / 100,
        ),
    ]


def curves() -> list[dict]:
    """Cost over length and depth, and what its multiply-adds would take at the peak of one thread."""
    torch.set_num_threads(1)
    rows = []
    for layers, length in [(12, 8), (12, 16), (12, 32), (12, 64), (6, 10), (12, 10), (24, 10)]:
        model, fact = gpt2(layers, 768), fact_of(length)
        fastest = peak()
        ours = seconds(partial(replayed, model, fact))
        fastest = max(fastest, peak())
        products = multiply_adds(layers, 768, length)
        rows.append(
            row(
                f"three maps of one fact, {length} tokens, {layers} layers (768 wide, 1 thread, float32)",
                None,
                ours,
                multiply_adds=products,
                seconds_at_peak=products / fastest,
                times_peak=ours * fastest / products,
                peak_gflops=2 * fastest / 1e9,
            )
        )
    return rows


def xl() -> list[dict]:
    """One fact at GPT-2 XL's shape, float32, and the memory that it took."""
    torch.set_num_threads(2)
    model = gpt2(48, 1600)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = seconds(lambda: replayed(model, fact_of(10)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        row(
            "three maps of one fact, GPT-2 XL's shape (48 x 1600, 10 tokens, 2 threads, float32)",
            None,
            ours,
            peak_memory_gb=after / 2**20,
            model_loaded_gb=before / 2**20,
        )
    ]


WORKS = {"one": one, "bfloat16": bfloat16, "many": many, "curves": curves, "xl": xl}


if __name__ == "__main__":
    main(__doc__, WORKS)
