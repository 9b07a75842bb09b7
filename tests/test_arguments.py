"""Arguments of the wrong kind are refused in one line; autocast around a call changes no number."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import errata
from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, ErrataError, FactError
from errata.edits import RankOne
from errata.models.loading import load_pretrained
from errata.models.scoring import score
from errata.models.weights import down_weight_name
from errata.statistics import SecondMoment
from tiny import TEXT, byte_tokenizer, tiny

FACT = errata.Fact("The Space Needle", "{} is located in the city of", "Seattle")
REWRITE = FACT.rewrite("Paris")
TEXTS = TEXT.splitlines()
WRONG = "a text"


@pytest.fixture(scope="module")
def model():
    return load_pretrained((tiny("llama", layers=4), byte_tokenizer()), name="tiny")


@pytest.fixture(scope="module")
def edit(model):
    weight = down_weight_name(model, 1)
    return errata.Edit.of(model, [RankOne(weight, torch.ones(16), torch.ones(24))], "test")


CALLS = {
    "trace: fact": lambda m, e, p: errata.trace(m, WRONG),
    "trace: model": lambda m, e, p: errata.trace(WRONG, FACT),
    "trace: config": lambda m, e, p: errata.trace(m, FACT, WRONG),
    "trace: fact is a Rewrite": lambda m, e, p: errata.trace(m, REWRITE),
    "trace: fact is None": lambda m, e, p: errata.trace(m, None),
    "trace_facts: facts is a str": lambda m, e, p: errata.trace_facts(m, WRONG, p),
    "trace_facts: facts is a Fact": lambda m, e, p: errata.trace_facts(m, FACT, p),
    r"trace_facts: facts\[1\]": lambda m, e, p: errata.trace_facts(m, [FACT, WRONG], p),
    "integrated_gradients: fact": lambda m, e, p: errata.integrated_gradients(m, WRONG),
    "average_effects: traces": lambda m, e, p: errata.average_effects(WRONG),
    r"average_effects: traces\[0\]": lambda m, e, p: errata.average_effects([WRONG]),
    "rome takes a Rewrite": lambda m, e, p: errata.rome(m, WRONG),
    "rome: model": lambda m, e, p: errata.rome(WRONG, REWRITE),
    "rome: config": lambda m, e, p: errata.rome(m, REWRITE, WRONG),
    "rome: second_moment": lambda m, e, p: errata.rome(m, REWRITE, second_moment=WRONG),
    "editor: model": lambda m, e, p: errata.editor(WRONG),
    "there is no editor": lambda m, e, p: errata.editor(m, WRONG),
    "Edit: deltas": lambda m, e, p: errata.Edit(WRONG, "test"),
    r"Edit: deltas\[0\]": lambda m, e, p: errata.Edit([WRONG], "test"),
    r"Edit: rewrites\[0\]": lambda m, e, p: errata.Edit(e.deltas, "test", [WRONG], fingerprints=e.fingerprints),
    "Edit.of: model": lambda m, e, p: errata.Edit.of(WRONG, e.deltas, "test"),
    "Edit.of: deltas": lambda m, e, p: errata.Edit.of(m, WRONG, "test"),
    "Edit.apply: model": lambda m, e, p: e.apply(WRONG),
    "Edit.undo: model": lambda m, e, p: e.undo(WRONG),
    "Edit.remove: model": lambda m, e, p: e.remove(WRONG),
    "Edit.applied: model": lambda m, e, p: e.applied(WRONG),
    r"Edit.combine: edits\[0\]": lambda m, e, p: errata.Edit.combine([WRONG]),
    "Edit.restricted: model": lambda m, e, p: e.restricted([1], WRONG),
    "Edit.to_lora: model": lambda m, e, p: e.to_lora(p, model=WRONG),
    "Edit.from_lora: model": lambda m, e, p: errata.Edit.from_lora(p, WRONG),
    "ledger: model": lambda m, e, p: errata.ledger(WRONG),
    "save_merged: model": lambda m, e, p: errata.save_merged(WRONG, p),
    "collect: model": lambda m, e, p: errata.second_moments(WRONG, [1], TEXTS),
    "texts is one string": lambda m, e, p: errata.second_moments(m, [1], WRONG),
    "SecondMoment.merged: moments": lambda m, e, p: SecondMoment.merged(WRONG),
    "records are of class str": lambda m, e, p: errata.evaluate(m, WRONG, {}, p),
    "edit_in_sequence: rewrites": lambda m, e, p: errata.edit_in_sequence(m, WRONG, [], p, second_moment=None),
    "records are of class": lambda m, e, p: errata.sweep(m, WRONG, p),
    "Rewrite: fact": lambda m, e, p: errata.Rewrite(WRONG, "Paris"),
}


@pytest.mark.parametrize("said", CALLS)
def test_an_argument_of_another_kind_is_refused_in_one_line(said, model, edit, tmp_path):
    with pytest.raises((ConfigError, FactError), match=rf"^{said}") as caught:
        CALLS[said](model, edit, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_needed_is_said_with_how_to_make_it():
    @checked(facts=["Fact"], model="Model")
    def function(facts, model=None):
        return facts

    assert function([FACT]) == [FACT]
    assert list(function(iter([FACT]), None)) == [FACT]
    with pytest.raises(
        ConfigError, match=r"facts\[0\] is a str, 'aaaaa.*\.\.\.; it must be of class Fact: make one with"
    ):
        function(["a" * 1000])
    with pytest.raises(ConfigError, match="model is a int, 3; it must be of class Model: load one with"):
        function([FACT], 3)
    with pytest.raises(TypeError, match="missing 1 required"):
        function()


# ---- autocast -----------------------------------------------------------------------------------------


def numbers(value) -> np.ndarray:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64).ravel()


def work(model, folder) -> dict[str, np.ndarray]:
    """A number of everything that computes."""
    found = {}
    moment = errata.second_moments(model, [1], TEXTS)[1]
    found["second moment"] = numbers(moment.solve(torch.linspace(-1, 1, 24).double()))
    config = errata.RomeConfig(layer=1, steps=4, prefixes="none", max_drift=None)
    edit = errata.rome(model, REWRITE, config, second_moment=moment)
    found["edit"] = numbers(edit.deltas[0].write)
    for name, settings in {"ft": {"layer": 1, "steps": 2}, "kn": {}}.items():
        other = errata.editor(model, name, max_drift=None, **settings)(REWRITE)
        found[name] = np.concatenate([numbers(t) for delta in other.deltas for t in delta.tensors().values()])
    trace = errata.trace(model, FACT, samples=2)
    found["trace"] = numbers(trace.restored["state"])
    errata.trace_facts(model, [FACT], folder / "traces.jsonl", samples=2)
    found["traces"] = numbers(errata.load_traces(folder / "traces.jsonl")[0].restored["mlp"])
    found["gradients"] = numbers(errata.integrated_gradients(model, FACT, points=3).norms["mlp"])
    found["logits"] = numbers(model.forward(model.encode(["Rome is"])))
    with edit.applied(model):
        found["weight"] = numbers(model.weight(edit.weights[0]))
        found["score"] = numbers([each.total for each in score(model, [FACT.text], ["Paris"])])
        found["text"] = numbers([ord(letter) for letter in model.complete("Rome is", 5)])
    again = load_pretrained((model.hf, model.tokenizer))
    found["loaded"] = numbers(again.n_layers)
    edit.to_lora(folder / "adapter")
    found["adapter"] = numbers(errata.Edit.from_lora(folder / "adapter", model).deltas[0].write)
    return found


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_number(dtype, model, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "auto").mkdir()
    plain = work(model, tmp_path / "plain")
    with torch.autocast("cpu", dtype=dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        auto = work(model, tmp_path / "auto")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype  # it is on again
    for name, wanted in plain.items():
        np.testing.assert_array_equal(auto[name], wanted, err_msg=name)


def test_autocast_is_on_again_after_an_error():
    @without_autocast
    def failing():
        assert not torch.is_autocast_enabled("cpu")
        raise ConfigError("no")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with contextlib.suppress(ErrataError):
            failing()
        assert torch.is_autocast_enabled("cpu")
