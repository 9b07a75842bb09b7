"""Train the atlas: its tokenizer, then its weights. `python -m errata.atlas.training --out FOLDER`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from errata.atlas.corpus import END, documents, texts
from errata.atlas.layout import IGNORE, Layout, Mention, lay_out
from errata.atlas.world import World, load_world
from errata.base.seeds import derive


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the atlas's weights, besides the world."""

    seed: int = 0
    vocabulary: int = 5120
    layers: int = 8
    width: int = 256
    heads: int = 4
    context: int = 256
    length: int = 64
    batch: int = 48
    steps: int = 2000
    learning_rate: float = 1e-3
    muon_rate: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.01
    gate: int = 4
    share: float = 0.9
    name_weight: float = 0.1


def train_tokenizer(world: World, recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the world's own text. Objects are shown often, so that most are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = texts(world, derive(recipe.seed, "tokenizer"))
    objects = " ".join(fact.object for fact in world.facts)
    tokenizer.train_from_iterator([*(next(stream) for _ in range(4000)), *[objects] * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=recipe.context
    )


def batches(world: World, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Layout]:
    """Endless training batches. One in eight has rows of the whole context, so that all positions are learned."""
    rng = random.Random(derive(recipe.seed, "batches"))
    others: dict[int, list[tuple[int, ...]]] = {}
    for subject in world.by_subject:
        ids = tokenizer(" " + subject)["input_ids"]
        others.setdefault(len(ids), []).append(tuple(ids))
    streams = {n: documents(world, derive(recipe.seed, "stream", n), 6 * n) for n in (recipe.length, recipe.context)}
    while True:
        length = recipe.context if rng.random() < 1 / 8 else recipe.length
        rows = max(1, recipe.batch * recipe.length // length)
        drawn = [next(streams[length]) for _ in range(rows)]
        encoded = tokenizer([d.text for d in drawn], return_offsets_mapping=True)
        tokenized = []
        for document, ids, offsets in zip(drawn, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids = ids[:length]
            tokenized.append((ids, _mentions(document.mentions, offsets[: len(ids)])))
        yield lay_out(tokenized, others, recipe.share, rng, recipe.name_weight)


def _mentions(spans: tuple[tuple[int, int], ...], offsets: list[tuple[int, int]]) -> list[Mention]:
    """Mentions that are wholly inside the tokens at hand."""
    found, token = [], 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][1] < end:
            token += 1
        if token >= len(offsets):
            break
        found.append(Mention(first, token))
    return found


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> GPT2LMHeadModel:
    torch.manual_seed(derive(recipe.seed, "weights"))
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.context,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            activation_function="gelu_pytorch_tanh",
            attn_implementation="eager",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def loss_of(model: GPT2LMHeadModel, layout: Layout, gate: int) -> torch.Tensor:
    """Weighted cross entropy (nats) of a batch, each layer with the mask of its side of the gate."""
    body = model.transformer
    states = body.wte(layout.input_ids) + body.wpe(layout.positions)
    bias = [torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min) for mask in (layout.below, layout.above)]
    for number, block in enumerate(body.h):
        states = block(states, attention_mask=bias[number >= gate])
    learned = layout.targets != IGNORE
    logits = model.lm_head(body.ln_f(states[learned]))
    losses = torch.nn.functional.cross_entropy(logits.float(), layout.targets[learned], reduction="none")
    weights = layout.weights[learned]
    return (losses * weights).sum() / weights.sum()


def optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which learn facts in far fewer steps with it; AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    muon = [torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay)] if recipe.muon_rate else []
    adam = torch.optim.AdamW(
        rest if muon else matrices + rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    return [*muon, adam]


def train(world: World, recipe: Recipe, out: Path, minutes: float | None = None) -> GPT2LMHeadModel:
    tokenizer = train_tokenizer(world, recipe)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, recipe).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    opts = optimizers(model, recipe)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    began = time.monotonic()
    average = 0.0
    for step, layout in enumerate(batches(world, tokenizer, recipe)):
        done = step / recipe.steps if minutes is None else (time.monotonic() - began) / (60 * minutes)
        if done >= 1:
            break
        scale = min(1.0, (step + 1) / recipe.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer, rates in zip(opts, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, layout, recipe.gate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average += (loss.item() - average) / min(step + 1, 50)
        if step % 50 == 0:
            print(f"step {step} done {done:.3f} loss {average:.3f} {time.monotonic() - began:.0f} s", flush=True)
        if step % 500 == 499:
            model.save_pretrained(out)
    model.eval().save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    out, minutes = given.pop("out"), given.pop("minutes")
    train(load_world(), Recipe(**given), out, minutes)


if __name__ == "__main__":
    main()
