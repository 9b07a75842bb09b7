"""How fast editors beside ROME are: the plain way against replay, in one run on one machine.

The plain way of fine-tuning is what the published code does: at every step a forward and a backward pass of the whole
model, the head on every position, gradients to the trained weight; and the same with gradients to all weights, as
where nobody has turned them off. Models have random weights: speed does not depend on what they know.

    python benchmarks/editors.py                       # all of it
    python benchmarks/editors.py fine_tuning           # some of it, by name
    python benchmarks/editors.py --json                # the same as JSON
"""

from __future__ import annotations

import torch
from common import fact_of, gpt2, main, row, timed

from errata.base.facts import Rewrite
from errata.editors.fine_tuning import FineTuningConfig, fine_tune
from errata.models.model import Model

STEPS, LEARNING_RATE, EPSILON = 25, 5e-4, 5e-4


def rewrite_of(seed: int, length: int = 8, subject: int = 5) -> Rewrite:
    """Of CounterFact's mean length in GPT-2's tokens; one token of the new object."""
    return fact_of(length, subject, seed=seed).rewrite(f"w{1000 + seed}")


def plain_fine_tuning(
    model: Model, rewrite: Rewrite, layer: int, bound: float | None, everywhere: bool, steps: int = STEPS
) -> torch.Tensor:
    """ΔW `[d_out, d_in]`, of all steps; the model is put back."""
    hf = model.hf
    weight = hf.transformer.h[layer].mlp.c_proj.weight
    hf.requires_grad_(everywhere)
    weight.requires_grad_(True)
    before = weight.detach().clone()
    ids = torch.tensor([model.tokenizer(rewrite.text)["input_ids"]])
    (target,) = model.tokenizer(rewrite.new_object)["input_ids"]
    adam = torch.optim.Adam([weight], lr=LEARNING_RATE)
    for _ in range(steps):
        hf.zero_grad()
        loss = -hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(-1)[target]
        loss.backward()
        adam.step()
        if bound is not None:
            with torch.no_grad():
                weight.clamp_(before - bound, before + bound)
    change = (weight.detach() - before).T
    with torch.no_grad():
        weight.copy_(before)
    hf.zero_grad()
    return change


def fine_tuning() -> list[dict]:
    """FT and FT+L, one edit and 16 together, GPT-2 small's shape, one thread, float32, all steps."""
    torch.set_num_threads(1)
    model = gpt2(12, 768)
    rows = []
    for name, layer, bound in (("FT", 1, None), ("FT+L", 0, EPSILON)):
        config = FineTuningConfig(layer=layer, learning_rate=LEARNING_RATE, steps=STEPS, epsilon=bound, stop_below=0.0)
        fine_tune(model, rewrite_of(1), FineTuningConfig(layer=layer, steps=1))  # warm
        plain_fine_tuning(model, rewrite_of(1), layer, bound, True, steps=1)
        wanted, plain = timed(plain_fine_tuning, model, rewrite_of(0), layer, bound, False)
        _, everywhere = timed(plain_fine_tuning, model, rewrite_of(0), layer, bound, True)
        found, ours = timed(fine_tune, model, rewrite_of(0), config)
        _, together = timed(fine_tune, model, [rewrite_of(i, 6 + i % 5, 3) for i in range(16)], config)
        off = float((found.deltas[0].matrix() - wanted).norm() / wanted.norm())
        shape = f"12 x 768, layer {layer}, 8 tokens, {STEPS} steps, 1 thread, float32"
        rows.append(row(f"{name}, one edit ({shape})", plain, ours, relative_difference=off))
        rows.append(row(f"{name}, one edit, plain with gradients to all weights ({shape})", everywhere, ours))
        rows.append(row(f"{name}, 16 edits together, seconds an edit ({shape})", plain, together / 16))
    return rows


WORKS = {"fine_tuning": fine_tuning}

if __name__ == "__main__":
    main(__doc__, WORKS)
