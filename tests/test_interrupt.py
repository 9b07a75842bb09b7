"""Signals and errors at every moment: whatever was changed for a moment is as it was afterwards."""

from __future__ import annotations

import _thread
import contextlib
import functools
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import errata as package
from errata.base import interrupt
from errata.editors.rome.exactness import _applied
from errata.edits.delta import Dense, RankOne
from errata.edits.edit import Edit
from errata.models.fingerprint import weights_digest
from errata.models.frozen import frozen
from errata.models.loading import load_pretrained
from errata.models.quick import quick
from errata.models.weights import down_weight_name
from errata.passes.hooks import hooked
from errata.passes.rowwise import row_changes, rowwise
from errata.passes.taps import tapped
from tiny import MLP_WIDTH, WIDTH, byte_tokenizer, tiny

HOME = str(Path(package.__file__).parent)


@pytest.fixture(autouse=True)
def _gradients_are_on_afterwards():
    """An error on the last line of torch's own no_grad leaves gradients off: other tests are not to meet that."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def _interrupts_are_heard():
    """Processes in the background of a shell ignore SIGINT; here it is Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model():
    return load_pretrained((tiny("gpt2"), byte_tokenizer()), name="tiny")


@functools.cache
def edit_of(model, layer: int, seed: int = 0) -> Edit:
    chance = torch.Generator().manual_seed(seed)
    name = down_weight_name(model, layer)
    change = RankOne(name, torch.randn(WIDTH, generator=chance), torch.randn(MLP_WIDTH, generator=chance))
    return Edit.of(model, [change, RankOne(down_weight_name(model, 2), change.write, change.read)], "test", seed=seed)


def state(model) -> tuple:
    """All that must be as it was."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
    ways = ["forward" in vars(m) for m in model.hf.modules()]
    wanted = [p.requires_grad for p in model.hf.parameters()]
    return weights_digest(model.hf), list(model.applied), hooks, ways, wanted, signal.getsignal(signal.SIGINT)


def one(model):
    with edit_of(model, 0).applied(model):
        pass


def stack(model):
    with contextlib.ExitStack() as edits:
        for layer in (0, 1):
            edits.enter_context(edit_of(model, layer).applied(model))


def nested(model):
    with edit_of(model, 0).applied(model), edit_of(model, 1).applied(model), frozen(model):
        pass


def tried(model):
    name = down_weight_name(model, 0)
    with torch.no_grad(), _applied(model, RankOne(name, torch.ones(WIDTH), torch.ones(MLP_WIDTH))):
        pass


def rest(model):
    name = down_weight_name(model, 1)
    changes = row_changes(model, [{name: (torch.ones(WIDTH, 1), torch.ones(1, MLP_WIDTH))}])
    with hooked(model, {("state", 0): lambda x: None}), tapped(model, [name.removesuffix(".weight")]):
        pass
    with rowwise(model, changes), quick(model.hf), frozen(model):
        pass


class Moments:
    """Calls `act(frame)` at one of the moments (lines, or opcodes too) at which code of errata or contextlib runs.

    No moments are: handlers of signals, of which one does not interrupt another; generator expressions, whose
    errors Python drops when it closes them; and functions with a `with` statement of their own on what is tested,
    between whose body and `__exit__` a tracer can act, but no signal arrives.
    """

    LEFT_OUT = ("_handle", "_is_protected", "_try_again", "_deliver", "<genexpr>", "linear_matrix")

    def __init__(self, act, wanted: int, opcodes: bool, plumbing: bool = True):
        self.act, self.wanted, self.opcodes, self.seen = act, wanted, opcodes, 0
        self.left_out = () if plumbing else (contextlib.__file__, interrupt.__file__)

    def __call__(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith((HOME, contextlib.__file__)) or code.co_name in self.LEFT_OUT:
            return None
        if code.co_filename in self.left_out:
            return self
        frame.f_trace_opcodes = self.opcodes
        if event in ("call", "line", "opcode"):
            self.seen += 1
            if self.seen == self.wanted:
                self.act(frame)
        return self


def arrive(frame) -> None:
    """As if the signal interrupted this very frame."""
    handler = signal.getsignal(signal.SIGINT)
    handler(signal.SIGINT, frame)


def raised(frame) -> None:
    raise KeyboardInterrupt


def count(change, model, **settings) -> int:
    moments = Moments(None, -1, **settings)
    sys.settrace(moments)
    try:
        change(model)
    finally:
        sys.settrace(None)
    return moments.seen


def tried_at(change, model, act, moment: int, **settings) -> bool:
    """Whether the interrupt came out of the change, or right after it."""
    moments = Moments(act, moment, **settings)
    came = False
    try:
        sys.settrace(moments)
        try:
            change(model)
        finally:
            sys.settrace(None)
        for _ in range(1000):  # one that waits comes now
            time.sleep(0.001)
    except KeyboardInterrupt:
        came = True
    return came


@pytest.mark.parametrize("change", [one, stack, nested, tried, rest], ids=lambda each: each.__name__)
def test_a_signal_at_any_line_leaves_all_as_it_was_and_is_not_lost(change, model):
    change(model)  # what is found once is found
    before, moments = state(model), count(change, model, opcodes=False)
    assert moments > 50
    for moment in range(1, moments + 1, 5 if change is one else 25):
        assert tried_at(change, model, arrive, moment, opcodes=False), moment
        assert state(model) == before, moment


def test_a_signal_at_any_opcode_leaves_all_as_it_was(model):
    one(model)
    before, moments = state(model), count(one, model, opcodes=True)
    for moment in range(1, moments + 1, 23):
        tried_at(one, model, arrive, moment, opcodes=True)
        assert state(model) == before, moment


@pytest.mark.parametrize("change", [one, stack], ids=lambda each: each.__name__)
def test_an_error_at_any_line_leaves_the_weights_as_they_were(change, model):
    """Errors that are no signals, in `applied`, `apply`, `undo` and all of ours that they call."""
    change(model)
    settings = {"opcodes": False, "plumbing": False}
    before, moments = state(model)[:2], count(change, model, **settings)
    for moment in range(1, moments + 1, 5 if change is one else 25):
        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(Moments(raised, moment, **settings))
            try:
                change(model)
            finally:
                sys.settrace(None)
        assert state(model)[:2] == before, moment
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_real_signals_at_random_moments(model):
    before, came = state(model), 0
    for turn in range(60):
        sender = threading.Timer((turn % 60) * 5e-5, _thread.interrupt_main)
        try:
            sender.start()
            one(model) if turn % 2 else stack(model)
            sender.join()
            for _ in range(1000):
                time.sleep(0.001)
        except KeyboardInterrupt:
            came += 1
        assert state(model) == before
    assert came == 60


def test_in_the_block_a_signal_comes_at_once(model):
    with pytest.raises(KeyboardInterrupt), edit_of(model, 0).applied(model):
        signal.raise_signal(signal.SIGINT)
    assert not model.applied


def test_another_handler_gets_its_signals(model):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with edit_of(model, 0).applied(model):
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_other_threads_edits_go_on_and_off(model):
    before, errors = state(model), []

    def work() -> None:
        try:
            one(model)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert state(model) == before


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_the_error_of_the_block_is_the_one_that_is_raised(kind):
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()), name="tiny")
    own = kind("mine")

    def block() -> None:
        with torch.no_grad():
            model.weight(down_weight_name(model, 0)).add_(1)
        raise own

    with pytest.raises(kind, match="mine") as caught, edit_of(model, 0).applied(model):
        block()
    assert caught.value is own
    said = "".join(getattr(own, "__notes__", ())) or str(own.__context__)
    assert "cannot be undone: something other than an edit has changed" in said


def test_an_edit_does_not_go_on_a_weight_that_was_changed_by_hand_after_another():
    from errata.base.errors import EditMismatch, EditStateError

    model = load_pretrained((tiny("gpt2"), byte_tokenizer()), name="tiny")
    name = down_weight_name(model, 0)
    first, second = edit_of(model, 0, 1), edit_of(model, 0, 2)
    first.apply(model)
    with torch.no_grad():
        model.weight(name)[0, 0] += 1
    with pytest.raises(EditStateError, match="something other than an edit has changed"):
        first.undo(model)
    changed = weights_digest(model.hf)
    with pytest.raises(EditMismatch, match="something other than an edit has changed"):
        second.apply(model)
    with pytest.raises(EditMismatch, match="something other than an edit has changed"):
        Edit.combine([second, Edit.of(model, [Dense(name, torch.ones(WIDTH, MLP_WIDTH))], "test")], model)
    assert weights_digest(model.hf) == changed
    # One that was made for these very bytes fits them.
    with Edit.of(model, [RankOne(name, torch.ones(WIDTH), torch.ones(MLP_WIDTH))], "test").applied(model):
        pass
    assert weights_digest(model.hf) == changed
