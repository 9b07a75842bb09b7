"""A GPT-2-shaped model with an attention sink: the atlas, and a neuron of block 3 that adds a huge vector at token 0.

The neuron reads what tells position 0 from all others, found by regression, and writes the vector that changes least of
what the model says, found by gradient descent. So the sink is a matter of weights, as in pretrained models, and the
model still works.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch.func import functional_call
from transformers import AutoTokenizer, GPT2LMHeadModel

import errata
from errata.atlas import own_corpus, weights_folder

BLOCK, NEURON, SIZE = 3, 7, 20_000.0
WIDTH, STEPS = 24, 50


@functools.cache
def with_sink() -> errata.Model:
    """The model, whose blocks above BLOCK have one key for all first tokens."""
    hf = GPT2LMHeadModel.from_pretrained(weights_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights_folder())
    generator = torch.Generator().manual_seed(0)
    texts = [tokenizer(text)["input_ids"][:WIDTH] for text in itertools.islice(own_corpus(), 300)]
    rows = torch.tensor([ids for ids in texts if len(ids) == WIDTH])
    rows[:, 0] = torch.randint(10, len(tokenizer), (len(rows),), generator=generator)
    block = hf.transformer.h[BLOCK]
    seen: list[torch.Tensor] = []
    hook = block.ln_2.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        before = hf(rows).logits[:, 1:].log_softmax(-1)
    hook.remove()
    _read_position(block.mlp, seen[0])
    hf.requires_grad_(False)
    direction = torch.randn(hf.config.n_embd, generator=generator).requires_grad_()
    adam = torch.optim.Adam([direction], lr=0.1)
    for step in range(STEPS):
        some = slice(step * 16 % len(rows), step * 16 % len(rows) + 16)
        weight = block.mlp.c_proj.weight.detach().clone()
        weight[NEURON] = SIZE / 20 * direction / direction.norm()
        write = functools.partial(functional_call, hf, {f"transformer.h.{BLOCK}.mlp.c_proj.weight": weight})
        after = write(args=(rows[some],)).logits[:, 1:].log_softmax(-1)
        loss = (before[some].exp() * (before[some] - after)).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    block.mlp.c_proj.weight.copy_(weight.detach())
    return errata.load_model((hf, tokenizer))


def _read_position(mlp: torch.nn.Module, entering: torch.Tensor) -> None:
    """Let the neuron fire at position 0 of texts `[n, t, d]`, and nowhere else."""
    count, width, _ = entering.shape
    features = torch.cat([entering.flatten(0, 1), torch.ones(count * width, 1)], 1).double()
    wanted = torch.full((count, width), -20.0, dtype=torch.float64)
    wanted[:, 0] = 20.0
    weights = torch.where(wanted > 0, width - 1.0, 1.0).flatten()[:, None]
    ridge = features.T @ (weights * features) + 1e-2 * torch.eye(features.shape[1])
    reads = torch.linalg.solve(ridge, (weights * features).T @ wanted.flatten())
    with torch.no_grad():
        mlp.c_fc.weight[:, NEURON] = reads[:-1].float()
        mlp.c_fc.bias[NEURON] = float(reads[-1])
