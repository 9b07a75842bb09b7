"""Train the atlas: its tokenizer, then its weights. `python -m errata.atlas.training --out FOLDER`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
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
from errata.base.errors import ConfigError
from errata.base.files import written_whole
from errata.base.seeds import derive


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings that determine the atlas's weights, besides the world."""

    seed: int = 0
    vocabulary: int = 5120
    layers: int = 8
    width: int = 256
    heads: int = 4
    context: int = 256
    length: int = 64
    batch: int = 32
    steps: int = 5400
    learning_rate: float = 1.5e-3
    muon_rate: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.01
    gather: int = 2
    gate: int = 5
    share: float = 0.9
    name_weight: float = 0.1
    disturb_from: int = 2400
    disturbed: float = 0.5
    sigmas: float = 3.0


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
    """Mentions that lie completely within the given tokens."""
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
    """A GPT-2 with random weights from the recipe's seed. Its activation is gelu_new in one fused call."""
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


def loss_of(model: GPT2LMHeadModel, layout: Layout, recipe: Recipe, step: int) -> torch.Tensor:
    """Weighted cross entropy (nats) of a batch, each layer with the mask of its side of gather and gate.

    From step `disturb_from` on the other subjects of a share of the rows are also disturbed by noise, as causal
    tracing does it: what must be ignored need not be a subject at all.
    """
    body = model.transformer
    embedded = body.wte(layout.input_ids)
    if step >= recipe.disturb_from:
        chance = torch.Generator().manual_seed(derive(recipe.seed, "noise", step))
        rows = torch.rand(len(embedded), 1, generator=chance) < recipe.disturbed
        noise = recipe.sigmas * embedded.detach()[layout.other].std() * torch.randn(embedded.shape, generator=chance)
        embedded = embedded + noise * (layout.other & rows)[..., None]
    states = embedded + body.wpe(layout.positions)
    bias = [torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min) for seen in layout.seen]
    for number, block in enumerate(body.h):
        states = block(states, attention_mask=bias[(number >= recipe.gather) + (number >= recipe.gate)])
    learned = layout.targets != IGNORE
    logits = model.lm_head(body.ln_f(states[learned]))
    losses = torch.nn.functional.cross_entropy(logits.float(), layout.targets[learned], reduction="none")
    weights = layout.weights[learned]
    return (losses * weights).sum() / weights.sum()


def optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which learn facts in far fewer steps with it; AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    muon = (
        [torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay)] if recipe.muon_rate else []
    )
    adam = torch.optim.AdamW(
        rest if muon else matrices + rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    return [*muon, adam]


def train(world: World, recipe: Recipe, out: Path) -> GPT2LMHeadModel:
    """Train, or continue from the checkpoint in `out`; the result is the same, up to rounding."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(world, recipe)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, recipe).train()
    opts = optimizers(model, recipe)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in opts]
    first, average = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] != dataclasses.asdict(recipe):
            raise ConfigError(f"{checkpoint} is of another recipe. Choose another folder, or remove it")
        first, average = saved["step"], saved["average"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(opts, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {first}", flush=True)

    began = time.monotonic()
    stream = itertools.islice(batches(world, tokenizer, recipe), first, recipe.steps)
    for step, layout in enumerate(stream, start=first):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for optimizer, initial in zip(opts, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * decay * min(1.0, (step + 1) / recipe.warmup)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, layout, recipe, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average += (loss.item() - average) / min(step + 1, 50)
        done = step + 1
        if done % 50 == 0:
            left = (time.monotonic() - began) / (done - first) * (recipe.steps - done)
            print(f"step {done}/{recipe.steps}  loss {average:.3f}  {left / 60:.0f} min left", flush=True)
        if done % 200 == 0 or done == recipe.steps:
            with written_whole(checkpoint) as temporary:
                states = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
                torch.save(
                    {"recipe": dataclasses.asdict(recipe), "step": done, "average": average, **states}, temporary
                )
    return model.eval()


def main() -> None:
    """Only train, with any setting of the recipe changed, for experiments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    out = given.pop("out")
    train(load_world(), Recipe(**given), out).save_pretrained(out)


if __name__ == "__main__":
    main()
