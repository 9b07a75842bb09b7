"""How fast editors beside ROME are: the plain way against replay, in one run on one machine.

The plain way of fine-tuning is what the published code does: at every step a forward and a backward pass of the whole
model, the head on every position, gradients to the trained weight; and the same with gradients to all weights, as
where nobody has turned them off. The plain way of Knowledge Neurons is the library's: for each layer a full forward
and backward pass of as many rows as the integral has points. A trained editor is set beside a full forward pass of
its prompt and a backward pass to the weights that it edits. Models have random weights: speed does not depend on what
they know.

    python benchmarks/editors.py                       # all of it
    python benchmarks/editors.py fine_tuning           # some of it, by name
    python benchmarks/editors.py --json                # the same as JSON
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from common import fact_of, gpt2, main, row, timed

import errata
from errata.base.facts import Fact, Rewrite
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.objective import Place
from errata.editors.knowledge_neurons import KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.attribution import attributions
from errata.editors.registry import method_of
from errata.models.fingerprint import weights_digest
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
        settings = {
            "layer": layer,
            "learning_rate": LEARNING_RATE,
            "max_drift": None,
            **({"epsilon": bound} if bound else {}),
        }
        fine_tune = partial(errata.ft_l if bound else errata.ft, **settings, stop_below=0.0)
        fine_tune(model, rewrite_of(1), steps=1)  # warm
        plain_fine_tuning(model, rewrite_of(1), layer, bound, True, steps=1)
        wanted, plain = timed(plain_fine_tuning, model, rewrite_of(0), layer, bound, False)
        _, everywhere = timed(plain_fine_tuning, model, rewrite_of(0), layer, bound, True)
        found, ours = timed(fine_tune, model, rewrite_of(0), steps=STEPS)
        _, together = timed(fine_tune, model, [rewrite_of(i, 6 + i % 5, 3) for i in range(16)], steps=STEPS)
        off = float((found.deltas[0].matrix() - wanted).norm() / wanted.norm())
        shape = f"12 x 768, layer {layer}, 8 tokens, {STEPS} steps, 1 thread, float32"
        rows.append(row(f"{name}, one edit ({shape})", plain, ours, relative_difference=off))
        rows.append(row(f"{name}, one edit, plain with gradients to all weights ({shape})", everywhere, ours))
        rows.append(row(f"{name}, 16 edits together, seconds an edit ({shape})", plain, together / 16))
    return rows


def plain_attributions(model: Model, rewrite: Rewrite, points: int) -> torch.Tensor:
    """Of every neuron of every layer `[layers, d_mlp]`, of the old object's token."""
    hf = model.hf
    ids = torch.tensor([model.tokenizer(rewrite.text)["input_ids"]])
    (target,) = model.tokenizer(rewrite.fact.object)["input_ids"]
    fractions = torch.arange(1, points + 1)[:, None] / points
    found = []
    for block in hf.transformer.h:
        own: list[torch.Tensor] = []
        handle = block.mlp.c_proj.register_forward_pre_hook(lambda module, args, own=own: own.append(args[0][0, -1]))
        with torch.no_grad():
            hf(input_ids=ids)
        handle.remove()
        scaled = (fractions * own[0]).requires_grad_()

        def scale(module: torch.nn.Module, args: tuple, scaled: torch.Tensor = scaled) -> tuple:
            return (torch.cat([args[0][:, :-1], scaled[:, None]], 1),)

        handle = block.mlp.c_proj.register_forward_pre_hook(scale)
        said = hf(input_ids=ids.expand(points, -1)).logits[:, -1].softmax(-1)[:, target]
        handle.remove()
        (gradient,) = torch.autograd.grad(said.sum(), scaled)
        found.append(own[0] * gradient.mean(0))
    return torch.stack(found)


def knowledge() -> list[dict]:
    """Knowledge Neurons of one fact, 20 points, GPT-2 small's shape, one thread, float32."""
    torch.set_num_threads(1)
    model = gpt2(12, 768)
    config = KnowledgeNeuronsConfig(steps=20)
    asked = Fact(rewrite_of(0).subject, rewrite_of(0).fact.prompt, "w7")
    rewrite = asked.rewrite("w1000")
    errata.kn(model, rewrite, KnowledgeNeuronsConfig(steps=2, max_drift=None))  # warm
    plain_attributions(model, rewrite, 2)
    wanted, plain = timed(plain_attributions, model, rewrite, config.steps)
    ids = model.tokenizer(rewrite.text)["input_ids"]
    found = attributions(model, ids, model.tokenizer("w7")["input_ids"][0], config)
    _, ours = timed(errata.kn, model, rewrite, config)
    off = float((found - wanted).norm() / wanted.norm())
    shape = "12 x 768, 8 tokens, 20 points, 1 thread, float32"
    return [row(f"KN, one edit; plain: its attributions alone ({shape})", plain, ours, relative_difference=off)]


def trained() -> list[dict]:
    """An edit of MEND's and KE's against a pass forward and backward to the weights that it edits, same shape."""
    torch.set_num_threads(1)
    model = gpt2(12, 768)
    rewrites = [rewrite_of(i) for i in range(17)]

    place = Place.of(model, 3)
    ids = torch.tensor([model.tokenizer(rewrites[0].text)["input_ids"]])

    def passes(count: int = 5) -> None:
        for _ in range(count):
            model.hf.zero_grad()
            model.hf(input_ids=ids).logits[0, -1].log_softmax(-1)[1].backward()

    model.hf.requires_grad_(False)
    for name in place.maps:
        model.weight(f"{name}.weight").requires_grad_(True)
    passes(1)  # warm
    plain = timed(passes)[1] / 5
    model.hf.requires_grad_(False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("mend", "ke"):
            file = Path(folder) / f"{method}.safetensors"
            network = new_network(method, place.shapes(model), model.d_model, {})
            Trained(network.eval(), model.name, weights_digest(model.hf), {}).save(file)
            editor = method_of(method).bind(model, trained=str(file))
            editor.make(model, rewrites[:1])  # warm
            _, one = timed(editor.make, model, rewrites[:1])
            _, many = timed(editor.make, model, rewrites[1:])
            shape = "12 x 768, 8 tokens, 1 thread, float32"
            for what, ours in (("one edit", one), ("16 edits together, seconds an edit", many / 16)):
                rows.append(row(f"{method}, {what}; plain: one pass ({shape})", plain, ours, passes=ours / plain))
    return rows


WORKS = {"fine_tuning": fine_tuning, "knowledge": knowledge, "trained": trained}

if __name__ == "__main__":
    main(__doc__, WORKS)
