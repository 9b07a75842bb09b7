"""A model that accelerate has spread over devices, or offloaded in part, says and becomes what it would on one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import errata
from errata.base.errors import ConfigError, DeviceError, EditMismatch, UnsupportedModel
from errata.base.facts import Fact
from errata.editors.hypernetworks.files import Trained, new_network
from errata.editors.hypernetworks.objective import Place
from errata.editors.rome import RomeConfig, rome
from errata.edits.delta import Dense, LowRank
from errata.edits.edit import Edit
from errata.metrics import side_effects
from errata.metrics.edited import Plan
from errata.metrics.requests import Request, score_requests
from errata.models.fingerprint import weights_digest
from errata.models.generation import generate
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.scoring import score
from errata.models.weights import down_weight_name
from errata.passes.hooks import hooked
from errata.passes.rowwise import rowwise
from errata.statistics.collect import collect
from errata.tracing.gradients import integrated_gradients
from errata.tracing.trace import trace
from tiny import TEXT, byte_tokenizer, tiny

accelerate = pytest.importorskip("accelerate")

FACT = Fact("The Space Needle", "Everyone says that {} is located in")
PROMPTS, TARGETS = ["Rome is the capital of", "Where is the Louvre? It is in"], ["Italy", "Paris, France"]
CONFIG = RomeConfig(layer=1, steps=4, prefixes=("", "It rains. "), probes=("It was warm.",))
LAYERS = 4


def live(family: str):
    return tiny(family, layers=LAYERS, dtype=torch.float64), byte_tokenizer()


def dispatched(family: str, places: dict, main: object, **settings) -> Model:
    """A tiny model whose blocks, by number, and other parts, by name, are where `places` says, or else on `main`."""
    hf, tokenizer = live(family)
    blocks = next(name for name, module in hf.named_modules() if isinstance(module, nn.ModuleList))
    inside = blocks.rpartition(".")[0]
    parts = [f"{inside}.{name}" for name, _ in hf.get_submodule(inside).named_children()]
    parts = [*(part for part in parts if part != blocks), *(name for name, _ in hf.named_children() if name != inside)]
    where = {part: places.get(part.rpartition(".")[2], main) for part in parts}
    where |= {f"{blocks}.{layer}": places.get(layer, main) for layer in range(LAYERS)}
    settings |= {"main_device": main, "skip_keys": hf._skip_keys_device_placement}
    return load_pretrained((accelerate.dispatch_model(hf, where, **settings), tokenizer), name=type(hf).__name__)


def compare(whole: Model, split: Model) -> None:
    """All that is done with a model, done with both."""
    assert split.anatomy == whole.anatomy
    assert weights_digest(split.hf) == weights_digest(whole.hf)
    batch = whole.encode(PROMPTS)
    patches = {("mlp", 1): lambda tensor: tensor * 2, ("state", 2): lambda tensor: tensor.flip(-1)}
    with torch.no_grad():
        logits = []
        for each in (whole, split):
            with hooked(each, patches):
                logits.append(each.forward(batch.to(each.device))[range(len(PROMPTS)), batch.last].cpu())
    torch.testing.assert_close(*logits)
    for one, other in zip(score(whole, PROMPTS, TARGETS), score(split, PROMPTS, TARGETS), strict=True):
        assert other.total == pytest.approx(one.total)
    assert generate(split, PROMPTS, 6, top_k=5, seed=3) == generate(whole, PROMPTS, 6, top_k=5, seed=3)

    traces = [trace(each, FACT, samples=3, noise=0.7, window=2) for each in (whole, split)]
    assert traces[1].corrupted == pytest.approx(traces[0].corrupted)
    for part, values in traces[0].restored.items():
        assert traces[1].restored[part] == pytest.approx(values, nan_ok=True)
    moments = [collect(each, [0, 1, 2], TEXT.splitlines()) for each in (whole, split)]
    for layer, moment in moments[0].items():
        torch.testing.assert_close(moments[1][layer].matrix.cpu(), moment.matrix)
        assert moments[1][layer].fingerprint == moment.fingerprint
    wanted = [FACT.rewrite("Paris"), Fact("Steve Jobs", "They say that {} was the founder of").rewrite("Rome")]
    made = [rome(each, wanted, CONFIG, second_moment=moments[0], force=True) for each in (whole, split)]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other.deltas[0].matrix().cpu(), one.deltas[0].matrix())
    edits = [some[0] for some in made]
    before = whole.weight(edits[0].weights[0]).clone()
    for edit in edits:
        totals = []
        for each in (whole, split):
            with edit.applied(each):
                totals.append(score(each, [FACT.text], ["Paris"])[0].total)
        assert totals[1] == pytest.approx(totals[0])
    compare_edited(whole, split, made)
    for each in (whole, split):
        assert torch.equal(each.weight(edits[0].weights[0]).cpu(), before)


def compare_edited(whole: Model, split: Model, made: list[list[Edit]]) -> None:
    """Many edits at once, row by row and put on: what is said, what is written, and what else moves.

    Args:
        made: of each model, two edits of one block.
    """
    requests = [Request(prompt, (target, "Rome", "Pa")) for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    rewrites, answers, texts, effects = [edit.rewrites[0] for edit in made[0]], [], [], []
    there = [layer for layer in (2, 3) if not split.hf.get_parameter(down_weight_name(split, layer)).is_meta]
    for model, (first, second) in zip((whole, split), made, strict=True):
        [change] = first.deltas
        name = down_weight_name(model, there[0])  # on the other device, where there are two
        wide = Edit.of(model, [*second.deltas, LowRank(name, change.write[:, None] * 3, change.read[None])], "made up")
        dense = Edit.of(model, [Dense(change.weight, change.matrix() * 2)], "made up")
        variants = [[None, None], [first, wide], [wide, None], [dense, first]]
        answers.append([s.total for said in score_requests(model, requests, variants) for one in said for s in one])
        changes = Plan.of(model, [first, wide]).changes

        def around(rows, model=model, changes=changes):
            return rowwise(model, changes.of(torch.tensor(rows)))

        texts.append(generate(model, PROMPTS, 6, top_k=5, seed=3, around=around))
        now = side_effects.predict_texts(model, CONFIG.probes)
        pairs = [(0.1, 0.2)] * 2
        found = side_effects.side_effects_of(model, rewrites, [first, wide], pairs, texts=CONFIG.probes, before=now)
        effects.append([(each.essence_kl, each.drift, each.perplexity_after) for each in found])
    assert answers[1] == pytest.approx(answers[0])
    assert texts[1] == texts[0]
    for one, other in zip(*effects, strict=True):
        assert other == pytest.approx(one)


def compare_editors(whole: Model, split: Model, tmp_path: Path) -> None:
    """Edits of every editor beside ROME, two facts at once, of blocks on either device."""
    facts = [FACT.rewrite("Paris"), Fact("Steve Jobs", "They say that {} was the founder of", "Apple").rewrite("Rome")]
    for layer in (1, 2):
        settings = {"layer": layer, "steps": 3, "learning_rate": 0.01}
        compare_edits("ft", settings, whole, split, facts)
        compare_edits("attention", {**settings, "epsilon": 0.005}, whole, split, facts)
    compare_edits("kn", {"steps": 3, "prefixes": ("", "It rains. ")}, whole, split, facts)
    if "gpt2" in whole.hf.config.model_type:
        compare_edits("kn", {"preset": "reference", "steps": 3}, whole, split, facts)
    for method in ("ke", "mend"):
        place = Place.of(whole, 2)
        network = new_network(method, place.shapes(whole), whole.d_model, {"blocks": 2}).double()
        for each in network.parameters():
            torch.nn.init.normal_(each, std=0.1, generator=torch.Generator().manual_seed(each.numel()))
        file = tmp_path / f"{method}.safetensors"
        Trained(network.eval(), whole.name, weights_digest(whole.hf), {}).save(file)
        compare_edits(method, {"trained": str(file)}, whole, split, facts)


def compare_edits(method: str, settings: dict, whole: Model, split: Model, facts: list) -> None:
    before = weights_digest(whole.hf)
    made = [errata.editor(each, method, **settings).make(each, facts) for each in (whole, split)]
    for one, other in zip(*made, strict=True):
        assert [each.weight for each in other.deltas] == [each.weight for each in one.deltas]
        for mine, theirs in zip(one.deltas, other.deltas, strict=True):
            assert mine.matrix().abs().max() > 0
            torch.testing.assert_close(theirs.matrix().cpu(), mine.matrix(), msg=f"{method} {settings}")
    for each in (whole, split):
        assert weights_digest(each.hf) == before


def compare_far() -> None:
    """Run in a process of its own: half of the model on a device whose tensors mix with no others."""
    from far import FAR

    near = torch.device("cpu")  # as a string it would stand for weights that are kept there, and run on FAR
    for family, ends in {"gpt2": ("ln_f",), "llama": ("rotary_emb", "norm", "lm_head")}.items():
        whole = load_pretrained(live(family))
        split = dispatched(family, {1: near, 3: near, **dict.fromkeys(ends, near)}, FAR)
        assert split.devices == (FAR, near)
        assert {each.device for each in split.hf.parameters()} == {FAR, near}
        compare(whole, split)
        with tempfile.TemporaryDirectory() as folder:
            compare_editors(whole, split, Path(folder))


def test_two_devices():
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import test_device_map; test_device_map.compare_far()"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_offloaded_to_disk(family, tmp_path):
    whole = load_pretrained(live(family))
    ends = dict.fromkeys(["wte", "embed_tokens", "norm", "ln_f", "lm_head"], "disk")
    split = dispatched(family, {0: "disk", 2: "disk", **ends}, "cpu", offload_dir=tmp_path)
    assert split.device == torch.device("cpu")
    compare(whole, split)
    # Not on the far device: its tensors have no storage of which memory could be measured.
    gradients = [integrated_gradients(each, FACT, points=2) for each in (whole, split)]
    for part, norms in gradients[0].norms.items():
        assert gradients[1].norms[part] == pytest.approx(norms, nan_ok=True)


def test_an_offloaded_weight_is_not_edited(tmp_path):
    whole, split = load_pretrained(live("gpt2")), dispatched("gpt2", {1: "disk"}, "cpu", offload_dir=tmp_path)
    moment = errata.SecondMoment.identity(whole.d_mlp)
    edit = rome(whole, FACT.rewrite("Paris"), CONFIG, second_moment=moment, force=True)
    with pytest.raises(UnsupportedModel, match=r"h\.1\.mlp\.c_proj\.weight .* is offloaded.* device_map"):
        rome(split, FACT.rewrite("Paris"), CONFIG, second_moment=moment)
    with pytest.raises(EditMismatch, match="is offloaded"):
        edit.apply(split)
    edit.apply(whole)
    whole.hf = split.hf
    with pytest.raises(UnsupportedModel, match="is offloaded"):
        edit.undo(whole)


def test_loaded_with_a_map(tmp_path):
    whole = load_pretrained(live("llama"))
    whole.hf.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    where = {f"model.layers.{layer}": "cpu" for layer in range(LAYERS)}
    where |= {f"model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "disk"}
    for device_map in ("auto", {"": "cpu"}, where):
        split = errata.load_model(tmp_path, device_map=device_map)
        assert score(split, PROMPTS, TARGETS) == score(whole, PROMPTS, TARGETS)
    assert {each.device.type for each in split.hf.parameters()} == {"cpu", "meta"}
    with pytest.raises(ConfigError, match="'automatic'"):
        errata.load_model(tmp_path, device_map="automatic")
    with pytest.raises(DeviceError, match="cuda:77"):
        errata.load_model(tmp_path, device_map={"": 77})
    with pytest.raises(ConfigError, match="name one of them"):
        errata.load_model(tmp_path, device_map="auto", device="cpu")
    with pytest.raises(ConfigError, match="live model"):
        errata.load_model((whole.hf, whole.tokenizer), device_map="auto")
    for change in ({"device": "cpu"}, {"dtype": "float32"}):
        with pytest.raises(ConfigError, match="load it as you want it"):
            errata.load_model((split.hf, split.tokenizer), **change)
