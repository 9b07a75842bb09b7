"""Fine-tuning against whole forward passes and torch's own Adam, in every family; and the way of such an edit."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.fine_tuning import FineTuningConfig
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.modules import linear_matrix
from errata.models.scoring import score
from helpers.fine_tuned import fine_tuned
from tiny import ALL_FAMILIES, byte_tokenizer, llama_tokenizer, tiny

LAYERS, LAYER, STEPS = 3, 1, 5
# The norms of all others round to float32 whatever they are given, and Adam makes much of small gradients.
EXACT = ("gpt2", "gptj", "gpt_neox", "opt")
REWRITE = Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite("Bad Paris")
# What makes queries, keys and values, by the names of the families.
ATTENTION = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj"],
}


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> Model:
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    return load_pretrained((tiny(family, LAYERS, dtype), tokenizer()), name=family)


def digests(model: Model) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in model.hf.state_dict().items()}


def plainly(
    model: Model, names: tuple[str, ...], rewrite: Rewrite, config: FineTuningConfig
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """ΔW `[d_out, d_in]` by name, and losses: a copy of the model trained by whole passes over prompt and target."""
    hf = copy.deepcopy(model.hf)
    offsets = model.tokenizer(f"{rewrite.text} {rewrite.new_object}", return_offsets_mapping=True)
    ids = torch.tensor([offsets["input_ids"]])
    first = next(i for i, (begin, _) in enumerate(offsets["offset_mapping"]) if begin >= len(rewrite.text))
    if config.loss == "reference":
        ids, targets = ids[:, :first], ids[0, first:]
    else:
        targets = ids[0, first:]
    weights = {name: hf.get_parameter(name) for name in names}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    adam = torch.optim.Adam(weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    losses = []
    for _ in range(config.steps):
        adam.zero_grad()
        logs = hf(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        said = logs[-1:].expand(len(targets), -1) if config.loss == "reference" else logs[first - 1 : -1]
        loss = -said[range(len(targets)), targets].mean()
        losses.append(loss.item())
        if losses[-1] < config.stop_below:
            break
        loss.backward()
        adam.step()
        if config.epsilon is not None:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.clamp_(before[name] - config.epsilon, before[name] + config.epsilon)
    changes = {name: weight.detach() - before[name] for name, weight in weights.items()}
    return {name: _oriented(hf, name, change) for name, change in changes.items()}, losses


def _oriented(hf: torch.nn.Module, name: str, change: torch.Tensor) -> torch.Tensor:
    if change.dim() == 1:
        return change[:, None]
    module = hf.get_submodule(name.rpartition(".")[0])
    return change if linear_matrix(module).stride() == module.weight.stride() else change.T


def same(edit: Edit, model: Model, config: FineTuningConfig) -> None:
    changes, losses = plainly(model, edit.weights, edit.rewrites[0], config)
    exact = model.name in EXACT
    assert edit.notes["losses"] == pytest.approx(losses, rel=1e-11 if exact else 1e-6)
    for delta in edit.deltas:
        wanted = changes[delta.weight]
        assert wanted.abs().max() > 0
        assert (delta.matrix() - wanted).abs().max() <= (1e-8 if exact else 1e-4) * wanted.abs().max()


@pytest.mark.parametrize("part", ["mlp", "attention"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_whole_passes_and_torchs_adam_give(family, part):
    model = model_of(family)
    before = digests(model)
    bound = 3e-3 if part == "attention" else None
    config = FineTuningConfig(layer=LAYER, part=part, learning_rate=1e-3, steps=STEPS, epsilon=bound)
    edit = fine_tuned(model, REWRITE, config)
    assert digests(model) == before
    names = [name.split(".")[-2] for name in edit.weights]
    if part == "attention":
        assert sorted(names) == ATTENTION.get(family, ["k_proj", "q_proj", "v_proj"])
    else:
        assert edit.weights == (f"{model.path(('key', LAYER))}.weight",)
    same(edit, model, config)
    plain = score(model, [REWRITE.text], ["Bad Paris"])[0].mean
    assert plain == pytest.approx(-edit.notes["losses"][0], rel=1e-9)
    with edit.applied(model):
        assert score(model, [REWRITE.text], ["Bad Paris"])[0].mean > plain
    assert digests(model) == before


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 1e-3},
        {"loss": "reference"},
        {"weight_decay": 0.3},
        {"bias": True, "epsilon": 2e-3},
        {"part": "attention", "bias": True, "loss": "reference", "epsilon": 1.0},
        {"stop_below": 5.0, "learning_rate": 1e-2, "steps": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_every_setting_is_what_it_says(family, changes, layer):
    model = model_of(family)
    config = FineTuningConfig(**{"layer": layer, "learning_rate": 1e-3, "steps": STEPS, **changes})
    edit = fine_tuned(model, REWRITE, config)
    assert any(name.endswith(".bias") for name in edit.weights) == (
        config.bias and (family, config.part) != ("qwen2", "mlp")
    )
    same(edit, model, config)


STOPS = {"gpt2": 5.0, "gemma3": 6.6, "mistral": 5.0}  # which some reach early, some never


@pytest.mark.parametrize("family", STOPS)
def test_many_at_once_are_each_alone(family):
    model = model_of(family)
    rewrites = [
        REWRITE,
        Fact("Rome", "{} is the capital of").rewrite("France"),
        Fact("Danielle Darrieux", "The mother tongue of {} is").rewrite("Italian, and French"),
        Fact("It", "{} is").rewrite("a"),
    ]
    config = FineTuningConfig(layer=LAYER, learning_rate=2e-2, steps=5, stop_below=STOPS[family])
    together = fine_tuned(model, rewrites, config)
    print([edit.notes["losses"] for edit in together])
    assert len({edit.notes["updates"] for edit in together}) > 1  # they stop at different steps
    for rewrite, edit in zip(rewrites, together, strict=True):
        alone = fine_tuned(model, rewrite, config)
        assert alone.notes["updates"] == edit.notes["updates"]
        wanted = alone.deltas[0].matrix()
        assert (edit.deltas[0].matrix() - wanted).abs().max() <= (
            1e-8 if family in EXACT else 1e-4
        ) * wanted.abs().max()
