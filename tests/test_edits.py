"""Edits as values: on and off to the last bit, in order, on the right model, and on disk."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from errata.base.errors import ConfigError, EditFileError, EditMismatch, EditStateError, OutputError
from errata.base.facts import Fact
from errata.edits import ContradictoryEdits, Dense, Edit, LowRank, RankOne, ledger
from errata.models import weights
from helpers.edits import REWRITE, down, random_edit
from helpers.models import digests, fresh_model

# ---- on and off ----


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("dense", [False, True])
def test_apply_adds_delta_and_undo_restores_every_byte(family, dense):
    model = fresh_model(family)
    before, old = digests(model), weights.matrix(model, down(model)).detach().clone()
    edit = random_edit(model, dense=dense)
    edit.apply(model)
    torch.testing.assert_close(weights.matrix(model, down(model)).detach(), old + edit.deltas[0].matrix())
    assert [name for name, digest in digests(model).items() if digest != before[name]] == [down(model)]
    edit.undo(model)
    assert digests(model) == before
    assert model.applied == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_hundred_random_edits_on_and_off_leave_no_trace(dtype):
    model = fresh_model(dtype=dtype)
    before = digests(model)
    choose, stack = random.Random(0), []
    for number in range(100):
        while stack and choose.random() < 0.45:
            stack.pop().undo(model)
        # made for the edited model, or for the model as it was
        edit = random_edit(model, seed=number, layer=choose.randrange(3), scale=10.0 ** choose.randint(-6, 3))
        edit.apply(model)
        stack.append(edit)
    while stack:
        stack.pop().undo(model)
    assert digests(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_sum_is_rounded_once(dtype):
    model = fresh_model(dtype=dtype)
    edit = random_edit(model, scale=1e-2)
    wanted = (weights.matrix(model, down(model)).float() + edit.deltas[0].matrix()).to(dtype)
    with edit.applied(model):
        assert torch.equal(weights.matrix(model, down(model)), wanted)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-3, 0.9), (torch.float32, 0, 1e-4)])
def test_what_the_dtype_makes_of_an_edit(dtype, least, most):
    model = fresh_model(dtype=dtype)
    edit = random_edit(model, scale=1e-2)
    before, change = weights.matrix(model, down(model)).detach().double(), edit.deltas[0].matrix().double()
    with edit.applied(model):
        held = weights.matrix(model, down(model)).detach().double() - before
    assert least <= edit.rounding(model) <= most
    assert edit.rounding(model) == pytest.approx(float((held - change).norm() / change.norm()))


def test_applied_takes_the_edit_off_after_an_error_too():
    model = fresh_model()
    before = digests(model)
    edit = random_edit(model)

    def interrupted():
        with edit.applied(model) as same:
            assert same is model
            assert digests(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert digests(model) == before


def test_edits_made_for_the_unedited_model_stack_and_so_do_sequential_ones():
    model = fresh_model()
    before = digests(model)
    first, second = random_edit(model, 1), random_edit(model, 2)
    first.apply(model)
    third = random_edit(model, 3)  # made for the model with the first on it
    with second.applied(model):
        pass
    third.apply(model)
    second.apply(model)
    fourth = random_edit(model, 4)
    for edit in (second, third, first):
        edit.undo(model)
    assert digests(model) == before
    for edit in (third, fourth):
        with pytest.raises(EditMismatch, match="made for other weights"):
            edit.apply(model)


def test_several_deltas_of_one_edit_go_on_together_or_not_at_all():
    model = fresh_model()
    before = digests(model)
    parts = [random_edit(model, seed, layer).deltas[0] for seed, layer in enumerate((0, 1, 1))]
    edit = Edit.of(model, parts, "test")
    wanted = weights.matrix(model, down(model)).detach() + parts[1].matrix() + parts[2].matrix()
    with edit.applied(model):
        torch.testing.assert_close(weights.matrix(model, down(model)).detach(), wanted)
    assert digests(model) == before

    for broken in (
        RankOne(down(model, 2), torch.ones(3), torch.ones(4)),
        RankOne("no.such.weight", torch.ones(16), torch.ones(24)),
        RankOne("transformer.ln_f.weight", torch.ones(16), torch.ones(24)),
    ):
        prints = {**edit.fingerprints, broken.weight: "0"}
        with pytest.raises(EditMismatch):
            Edit((*parts, broken), "test", fingerprints=prints).apply(model)
        assert digests(model) == before


def test_an_overflow_in_half_precision_is_refused_and_nothing_stays():
    model = fresh_model(dtype=torch.float16)
    before = digests(model)
    fine, huge = random_edit(model, layer=0).deltas[0], random_edit(model, layer=1, scale=1e6).deltas[0]
    with pytest.raises(EditMismatch, match="overflows"):
        Edit.of(model, [fine, huge], "test").apply(model)
    assert digests(model) == before
    assert model.applied == []


def test_a_head_tied_to_the_embedding_is_one_weight():
    model = fresh_model(tie_word_embeddings=True)
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
    before = digests(model)
    head = weights.matrix(model, "lm_head.weight")
    edit = Edit.of(model, [RankOne("lm_head.weight", torch.ones(head.shape[0]), torch.ones(head.shape[1]))], "test")
    with edit.applied(model):
        assert not torch.equal(model.hf.transformer.wte.weight, edit.deltas[0].matrix())
        assert digests(model) != before
    assert digests(model) == before


# ---- states and models that do not fit ----


def test_every_wrong_order_has_its_own_line():
    model, other = fresh_model(name="this"), fresh_model(name="that")
    first, second = random_edit(model, 1), random_edit(model, 2)

    def message(action, *args):
        with pytest.raises(EditStateError) as caught:
            action(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    never = message(first.undo, model)
    first.apply(model)
    elsewhere = message(first.undo, other)
    twice_on = message(first.apply, model)
    second.apply(model)
    order = message(first.undo, model)
    second.undo(model)
    first.undo(model)
    twice_off = message(first.undo, model)
    assert "is not applied to 'this'" in never
    assert "another model, 'this'" in elsewhere
    assert "already. Undo it before" in twice_on
    assert "1 edit(s) were applied after it" in order
    assert str(second) in order
    assert "has been undone on 'this' already" in twice_off
    assert len({never, elsewhere, twice_on, order, twice_off}) == 5


def test_undo_refuses_to_throw_away_what_someone_else_did_to_the_weight():
    model = fresh_model()
    edit = random_edit(model)
    edit.apply(model)
    with torch.no_grad():
        model.weight(down(model)).add_(1.0)
    with pytest.raises(EditStateError, match="something other than an edit"):
        edit.undo(model)


def test_other_weights_or_another_dtype_are_refused():
    edit = random_edit(fresh_model(name="made"))
    for model in (fresh_model(seed=1), fresh_model(dtype=torch.bfloat16)):
        before = digests(model)
        with pytest.raises(EditMismatch, match="'made'"):
            edit.apply(model)
        assert digests(model) == before
    with pytest.raises(EditMismatch, match="no weight named"):
        edit.apply(fresh_model("llama"))
    with pytest.raises(EditMismatch, match=r"is \[16, 20\]"):
        edit.apply(fresh_model(n_inner=20))


def test_relative_norm():
    model = fresh_model()
    for dense in (False, True):
        edit = random_edit(model, dense=dense)
        matrix = weights.matrix(model, down(model)).detach().double()
        wanted = torch.linalg.matrix_norm(edit.deltas[0].matrix().double()) / torch.linalg.matrix_norm(matrix)
        assert edit.relative_norm(model) == pytest.approx(float(wanted), rel=1e-6)


# ---- one of many ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_one_of_many_is_as_if_it_had_never_been_there(dtype):
    model = fresh_model(dtype=dtype)
    before = digests(model)
    edits = [random_edit(model, seed, layer) for seed, layer in enumerate((1, 1, 2, 1, 0))]
    for left_out in range(len(edits)):
        rest = [edit for edit in edits if edit is not edits[left_out]]
        for edit in rest:
            edit.apply(model)
        wanted = digests(model)
        for edit in reversed(rest):
            edit.undo(model)
        for edit in edits:
            edit.apply(model)
        edits[left_out].remove(model)
        assert digests(model) == wanted
        assert [line.edit for line in ledger(model)] == rest
        with pytest.raises(EditStateError, match="undone"):
            edits[left_out].remove(model)
        for edit in reversed(rest):
            edit.undo(model)
        assert digests(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_hundred_random_operations_leave_no_trace(dtype):
    model = fresh_model(dtype=dtype)
    before = digests(model)
    choose, stack = random.Random(1), []
    originals = [random_edit(model, n, choose.randrange(3), 10.0 ** choose.randint(-6, 2)) for n in range(100)]
    for number in range(100):
        action = choose.choice(("apply", "apply", "apply", "made now", "undo", "remove", "remove"))
        if action == "apply" or not stack:
            stack.append(originals[number])
            stack[-1].apply(model)
        elif action == "made now":
            stack.append(random_edit(model, 1000 + number, choose.randrange(3)))
            stack[-1].apply(model)
        elif action == "undo":
            stack.pop().undo(model)
        else:
            chosen, now = choose.choice(stack), digests(model)
            with contextlib.suppress(EditStateError):  # one made later may stand on it
                chosen.remove(model)
            if len(ledger(model)) == len(stack):
                assert digests(model) == now
                chosen.remove(model, force=True)
            stack.remove(chosen)
        assert [line.edit for line in ledger(model)] == stack
    assert stack
    while stack:
        stack.pop(choose.randrange(len(stack))).remove(model, force=True)
    assert digests(model) == before
    assert model.applied == []


def test_an_edit_that_a_later_one_stands_on_is_removed_by_force_alone():
    model = fresh_model()
    first, elsewhere = random_edit(model, 1), random_edit(model, 3, layer=2)
    first.apply(model)
    second = random_edit(model, 2)
    elsewhere.apply(model)
    second.apply(model)
    now = digests(model)
    with pytest.raises(EditStateError, match="was made for weights with it in them"):
        first.remove(model)
    assert digests(model) == now
    elsewhere.remove(model)
    first.remove(model, force=True)
    old = weights.matrix(fresh_model(), down(model)).detach()
    assert torch.equal(weights.matrix(model, down(model)).detach(), old + second.deltas[0].matrix())
    second.undo(model)
    assert digests(model) == digests(fresh_model())


def test_nothing_is_removed_from_weights_that_something_else_changed():
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2, layer=2)
    first.apply(model)
    second.apply(model)
    with torch.no_grad():
        model.weight(down(model, 2)).add_(1.0)
    now = digests(model)
    with pytest.raises(EditStateError, match="something other than an edit"):
        first.remove(model)
    assert digests(model) == now
    assert len(ledger(model)) == 2


def test_the_ledger_says_what_is_on_the_model():
    model = fresh_model()
    assert ledger(model) == ()
    rome = REWRITE.fact.rewrite("Rome")
    first, second = random_edit(model, 1), random_edit(model, 2, layer=2, rewrite=rome)
    first.apply(model)
    with pytest.warns(ContradictoryEdits, match=r"contradicts edit .*'Paris', now with 'Rome'\. Made one after"):
        second.apply(model)
    one, two = ledger(model)
    assert (one.place, one.edit, one.weights, one.rewrites, one.contradicts) == (
        1,
        first,
        (down(model),),
        (REWRITE,),
        (),
    )
    assert (two.place, two.edit, two.rewrites, two.contradicts) == (2, second, (rome,), (1,))
    first.remove(model)
    assert [(line.place, line.edit, line.contradicts) for line in ledger(model)] == [(1, second, ())]
    with pytest.warns(ContradictoryEdits):
        Edit.combine([first, second])


def test_edits_that_agree_or_speak_of_other_things_are_applied_without_a_word():
    model = fresh_model()
    other = Fact("The Louvre", "{} is located in").rewrite("Rome")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, rewrite in enumerate((REWRITE, REWRITE, other)):
            random_edit(model, seed, rewrite=rewrite).apply(model)


# ---- edits of edits ----


@pytest.mark.parametrize("kind", ["rank one", "dense", "low rank"])
def test_scaled(kind):
    model = fresh_model()
    edit = random_edit(model, dense=kind == "dense")
    if kind == "low rank":
        edit = Edit.of(model, [LowRank(down(model), torch.randn(16, 2), torch.randn(2, 24))], "test")
    half = edit.scaled(0.5)
    assert type(half.deltas[0]) is type(edit.deltas[0])
    assert torch.equal(half.deltas[0].matrix(), 0.5 * edit.deltas[0].matrix())
    assert half.notes["derived"] == ({"from": edit.id, "scaled": 0.5},)
    assert half != edit
    assert half == edit.scaled(0.5)
    with half.applied(model):
        pass
    with pytest.raises(ConfigError):
        edit.scaled(float("nan"))


def test_combined_edits_do_what_they_did_one_after_the_other():
    model = fresh_model()
    before = digests(model)
    first, apart = random_edit(model, 1), random_edit(model, 2, layer=2)
    same = random_edit(model, 3)
    with first.applied(model):
        later = random_edit(model, 4)
    edits = [first, apart, later, same]
    for edit in edits:
        edit.apply(model)
    wanted = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    on_it = Edit.combine(edits, model)  # on the model already
    for edit in reversed(edits):
        edit.undo(model)
    combined = Edit.combine(edits, model)
    assert digests(model) == before
    assert combined == on_it
    assert model.applied == []
    assert combined.rewrites == (REWRITE,) * 4
    assert [part["id"] for part in combined.config["parts"]] == [edit.id for edit in edits]
    assert combined.fingerprints == {**first.fingerprints, **apart.fingerprints}
    with combined.applied(model):
        for name, p in model.hf.named_parameters():
            torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-6, atol=1e-6)
    assert Edit.combine([first, apart, same]) == Edit.combine([first, apart, same], model)
    assert Edit.combine([first]) is first


def test_what_cannot_be_combined_is_refused():
    model, other = fresh_model(), fresh_model(seed=1)
    first = random_edit(model, 1)
    with first.applied(model):
        later = random_edit(model, 2)
        with later.applied(model):
            last = random_edit(model, 3)
    with pytest.raises(ConfigError, match="no edit"):
        Edit.combine([])
    with pytest.raises(ConfigError, match="with itself"):
        Edit.combine([first, first])
    before = digests(model)
    for edits, given in (
        ([first, later], None),
        ([first, random_edit(other)], None),
        ([first, random_edit(other)], model),
        ([first, last], model),
        ([later, first], model),
    ):
        with pytest.raises(EditMismatch, match="made for other"):
            Edit.combine(edits, given)
        assert digests(model) == before
        assert model.applied == []
    first.apply(model)
    with pytest.raises(EditStateError, match="one right after the other"):
        Edit.combine([first, later], model)


def test_an_edit_that_stands_on_a_third_is_not_combined_with_one_that_does_not():
    model = fresh_model()
    third, first = random_edit(model, 1), random_edit(model, 2)
    third.apply(model)
    first.apply(model)  # made for the unedited weight
    second = random_edit(model, 3)  # made for the weight with both
    second.apply(model)
    with pytest.raises(EditMismatch, match="cannot be combined"):
        Edit.combine([first, second], model)
    assert Edit.combine([third, first, second], model).fingerprints == third.fingerprints


def test_restricted_to_layers():
    model = fresh_model(layers=12)
    other = Fact("The Louvre", "{} is located in").rewrite("Rome")
    one, two = random_edit(model, 1, layer=1), random_edit(model, 2, layer=11, rewrite=other)
    both = Edit.combine([one, two])
    for edit, layers, names in ((both, [1], [down(model, 1)]), (both, range(2, 12), [down(model, 11)])):
        kept = edit.restricted(layers, model)
        assert list(kept.weights) == names
        assert kept.fingerprints.keys() == set(names)
    assert both.restricted([1], model).rewrites == (REWRITE,)
    assert both.restricted([11], model).rewrites == (other,)
    assert both.restricted([11], model).restricted([11], model).rewrites == (other,)
    many = Edit.of(model, [one.deltas[0], two.deltas[0]], "test", [REWRITE])
    assert many.restricted([11], model).rewrites == (REWRITE,)
    with pytest.raises(ConfigError, match="changes nothing in layers"):
        both.restricted([2], model)
    with pytest.raises(ConfigError, match="no layer 12"):
        both.restricted([1, 12], model)


@pytest.mark.parametrize("rank", [1, 3, 16, 99])
def test_truncation_against_numpy(rank):
    model = fresh_model()
    edit = random_edit(model, dense=True)
    matrix = edit.deltas[0].matrix().double().numpy()
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    cut = edit.truncated(rank)
    assert isinstance(cut.deltas[0], LowRank)
    assert cut.deltas[0].rank == min(rank, 16)
    np.testing.assert_allclose(cut.deltas[0].matrix().numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-6)
    step = cut.notes["derived"][0]
    assert step["truncated"] == rank
    assert step["residuals"][0]["weight"] == down(model)
    wanted = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
    assert step["residuals"][0]["residual"] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert cut.truncated(1) is cut
    with pytest.raises(ConfigError, match="at least 1"):
        edit.truncated(0)


def test_low_rank_is_a_sum_of_rank_one_changes():
    model = fresh_model()
    parts = [random_edit(model, seed).deltas[0] for seed in range(3)]
    low = LowRank(down(model), torch.stack([p.write for p in parts], 1), torch.stack([p.read for p in parts]))
    torch.testing.assert_close(low.matrix(), sum(p.matrix() for p in parts))
    assert low.norm() == pytest.approx(float(low.matrix().norm()), rel=1e-6)
    assert low.shape == (16, 24)


# ---- as a value ----


def test_an_edit_is_a_value():
    model = fresh_model()
    write, read = torch.ones(16), torch.ones(24)
    edit = Edit.of(model, [RankOne(down(model), write, read)], "test", config={"a": {"b": [1, 2]}})
    same = Edit.of(model, [RankOne(down(model), write, read)], "test", config={"a": {"b": (1, 2)}})
    write.zero_()
    assert edit == same
    assert len({edit, same}) == 1
    assert edit.deltas[0].write.sum() == 16
    assert edit != Edit.of(model, [RankOne(down(model), torch.ones(16), read)], "other")
    assert edit != "edit"
    with pytest.raises(AttributeError):
        edit.method = "other"
    for change in (
        lambda: edit.config.update(a=1),
        lambda: edit.config["a"].pop("b"),
        lambda: edit.config["a"].__setitem__("b", 2),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert pickle.loads(pickle.dumps(edit)) == edit
    assert copy.deepcopy(edit) == edit
    assert "rank" not in str(edit)
    assert len(repr(edit)) < 200


@pytest.mark.parametrize(
    ("deltas", "extra"),
    [
        ([], {}),
        ([RankOne("w", torch.ones(2), torch.ones(2))], {"fingerprints": {}}),
        ([RankOne("w", torch.ones(2), torch.ones(2))], {"notes": {"loss": float("nan")}}),
        ([RankOne("w", torch.ones(2), torch.ones(2))], {"config": {"x": object()}}),
    ],
)
def test_what_can_be_no_edit_is_refused(deltas, extra):
    with pytest.raises(ConfigError):
        Edit(deltas, "test", **{"fingerprints": {"w": "0"}, **extra})


@pytest.mark.parametrize(
    "make",
    [
        lambda: RankOne("w", torch.ones(2, 2), torch.ones(2)),
        lambda: RankOne("w", torch.ones(2), torch.tensor([1.0, float("nan")])),
        lambda: RankOne("w", torch.ones(2), torch.tensor([1, 2])),
        lambda: LowRank("w", torch.ones(2, 3), torch.ones(2, 2)),
        lambda: LowRank("w", torch.ones(2, 0), torch.ones(0, 2)),
        lambda: LowRank("w", torch.ones(2), torch.ones(2)),
        lambda: Dense("w", torch.ones(2)),
        lambda: Dense("w", torch.full((2, 2), float("inf"))),
        lambda: Dense("w", [[1.0]]),
    ],
)
def test_what_can_be_no_delta_is_refused(make):
    with pytest.raises(ConfigError, match="of w"):
        make()


# ---- on disk ----


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_it_is_the_same(tmp_path, dense, dtype):
    model = fresh_model(dtype=dtype)
    edit = random_edit(model, dense=dense)
    edit.save(tmp_path / "new" / "edit.safetensors")
    loaded = Edit.load(tmp_path / "new" / "edit.safetensors")
    assert loaded == edit
    assert loaded.rewrites == (REWRITE,)
    assert loaded.config == {"steps": 3, "names": ("a",)}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["edit.safetensors"]
    edit.apply(model)
    loaded.undo(model)  # equal is the same


def test_a_low_rank_change_is_of_format_2_which_an_older_errata_refuses_by_name(tmp_path):
    model = fresh_model()
    edit = random_edit(model, dense=True).truncated(3)
    edit.save(tmp_path / "e.safetensors")
    assert Edit.load(tmp_path / "e.safetensors") == edit
    raw = (tmp_path / "e.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["errata"])["version"] == 2


def test_on_a_full_disk_the_old_file_stays(tmp_path, monkeypatch):
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2)
    first.save(tmp_path / "e.safetensors")

    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("safetensors.torch.save_file", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(where, no_room)
            with pytest.raises(OutputError, match="No space left"):
                second.save(tmp_path / "e.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]
        assert Edit.load(tmp_path / "e.safetensors") == first


def test_the_header_can_be_read_by_a_person(tmp_path):
    edit = random_edit(fresh_model())
    edit.save(tmp_path / "e.safetensors")
    raw = (tmp_path / "e.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    told = json.loads(header["__metadata__"]["errata"])
    assert told["kind"] == "edit"
    assert told["version"] == 1
    assert told["id"] == edit.id
    assert told["rewrites"][0]["new_object"] == "Paris"


def rewritten(path, change_header=lambda told: None, change_tensors=lambda tensors: None):
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    told, tensors = json.loads(header["__metadata__"]["errata"]), load_file(path)
    change_header(told)
    change_tensors(tensors)
    save_file(tensors, path, metadata={"errata": json.dumps(told)})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_text("hello"), "cut short"),
        (lambda path: path.unlink(), "no file"),
        (lambda path: save_file({"a": torch.ones(2)}, path), "not written by errata"),
        (
            lambda path: save_file({"a": torch.ones(2)}, path, metadata={"errata": "{"}),
            "not written by errata",
        ),
        (
            lambda path: save_file({"a": torch.ones(2)}, path, metadata={"errata": "[1]"}),
            "not written by errata",
        ),
        (lambda path: rewritten(path, lambda told: told.update(kind="trace")), "holds 'trace'"),
        (lambda path: rewritten(path, lambda told: told.update(version=3)), "Upgrade"),
        (lambda path: rewritten(path, lambda told: told.pop("deltas")), "broken"),
        (lambda path: rewritten(path, lambda told: told.update(deltas=[])), "broken"),
        (lambda path: rewritten(path, lambda told: told.update(deltas=3)), "broken"),
        (lambda path: rewritten(path, lambda told: told["deltas"][0].update(kind="code")), "broken"),
        (lambda path: rewritten(path, lambda told: told.pop("method")), "broken"),
        (lambda path: rewritten(path, lambda told: told.update(rewrites=[{"subject": ""}])), "broken"),
        (lambda path: rewritten(path, lambda told: told.update(method="mend")), "changed since"),
        (lambda path: rewritten(path, lambda told: told.update(id="0")), "changed since"),
        (lambda path: rewritten(path, change_tensors=lambda t: t["0.write"].add_(1e-6)), "changed since"),
        (
            lambda path: rewritten(path, change_tensors=lambda t: t.update({"0.write": torch.ones(2, 2)})),
            "broken",
        ),
        (lambda path: rewritten(path, change_tensors=lambda t: t["0.read"].fill_(float("nan"))), "NaN"),
        (lambda path: rewritten(path, change_tensors=lambda t: t.pop("0.read")), "broken"),
        (lambda path: rewritten(path, change_tensors=lambda t: t.update({"x": torch.ones(1)})), "broken"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, says):
    path = tmp_path / "edit.safetensors"
    random_edit(fresh_model()).save(path)
    damage(path)
    with pytest.raises(EditFileError, match=says) as caught:
        Edit.load(path)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        random_edit(fresh_model()).save(tmp_path / "folder")
