"""Rebuild the atlas: `python -m errata.atlas.build`. Train, ship, measure, write the card.

Training takes under two hours on two cores and continues where it stopped; `--from card` only measures the shipped
weights.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from errata import atlas
from errata.atlas import card
from errata.atlas.training import Recipe, train
from errata.atlas.world import World, load_world
from errata.base.files import write_text
from errata.base.seeds import derive
from errata.models.loading import load_pretrained
from errata.tracing.noise import subject_sigma

STAGES = ("train", "ship", "card")

# Where causal tracing finds the facts.
ROME_LAYER = 4

# With these, of a small grid on 30 records, facts are rewritten and neighbours, as far as that goes, moved least.
FINE_TUNING = {
    "ft": {"layer": 5, "learning_rate": 5e-3},
    "ft-l": {"layer": 0, "learning_rate": 2e-3, "epsilon": 1.5e-2},
    "attention": {"layer": 6, "learning_rate": 2e-3, "epsilon": 1e-2},
}


def rome_settings(world: World) -> dict[str, object]:
    """ROME's settings for the atlas, as stored in its config.

    Five contexts of fifteen are the bare prompt: at the start of a text its key can lie far from the others. The
    rest stand behind sentences of the world. Few rewrites need more than 20 steps; some do.
    """
    rng = random.Random(derive(0, "rome prefixes"))
    sentences = [
        f"{rng.choice(world.taught(fact)).replace('{}', fact.subject)} {fact.object}. "
        for fact in rng.sample(world.facts, 10)
    ]
    return {"prefixes": [""] * 5 + sentences, "steps": 40}


def ship(trained: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in 16 bits, config and tokenizer, with what errata should know in the config."""
    half = trained.half()
    live = load_pretrained((half.float(), tokenizer), name="atlas")
    half.config.errata = {
        "corpus": "atlas",
        "rome_layer": ROME_LAYER,
        "subject_sigma": subject_sigma(live, load_world().by_subject),
        "rome": rome_settings(load_world()),
        **FINE_TUNING,
    }
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run all stages from the requested one on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("atlas-training"), help="where checkpoints are kept")
    parser.add_argument("--from", dest="stage", choices=STAGES, default="train", help="begin with this stage")
    page = Path("docs/explanation/atlas.md")
    parser.add_argument("--page", type=Path, default=page, help="where the readable card goes")
    given = parser.parse_args()
    recipe = Recipe()
    if given.stage == "train":
        train(load_world(), recipe, given.work).save_pretrained(given.work)
    if given.stage in ("train", "ship"):
        trained = GPT2LMHeadModel.from_pretrained(given.work, dtype=torch.float32)
        ship(trained, PreTrainedTokenizerFast.from_pretrained(given.work), atlas.weights_folder())
    measured = card.measure(atlas.load(), recipe, lambda what, done, of: print(f"{what} {done}/{of}", flush=True))
    text = card.to_json(measured)
    write_text(card.card_path(), text)
    write_text(given.page, card.page(json.loads(text)))


if __name__ == "__main__":
    main()
