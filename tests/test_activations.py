"""The fused activation: the same numbers, only while errata's own passes run."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

from errata.models.activations import fused
from errata.models.generation import generate
from errata.models.loading import load_pretrained
from errata.passes.replay import record
from tiny import byte_tokenizer, tiny

TEXT = "The Space Needle is in"


@pytest.fixture(params=["gpt2", "gptj"])
def hf(request):
    return tiny(request.param)


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_numbers_are_the_same(kind, dtype, bound):
    module, inputs = kind(), torch.linspace(-20, 20, 4001, dtype=dtype, requires_grad=True)
    plain = module(inputs)
    with fused(module):
        found = module(inputs)
    assert found.grad_fn.name() != plain.grad_fn.name()
    torch.testing.assert_close(found, plain, rtol=0, atol=bound)
    slopes = [torch.autograd.grad(each.sum(), inputs)[0] for each in (found, plain)]
    torch.testing.assert_close(*slopes, rtol=0, atol=10 * bound)


def test_a_pass_is_the_plain_one(hf):
    model = load_pretrained((hf.double(), byte_tokenizer()))
    batch = model.encode([TEXT])
    plain = hf(batch.input_ids).logits
    torch.testing.assert_close(model.forward(batch), plain, rtol=1e-12, atol=1e-12)


def test_every_pass_of_ours_uses_it_and_no_pass_of_others(hf, monkeypatch):
    model = load_pretrained((hf, byte_tokenizer()))
    batch = model.encode([TEXT])
    before = hf(batch.input_ids).logits

    def written_out(self, input):
        raise AssertionError("written out")

    with monkeypatch.context() as patched:
        patched.setattr(NewGELUActivation, "forward", written_out)
        model.forward(batch)
        generate(model, [TEXT], 3)
        recording = record(model, batch, first=0, check=False)
        past = recording.past(0, torch.zeros(1, dtype=torch.long), 0)
        recording.calls[0](model.blocks[0], recording.states[0], 0, past)
        with pytest.raises(AssertionError, match="written out"):
            hf(batch.input_ids)
    assert torch.equal(hf(batch.input_ids).logits, before)


def test_it_is_taken_off_again_also_after_an_error(hf):
    activations = [each for each in hf.modules() if type(each) is NewGELUActivation]

    def stopped() -> None:
        with fused(hf):
            with fused(hf):  # as in a pass within a pass
                pass
            assert all("forward" in vars(each) for each in activations)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert activations
    assert not any("forward" in vars(each) for each in activations)


def test_what_another_library_put_there_stays(hf):
    activation = next(each for each in hf.modules() if type(each) is NewGELUActivation)
    activation.forward = theirs = lambda input: input
    with fused(hf):
        assert activation.forward is theirs
    assert activation.forward is theirs
