"""Activations in one call and heads in pieces: the same numbers, only while texts are written."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

from errata.models.generation import generate
from errata.models.loading import load_pretrained
from errata.models.quick import quick
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
    with quick(module):
        found = module(inputs)
    assert found.grad_fn.name() != plain.grad_fn.name()
    torch.testing.assert_close(found, plain, rtol=0, atol=bound)
    slopes = [torch.autograd.grad(each.sum(), inputs)[0] for each in (found, plain)]
    torch.testing.assert_close(*slopes, rtol=0, atol=10 * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_few_bits_the_numbers_are_the_models_own(dtype):
    module, inputs = NewGELUActivation(), torch.linspace(-4, 4, 1001, dtype=dtype)
    plain = module(inputs)
    with quick(module):
        assert torch.equal(module(inputs), plain)
    assert not torch.equal(torch.nn.functional.gelu(inputs, approximate="tanh"), plain)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 1, 7), (7,)])
def test_a_wide_head_in_pieces_is_the_head(dtype, bound, bias, shape):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(7, 8 * 1024 + 5, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    states = torch.randn(shape, generator=generator, dtype=dtype)
    plain = head(states)
    with quick(head):
        found = head(states)
    assert plain.requires_grad
    assert not found.requires_grad  # it is ours that was run
    torch.testing.assert_close(found, plain.detach(), rtol=0, atol=bound)
    assert "forward" not in vars(head)
    assert torch.equal(head(states), plain)


def test_what_an_edit_puts_on_a_head_is_in_its_pieces():
    head = torch.nn.Linear(4, 8 * 1024)
    with quick(head), torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(2.0)
        handle = head.register_forward_hook(lambda module, args, output: output + 1)
        assert (head(torch.ones(1, 4)) == 3).all()
        handle.remove()


def test_heads_that_are_narrow_or_of_few_bits_are_the_models_own():
    narrow, short = torch.nn.Linear(4, 8 * 1024 - 1), torch.nn.Linear(4, 8 * 1024, dtype=torch.bfloat16)
    states = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    plain = short(states)
    with quick(narrow), quick(short):
        assert "forward" not in vars(narrow)
        assert torch.equal(short(states), plain)


def test_texts_are_drawn_with_it_and_no_number_is_told_by_it(hf, monkeypatch):
    model = load_pretrained((hf, byte_tokenizer()))
    batch = model.encode([TEXT])
    before = hf(batch.input_ids).logits
    written = generate(model, [TEXT], 8, greedy=True)

    def refuse(self, input):
        raise AssertionError("written out")

    with monkeypatch.context() as patched:
        patched.setattr(NewGELUActivation, "forward", refuse)
        assert generate(model, [TEXT], 8, greedy=True) == written
        for told in (lambda: model.forward(batch), lambda: hf(batch.input_ids)):
            with pytest.raises(AssertionError, match="written out"):
                told()
    assert torch.equal(hf(batch.input_ids).logits, before)
    assert torch.equal(model.forward(batch), before)


def test_texts_are_written_with_a_wide_head(monkeypatch):
    hf = tiny("llama", vocab_size=8 * 1024 + 1)
    model = load_pretrained((hf, byte_tokenizer()))
    plain, seen = torch.mm, []

    def counting(*given, **settings):
        seen.append(given[1].shape)
        return plain(*given, **settings)

    monkeypatch.setattr(torch, "mm", counting)
    written = generate(model, [TEXT], 3, greedy=True)
    assert len(seen) == 3 * 9
    monkeypatch.setattr("errata.models.quick._way", lambda module: None)
    assert generate(model, [TEXT], 3, greedy=True) == written
    assert len(seen) == 3 * 9


def test_what_is_written_is_what_the_plain_model_writes(hf):
    model = load_pretrained((hf, byte_tokenizer()))
    ids = model.encode([TEXT]).input_ids
    for _ in range(8):
        ids = torch.cat([ids, hf(ids).logits[:, -1:].argmax(-1)], 1)
    assert generate(model, [TEXT], 8, greedy=True) == [TEXT + model.tokenizer.decode(ids[0, -8:])]


def test_it_is_taken_off_again_also_after_an_error(hf):
    activations = [each for each in hf.modules() if type(each) is NewGELUActivation]

    def stopped() -> None:
        with quick(hf):
            with quick(hf):  # as in a pass within a pass
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
    with quick(hf):
        assert activation.forward is theirs
    assert activation.forward is theirs
