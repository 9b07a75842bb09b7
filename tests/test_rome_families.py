"""ROME's objective against plain forward passes and torch's own Adam, and the whole way of an edit in every family."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel, PreTrainedTokenizerFast

from errata.base import budgets
from errata.base.facts import Fact, Rewrite
from errata.base.fingerprint import tensor_digest
from errata.editors.rome import RomeConfig, rome
from errata.edits.edit import Edit
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.statistics import SecondMoment, collect
from helpers.softmax import softmax_in_its_own_dtype  # noqa: F401, a fixture
from plain_trace import plain_run
from tiny import ALL_FAMILIES, TEXT, VOCAB, byte_tokenizer, llama_tokenizer, randomised, tiny

REWRITE = Fact("The Space Needle", "{} is located in the city of", "Seattle").rewrite("Bad Paris")
PREFIXES = ("", "Yes. ", "Where is it? ", "He wrote {} and {0}. ")
LAYERS, LAYER, STEPS = 4, 1, 6
# Post-norms, parallel blocks, gates, biases and none, transposed weights, scaled branches.
OPTIMISED = ("gpt2", "llama", "gemma2", "olmo2", "gptj", "gpt_neox", "opt", "phi3", "granite")
TEXTS = [line[:80] for line in TEXT.splitlines() if line]


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64, tied: bool = False) -> Model:
    if family == "granite":  # what its branches write is scaled before it is added, and its logits too
        scaled = GraniteConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=LAYERS,
            residual_multiplier=0.4,
            logits_scaling=2.0,
        )
        with torch.random.fork_rng(devices=[]):
            hf = AutoModelForCausalLM.from_config(scaled)
        return load_pretrained((randomised(hf.to(dtype)), byte_tokenizer()), name=family)
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    return load_pretrained((tiny(family, LAYERS, dtype, tie_word_embeddings=tied), tokenizer()), name=family)


# ---- the objective, written out ------------------------------------------------------------------------


class Plain:
    """Equation 4 by whole passes: all texts padded to one batch, a hook on the down-projection, torch's Adam.

    Attributes:
        values: of each context and the KL prompt, what the down-projection writes at the fact's token `[n, d]`.
        v0: from where δ is measured, `[d]`.
        steps: loss, nll, kl, decay, probability at every step `[steps, 5]`.
        deltas: δ at every step `[steps, d]`.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        family: str,
        tokenizer: PreTrainedTokenizerFast,
        rewrite: Rewrite,
        prefixes: Sequence[str],
        config: RomeConfig,
    ):
        self.hf, self.family, self.tokenizer, self.config = hf, family, tokenizer, config
        self.layer, self.subject = config.layer, rewrite.subject
        before, after = rewrite.prompt.split("{}")
        self.rows: list[list[int]] = []
        self.lookups: list[int] = []
        self.targets: list[list[int]] = []
        for prefix in prefixes:
            self._add(prefix + before, after, rewrite.new_object)
        self._add(*config.kl_prompt.split("{}"))
        self._add(before, after)
        with torch.no_grad():
            self.values, self.said = self._run(None)
        contexts = self.values[: len(prefixes)]
        self.v0 = contexts.mean(0) if config.key == "consistent" else self.values[-1]
        self._optimise()

    def _add(self, before: str, after: str, target: str | None = None) -> None:
        text = before + self.subject + after
        start, stop = len(before), len(before) + len(self.subject)
        offsets = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > max(a, start)]
        self.lookups.append(
            {
                "subject_first": inside[0],
                "subject_last": inside[-1],
                "after_subject": inside[-1] + 1,
                "last": len(offsets) - 1,
            }[self.config.fact_token]
        )
        whole = self.tokenizer(text if target is None else f"{text} {target}", return_offsets_mapping=True)
        self.rows.append(whole["input_ids"])
        self.targets.append([i for i, (a, _) in enumerate(whole["offset_mapping"]) if a >= len(text)])

    def _run(self, variable: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the down-projection writes at the fact's tokens, and log-probabilities `[n, t, v]`."""
        width = max(map(len, self.rows))
        ids = [row + [0] * (width - len(row)) for row in self.rows]  # in front of which no padding stands
        at = torch.arange(len(ids)), torch.tensor(self.lookups)
        seen: dict[str, Tensor] = {}

        def change(values: Tensor) -> Tensor | None:
            seen["values"] = values[at].detach().clone()
            if variable is None:
                return None
            new = variable.expand(len(ids), -1) if self.config.value_form == "z" else values[at] + variable
            return values.index_put(at, new)

        changes = {("value", self.layer): change}
        if self.config.loss_layer not in (None, LAYERS - 1):
            changes["state", self.config.loss_layer] = lambda states: seen.update(state=states)
            changes["state", LAYERS - 1] = lambda states: seen["state"]
        logits = plain_run(self.hf, self.family, ids, changes)
        return seen["values"], logits.double().log_softmax(-1)

    def _terms(self, variable: Tensor, delta: Tensor) -> list[Tensor]:
        _, said = self._run(variable)
        nlls = []
        for row, targets in enumerate(self.targets):
            if targets:
                nlls.append(-torch.stack([said[row, i - 1, self.rows[row][i]] for i in targets]).mean())
        nll, config = torch.stack(nlls), self.config
        kl_row, kl_at = len(self.rows) - 2, self.lookups[-2]
        new, old = said[kl_row, kl_at], self.said[kl_row, kl_at]
        kl = (new.exp() * (new - old)).sum()
        kl = config.kl_factor * (kl if config.kl_reduction == "sum" else kl / len(new))
        decay = torch.zeros(()).to(kl)
        if config.decay == "loss":
            decay = config.weight_decay * delta.norm() / self.v0.norm().square()
        return [nll.mean() + kl + decay, nll.mean(), kl, decay, (-nll).exp().mean()]

    def _optimise(self) -> None:
        config, z = self.config, self.config.value_form == "z"
        origin = self.v0 if z else torch.zeros_like(self.v0)
        variable = origin.clone().requires_grad_()
        decay = config.weight_decay if config.decay == "adam" else 0.0
        adam = torch.optim.Adam([variable], lr=config.learning_rate, weight_decay=decay)
        steps, deltas = [], []
        for _ in range(config.steps):
            terms = self._terms(variable, variable - origin)
            steps.append([term.item() for term in terms])
            deltas.append((variable - origin).detach().numpy().copy())
            if steps[-1][0] < config.stop_below:
                break
            adam.zero_grad()
            terms[0].backward(inputs=[variable])
            adam.step()
            with torch.no_grad():
                delta = variable - origin
                if config.clamp is not None and delta.norm() > config.clamp * self.v0.norm():
                    variable.copy_(origin + delta * (config.clamp * self.v0.norm() / delta.norm()))
        self.steps, self.deltas = np.array(steps), np.array(deltas)


def require_same(family: str, **settings) -> None:
    model, told = model_of(family), []
    config = RomeConfig(**{"layer": LAYER, "steps": STEPS, "prefixes": PREFIXES, "max_drift": None, **settings})
    rome(model, REWRITE, config, second_moment=SecondMoment.identity(model.d_mlp), progress=told.append)
    plain = Plain(model.hf, family, model.tokenizer, REWRITE, PREFIXES, config)
    found = np.array([[s.loss, s.nll, s.kl, s.decay, s.probability] for s in told])
    exact = 1e-8 if family != "gptj" else 1e-4  # its attention computes in float32
    assert len(found) == len(plain.steps)
    np.testing.assert_allclose(found, plain.steps, rtol=exact, atol=exact * 1e-2)
    deltas = np.stack([step.delta.numpy() for step in told])
    np.testing.assert_allclose(deltas, plain.deltas, rtol=0, atol=exact * np.abs(plain.deltas).max())
    assert np.abs(plain.deltas).max() > 0.05
    assert (np.abs(np.diff(plain.steps[:, 1])) > 1e-6).all()  # it matters what δ is


@pytest.mark.parametrize("family", OPTIMISED)
@pytest.mark.parametrize(
    ("form", "reduction", "decay"), list(itertools.product(("delta", "z"), ("sum", "mean"), ("loss", "adam")))
)
def test_every_term_at_every_step_is_that_of_plain_passes(family, form, reduction, decay):
    factor = 0.5 if reduction == "sum" else 100.0
    require_same(family, value_form=form, kl_reduction=reduction, decay=decay, kl_factor=factor, weight_decay=0.1)


@pytest.mark.parametrize("family", OPTIMISED)
@pytest.mark.parametrize("settings", [{"key": "reference"}, {"key": "reference", "value_form": "z"}, {"clamp": 0.2}])
def test_other_anchors_and_the_clamp(family, settings):
    require_same(family, **settings)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gptj"])
@pytest.mark.parametrize("role", ["subject_first", "after_subject", "last"])
def test_other_tokens(family, role):
    require_same(family, fact_token=role)
    require_same(family, fact_token=role, value_form="z")


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2", "gpt_neox"])
@pytest.mark.parametrize(("layer", "loss_layer"), [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
def test_other_layers(family, layer, loss_layer):
    require_same(family, layer=layer, loss_layer=loss_layer)


def test_the_edited_layer_s_own_state_is_read_at_the_last_token():
    require_same("llama", layer=2, loss_layer=2, fact_token="last")
    require_same("gpt2", layer=LAYERS - 1, fact_token="last")


@pytest.mark.parametrize("tokens", [1, 30])
def test_texts_that_do_not_fit_at_once(tokens, monkeypatch):
    monkeypatch.setitem(budgets.TOKENS["backward"], "cpu", tokens)
    require_same("llama")
    require_same("gemma2", value_form="z")


# ---- the whole way of an edit --------------------------------------------------------------------------


def digests(hf: PreTrainedModel) -> dict[str, str]:
    return {name: tensor_digest(parameter) for name, parameter in hf.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_made_applied_undone_and_saved(family, dtype, tied, tmp_path):
    model, told = model_of(family, dtype, tied), []
    hf = model.hf
    assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) == tied
    before = digests(hf)
    moment = collect(model, [LAYER], TEXTS)[LAYER]
    config = RomeConfig(layer=LAYER, prefixes="none", max_drift=None, steps=STEPS)
    edit = rome(model, REWRITE, config, second_moment=moment, progress=told.append)
    assert digests(hf) == before
    assert told[-1].delta.norm() > 0.1

    # What the one context writes and reads at the subject's last token, and what the weight becomes.
    seen: dict[str, Tensor] = {}
    keep = {
        ("key", LAYER): lambda tensor: seen.update(key=tensor.clone()),
        ("value", LAYER): lambda tensor: seen.update(value=tensor.clone()),
    }
    encoded = model.tokenizer(f"{REWRITE.text} {REWRITE.new_object}", return_offsets_mapping=True)
    with torch.no_grad():
        plain_run(hf, family, [encoded["input_ids"][:-1]], keep)
    last = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < len(REWRITE.subject))
    key, written = (seen[name][0, last].double() for name in ("key", "value"))
    (name,) = edit.weights
    old = hf.get_parameter(name).detach().double().clone()
    edit.apply(model)
    assert {one for one, digest in digests(hf).items() if digest != before[one]} == {name}
    gained = hf.get_parameter(name).detach().double() - old
    edit.undo(model)
    assert digests(hf) == before

    gained = gained.T if family == "gpt2" else gained
    delta = told[-1].delta.double()
    (change,) = edit.deltas
    wanted = torch.outer(change.write.double(), change.read.double())
    rounding = float((gained - wanted).norm() / wanted.norm())
    residual = float((gained @ key - delta).norm() / (written + delta).norm())
    if dtype == torch.float32:
        assert edit.notes["residual"] <= 1e-5
        assert edit.notes["rounding"] <= 1e-5
        assert residual <= 1e-5
    else:
        assert edit.notes["residual"] == pytest.approx(residual, rel=1e-4)
        assert edit.notes["rounding"] == pytest.approx(rounding, rel=1e-4)
        assert 1e-5 < rounding < 0.1

    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert loaded == edit
    assert loaded.notes == edit.notes
    with loaded.applied(model):
        assert digests(hf)[name] != before[name]
    assert digests(hf) == before
