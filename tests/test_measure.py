"""What is measured of many edits at once, against each edit put on the model by itself and the plain functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from errata.base.errors import ErrataError, FactError
from errata.base.facts import Fact, Rewrite
from errata.base.seeds import derive
from errata.data.records import Record, ZsreRecord
from errata.data.snippets import Snippet, Snippets
from errata.editors.editor import Editor
from errata.edits.delta import Delta, Dense, LowRank, RankOne
from errata.edits.edit import Edit
from errata.evaluation.measure import Generation, Measured, Measures, measure
from errata.evaluation.results import UNEDITED, Result
from errata.metrics import requests, side_effects
from errata.metrics.text import ESSENCE_LENGTH, as_scored, essence_perplexity, generation_entropy
from errata.metrics.tfidf import TfIdf
from errata.models import generation
from errata.models.generation import generate
from errata.models.model import Model
from errata.models.scoring import Score, score
from errata.models.weights import down_weight_name, matrix
from errata.passes.packed import PackedPasses
from errata.passes.packing import PackedSequence
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.registry import task_of_records
from errata.tasks.task import Scored
from helpers.models import digests
from tiny import TEXT, byte_tokenizer, tiny

LAYERS, LENGTH, TOP_K, SEED = 3, 24, 5, 7
PROBES = ("Rome is in Italy.", "a", "He went home, they say.")


@functools.cache
def model_of(family: str = "gpt2", dtype: torch.dtype = torch.float64) -> Model:
    return Model(tiny(family, LAYERS, dtype), byte_tokenizer(), family)


def record(case: int, fact: Fact, new: str, **more: tuple[str, ...]) -> Record:
    prompts = {"paraphrase": (), "neighborhood": (), "attribute": (), "generation": ()}
    return Record(case, "P1", fact.rewrite(new), **{**prompts, **more})


RECORDS = [
    record(
        3,
        Fact("The Space Needle", "{} is in the city of", "Seattle"),
        "Rome",
        paraphrase=("Seattle has it. The Space Needle is in", "Where is the Space Needle? In"),
        neighborhood=("The Louvre is in the city of",),
        attribute=("The Colosseum is in",),
        generation=("The Space Needle is near", "He"),
    ),
    record(
        5,
        Fact("Steve Jobs", "{} founded", "Apple"),
        "Microsoft",
        paraphrase=("A firm of Steve Jobs:",),
        generation=("He", "Steve Jobs went", "He"),
    ),
    record(4, Fact("Danielle Darrieux", "The mother tongue of {} is", "French"), "Italian", neighborhood=("He spoke",)),
    record(9, Fact("LeBron James", "{} plays", "basketball"), "chess", generation=("LeBron James",)),
]
SNIPPETS = Snippets(
    {
        ("P1", "Rome"): (
            Snippet("The Space Needle", "The Space Needle is in Rome."),
            Snippet("The Colosseum", "The Colosseum is in the city of Rome."),
            Snippet("The Space Needle", "It is near the Tiber."),
        ),
        ("P1", "Apple"): (Snippet("Steve Jobs", "Steve Jobs founded Apple and other firms of the city."),),
        ("P1", "chess"): (Snippet("Someone", "He plays chess in the city."),),
    }
)
ESSENCES = {
    3: ["The Space Needle is in Rome.", "It is near the Tiber."],
    5: ["Steve Jobs founded Apple and other firms of the city."],
}
WHOLE = Measures(
    generation=Generation(top_k=TOP_K, length=LENGTH),
    snippets=SNIPPETS,
    tfidf=TfIdf.fit(TEXT.splitlines()),
    probes=PROBES,
    seed=SEED,
)


# ---- editors that are made here -----------------------------------------------------------------------------


def drawn(model: Model, rewrite: Rewrite, *shape: int) -> torch.Tensor:
    """Numbers that depend on the rewrite, of a size that moves what the model says."""
    generator = torch.Generator().manual_seed(derive(0, rewrite.subject, *shape) % 2**31)
    return torch.randn(*shape, generator=generator, dtype=torch.promote_types(model.dtype, torch.float32)) / 2


def rank_one(model: Model, rewrite: Rewrite, layer: int = 1, size: float = 1.0) -> list[Delta]:
    write, read = drawn(model, rewrite, model.d_model), drawn(model, rewrite, model.d_mlp)
    return [RankOne(down_weight_name(model, layer), size * write, read)]


def low_rank(model: Model, rewrite: Rewrite) -> list[Delta]:
    """In two blocks, of attention too."""
    own = f"{model.anatomy.blocks}.0.{model.anatomy.attention}."
    name = next(n for n, p in model.hf.named_parameters() if n.startswith(own) and n.endswith("weight") and p.dim() > 1)
    d_out, d_in = matrix(model, name).shape
    return [LowRank(name, drawn(model, rewrite, d_out, 2), drawn(model, rewrite, 2, d_in)), *rank_one(model, rewrite)]


def dense(model: Model, rewrite: Rewrite) -> list[Delta]:
    return [Dense(down_weight_name(model, 1), drawn(model, rewrite, model.d_model, model.d_mlp) / 2)]


def mixed(model: Model, rewrite: Rewrite) -> list[Delta]:
    return (dense if rewrite.subject == "Steve Jobs" else rank_one)(model, rewrite)


KINDS: dict[str, Callable[[Model, Rewrite], list[Delta]]] = {
    "rank_one": rank_one,
    "first": functools.partial(rank_one, layer=0),
    "last": functools.partial(rank_one, layer=LAYERS - 1),
    "low_rank": low_rank,
    "dense": dense,
    "mixed": mixed,
    "nothing": functools.partial(rank_one, size=0.0),
    "hardly": functools.partial(rank_one, size=1e-9),
    "breaking": lambda model, rewrite: rank_one(model, rewrite, size=1e30 if rewrite.subject == "Steve Jobs" else 1.0),
    "breaking dense": lambda model, rewrite: (
        [Dense(down_weight_name(model, 1), 1e30 * drawn(model, rewrite, model.d_model, model.d_mlp))]
        if rewrite.subject == "Steve Jobs"
        else dense(model, rewrite)
    ),
}


def editor(kind: str, fails: Sequence[str] = ()) -> Editor:
    """Its edits cannot be made for some subjects."""

    def make(model: Model, rewrites: Sequence[Rewrite]) -> list[Edit | ErrataError]:
        return [
            FactError(f"nothing can be done about {rewrite.subject}")
            if rewrite.subject in fails
            else Edit.of(model, KINDS[kind](model, rewrite), "made", [rewrite], notes={"residual": 0.25, "else": 1})
            for rewrite in rewrites
        ]

    return Editor("made", {}, make)


def edits_of(model: Model, kind: str) -> list[Edit]:
    made = editor(kind).make(model, [each.rewrite for each in RECORDS])
    assert all(isinstance(edit, Edit) for edit in made)
    return made  # type: ignore[return-value]


def measured_by(model: Model, records: Sequence[Any], *arguments: Any) -> Measured:
    return measure(model, task_of_records(records), records, *arguments)


@functools.cache
def measured(family: str = "gpt2", kind: str = "rank_one") -> Measured:
    return measured_by(model_of(family), RECORDS, {kind: editor(kind)}, True, WHOLE)


def on(model: Model, edit: Edit | None) -> contextlib.AbstractContextManager[Any]:
    return edit.applied(model) if edit else contextlib.nullcontext()


def without_times(results: Sequence[Result]) -> list[Result]:
    return [dataclasses.replace(each, seconds={}) for each in results]


def plain_answers(model: Model, each: Record) -> Scored:
    targets = [each.rewrite.new_object, each.rewrite.fact.object]
    kinds = {"rewrite": (each.rewrite.text,)}
    kinds |= {kind: getattr(each, kind) for kind in ("paraphrase", "neighborhood", "attribute")}
    return {kind: tuple(tuple(score(model, [text] * 2, targets)) for text in texts) for kind, texts in kinds.items()}


def same_answers(found: Any, wanted: Any, rel: float) -> None:
    assert list(found) == list(wanted)
    for kind, theirs in wanted.items():
        ours = found[kind]
        assert [len(one) for one in ours] == [len(one) for one in theirs]
        for one, other in zip((s for each in ours for s in each), (s for each in theirs for s in each), strict=True):
            assert one.total == pytest.approx(other.total, rel=rel)
            assert (one.n_tokens, one.hits) == (other.n_tokens, other.hits)


ROWS = [
    *(("gpt2", kind) for kind in list(KINDS)[:6]),
    *(("opt", kind) for kind in ("rank_one", "last", "dense")),
    ("gemma3", "rank_one"),
    ("gemma3", "last"),
    ("phi3", "low_rank"),
    ("gpt_neox", "first"),
    ("gpt_neox", "last"),
]


# ---- each number is the plain function's, with the edit on --------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_answers_are_those_of_the_plain_way_to_score(family, kind):
    model, found = model_of(family), measured(family, kind)
    assert list(found.results) == [UNEDITED, kind]
    for name, edits in {UNEDITED: [None] * len(RECORDS), kind: edits_of(model, kind)}.items():
        assert [each.case for each in found.results[name]] == [3, 5, 4, 9]
        for each, edit, result in zip(RECORDS, edits, found.results[name], strict=True):
            with on(model, edit):
                same_answers(result.answers, plain_answers(model, each), 1e-9)
            assert result.error is result.edit is None
    moved = [
        abs(one.answers["rewrite"][0][0].total - other.answers["rewrite"][0][0].total)
        for one, other in zip(*found.results.values(), strict=True)
    ]
    assert min(moved) > 1e-3
    assert found.edits[kind] == edits_of(model, kind)


def seeds_of(each: Record) -> list[int]:
    return [derive(SEED, "text", each.case_id, number) for number in range(len(each.generation))]


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_texts_are_those_that_are_generated_with_the_edit_on(family, kind):
    model, found = model_of(family), measured(family, kind)
    for name, edits in {UNEDITED: [None] * len(RECORDS), kind: edits_of(model, kind)}.items():
        for each, edit, result in zip(RECORDS, edits, found.results[name], strict=True):
            with on(model, edit):
                wanted = generate(model, each.generation, LENGTH, length=LENGTH, top_k=TOP_K, seed=seeds_of(each) or 0)
            assert result.texts == tuple(wanted)
    texts = [[text for each in results for text in each.texts] for results in found.results.values()]
    assert len(texts[0]) == 6
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kind", ["rank_one", "dense"])
def test_entropy_and_reference_score_are_the_plain_functions(kind):
    for results in measured("gpt2", kind).results.values():
        for each, result in zip(RECORDS, results, strict=True):
            references = [snippet.text for snippet in SNIPPETS.of(each)]
            assert result.entropy == (generation_entropy(as_scored(result.texts)) if result.texts else None)
            wanted = (
                WHOLE.tfidf.reference_score(as_scored(result.texts), references)
                if references and result.texts
                else None
            )
            assert result.reference == wanted
        assert [result.entropy is None for result in results] == [False, False, True, False]
        assert [result.reference is None for result in results] == [False, True, True, False]


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_essence_is_the_plain_function_s_with_the_edit_on(family, kind):
    model, found = model_of(family), measured(family, kind)
    for name, edits in {UNEDITED: [None] * len(RECORDS), kind: edits_of(model, kind)}.items():
        for each, edit, result in zip(RECORDS, edits, found.results[name], strict=True):
            texts = ESSENCES.get(each.case_id)
            if texts is None:
                assert result.essence is None
                continue
            with on(model, edit):
                assert result.essence == pytest.approx(essence_perplexity(model, texts), rel=1e-9)


def test_reference_essence_divides_by_one_token_more():
    model = model_of("gpt2")
    measures = dataclasses.replace(WHOLE, essence="reference", probes=())
    found = measure(model, task_of_records(RECORDS), RECORDS, {}, True, measures).results[UNEDITED]
    for each, result in zip(RECORDS, found, strict=True):
        texts = ESSENCES.get(each.case_id)
        if texts:
            ids = torch.tensor(model.ids(" ".join(texts))[:ESSENCE_LENGTH])
            with torch.no_grad():
                logs = model.hf(ids[None]).logits[0, :-1].double().log_softmax(-1)
            own = logs.gather(1, ids[1:, None])
            assert result.essence == pytest.approx(float((-own.sum() / len(ids)).exp()), rel=1e-5)
            assert result.essence < 0.99 * essence_perplexity(model, texts)


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_side_effects_are_those_of_each_edit_put_on(family, kind):
    model, found = model_of(family), measured(family, kind)
    for each, edit, result in zip(RECORDS, edits_of(model, kind), found.results[kind], strict=True):
        asked, probed = [], []
        for edited in (None, edit):
            with on(model, edited):
                asked.append(side_effects.predict_fact(model, each.rewrite, side_effects.ESSENCE))
                probed.append(side_effects.predict_texts(model, PROBES))
        wanted = side_effects.compare(tuple(asked), tuple(probed), side_effects.MAX_DRIFT)
        told = dict(result.health)
        assert told.pop("residual") == 0.25
        assert told.pop("relative_norm") == pytest.approx(edit.relative_norm(model), rel=1e-12)
        assert told == pytest.approx(wanted.as_dict(), rel=1e-7, abs=1e-12)
        assert wanted.drift > 1e-6
    assert [each.health for each in found.results[UNEDITED]] == [None] * len(RECORDS)


# ---- the same random numbers --------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_changes_nothing():
    before, after = measured("gpt2", "nothing").results.values()
    assert [each.texts for each in after] == [each.texts for each in before]
    for one, other in zip(after, before, strict=True):
        same_answers(one.answers, other.answers, 1e-12)
        assert (one.entropy, one.reference) == (other.entropy, other.reference)
        assert one.health["drift"] == pytest.approx(0, abs=1e-12)
    texts = [text for each in before for text in each.texts]
    assert len(set(texts)) == len(texts)  # one prompt comes four times


def test_before_and_after_differ_only_from_where_the_models_do():
    """Both draw with the same numbers: an edit that hardly moves probabilities leaves the texts as they are, where
    another seed does not."""
    before, after = measured("gpt2", "hardly").results.values()
    assert [each.texts for each in after] == [each.texts for each in before]
    other = measured_by(model_of(), RECORDS, {}, True, dataclasses.replace(WHOLE, seed=SEED + 1)).results[UNEDITED]
    assert all(one.texts != two.texts for one, two in zip(other, before, strict=True) if one.texts)
    assert [one.answers for one in other] == [two.answers for two in before]


# ---- nothing depends on what is measured beside it ----------------------------------------------------------

SINGLE = [("gpt2", torch.float32), ("gemma3", torch.float32), ("llama", torch.bfloat16)]
SHORT = dataclasses.replace(WHOLE, generation=Generation(top_k=TOP_K, length=12))


@pytest.mark.parametrize(("family", "dtype"), SINGLE)
@pytest.mark.parametrize("measures", [SHORT, Measures()], ids=["all", "answers"])
def test_no_editor_s_results_depend_on_others_by_a_single_bit(family, dtype, measures):
    model = model_of(family, dtype)
    chosen = ["rank_one", "last", "low_rank", "dense"]
    together = measured_by(model, RECORDS, {kind: editor(kind) for kind in chosen}, True, measures)
    assert list(together.results) == [UNEDITED, *chosen]
    for some, before in [((kind,), False) for kind in chosen] + [((), True), (("rank_one",), True)]:
        alone = measured_by(model, RECORDS, {kind: editor(kind) for kind in some}, before, measures)
        assert list(alone.results) == [*([UNEDITED] if before else []), *some]
        for name, results in alone.results.items():
            assert without_times(results) == without_times(together.results[name])


@pytest.mark.parametrize("kind", ["rank_one", "last", "dense"])
def test_answers_do_not_depend_on_health_being_asked_for(kind):
    model, editors = model_of("gpt2", torch.float32), {kind: editor(kind)}
    whole, unprobed = (
        measured_by(model, RECORDS, editors, False, measures).results[kind]
        for measures in (SHORT, dataclasses.replace(SHORT, probes=()))
    )
    assert [each.health for each in unprobed] == [None] * len(RECORDS)
    assert [dataclasses.replace(each, health=None) for each in without_times(whole)] == without_times(unprobed)


def test_asking_alone_asks_the_same():
    model, editors = model_of("gpt2"), {"dense": editor("dense"), "last": editor("last")}
    found = measured_by(model, RECORDS, editors, True, Measures(seed=SEED))
    for name in ("dense", "last"):
        for bare, whole in zip(found.results[name], measured("gpt2", name).results[name], strict=True):
            same_answers(bare.answers, whole.answers, 1e-9)
            assert (bare.texts, bare.entropy, bare.reference, bare.essence, bare.health) == ((), None, None, None, None)


# ---- what cannot be measured --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank_one", "dense"])
def test_an_edit_that_cannot_be_made_is_the_result_of_its_record_alone(kind):
    model = model_of()
    fails = ["Steve Jobs", "LeBron James"]
    found = measured_by(model, RECORDS, {kind: editor(kind, fails)}, True, WHOLE)
    assert without_times(found.results[UNEDITED]) == without_times(measured("gpt2", kind).results[UNEDITED])
    for each, result, wanted in zip(RECORDS, found.results[kind], measured("gpt2", kind).results[kind], strict=True):
        if each.rewrite.subject in fails:
            assert result.error == f"nothing can be done about {each.rewrite.subject}"
            assert (result.answers, result.texts, result.health, result.essence) == (None, (), None, None)
            assert Result.from_line(result.as_line()) == result
        else:
            assert result.error is None
            same_answers(result.answers, wanted.answers, 1e-9)
            assert result.texts == wanted.texts
            assert result.health == pytest.approx(wanted.health, rel=1e-7, abs=1e-12)
    assert [edit is None for edit in found.edits[kind]] == [False, True, False, True]


def test_editors_all_of_whose_edits_fail():
    subjects = [each.rewrite.subject for each in RECORDS]
    found = measured_by(model_of(), RECORDS, {"none": editor("dense", subjects)}, False, WHOLE)
    assert list(found.results) == ["none"]
    assert all(each.error and each.answers is None for each in found.results["none"])


LONG = "not " * 100
TOO_LONG = [
    record(6, Fact("He", "{} is", "old"), "new", paraphrase=(LONG,)),
    record(7, Fact("He", "{} is", "old"), LONG),
    record(8, Fact("He", "{} is", "old"), "new", generation=(LONG,)),
]


@pytest.mark.parametrize("bad", TOO_LONG, ids=["prompt", "object", "opening"])
def test_a_record_that_the_model_cannot_read_is_told_and_leaves_the_others_alone(bad):
    model = model_of("gpt2", torch.float32)
    editors = {"rank_one": editor("rank_one"), "dense": editor("dense")}
    wanted = measured_by(model, RECORDS, editors, True, SHORT)
    found = measured_by(model, [*RECORDS[:1], bad, *RECORDS[1:]], editors, True, SHORT)
    for name, (first, told, *rest) in found.results.items():
        assert told.case == bad.case_id
        assert "reads at most 96" in told.error
        assert told.answers is None
        assert without_times([first, *rest]) == without_times(wanted.results[name])
    for name, (first, none, *rest) in found.edits.items():
        assert none is None
        assert [first, *rest] == list(wanted.edits[name])
    alone = measured_by(model, [bad], editors, True, SHORT)
    assert list(alone.results) == [UNEDITED, "rank_one", "dense"]
    assert all(each.error for results in alone.results.values() for each in results)


@pytest.mark.parametrize("kind", ["breaking", "breaking dense"])
def test_a_model_that_an_edit_breaks_says_nothing_and_the_others_speak(kind):
    """Its numbers overflow: it finds nothing probable, writes nothing, and its edit is disabling."""
    model = model_of("gpt2", torch.float32)
    before = digests(model)
    healthy = "dense" if kind.endswith("dense") else "rank_one"
    found = measured_by(model, RECORDS, {kind: editor(kind)}, True, WHOLE).results[kind]
    wanted = measured_by(model, RECORDS, {healthy: editor(healthy)}, True, WHOLE).results[healthy]
    assert digests(model) == before
    for each, result, other in zip(RECORDS, found, wanted, strict=True):
        if each.case_id != 5:
            same_answers(result.answers, other.answers, 1e-5)
            assert result.texts == other.texts
            assert result.health["disabling"] == other.health["disabling"]
            continue
        said = [s for kind in result.answers.values() for one in kind for s in one]
        assert not any(math.isfinite(s.total) for s in said)
        assert result.texts == each.generation
        assert result.essence is None
        assert result.health["disabling"] is True
        assert result.health["drift"] is None
        again = Result.from_line(result.as_line())
        assert {s.total for kind in again.answers.values() for one in kind for s in one} == {-math.inf}


@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_an_edit_that_the_dtype_cannot_hold_counts_as_not_made(kind):
    """Put on, the weight would overflow; the other records' edits are measured."""
    model = model_of("gpt2", torch.float16)
    plain = editor(kind)

    def make(model: Model, rewrites: Sequence[Rewrite]) -> list[Edit | ErrataError]:
        made = plain.make(model, rewrites)
        return [
            edit.scaled(1e7) if rewrite.subject == "Steve Jobs" else edit
            for rewrite, edit in zip(rewrites, made, strict=True)
        ]

    before = digests(model)
    found = measured_by(model, RECORDS, {kind: Editor("made", {}, make)}, True, WHOLE)
    assert digests(model) == before
    assert "overflows" in found.results[kind][1].error
    assert [each.error is None for each in found.results[kind]] == [True, False, True, True]
    assert found.edits[kind][1] is None
    wanted = measured_by(model, RECORDS, {kind: plain}, True, WHOLE).results[kind]
    assert [found.results[kind][i].texts for i in (0, 2, 3)] == [wanted[i].texts for i in (0, 2, 3)]


# ---- zsRE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank_one", "dense"])
def test_records_of_zsre(kind):
    model = model_of()
    records = [
        ZsreRecord(
            number, each.rewrite, ("Where is it?", "Who?"), (("nq question: who wrote it?", "Dante"), ("Why", "so"))
        )
        for number, each in enumerate(RECORDS)
    ]
    found = measured_by(model, records, {kind: editor(kind)}, True, WHOLE)
    for name, edits in {UNEDITED: [None] * len(RECORDS), kind: edits_of(model, kind)}.items():
        for each, edit, result in zip(records, edits, found.results[name], strict=True):
            new = each.rewrite.new_object
            with on(model, edit):
                wanted: dict[str, list[Score]] = {
                    "rewrite": score(model, [each.rewrite.text], [new]),
                    "paraphrase": score(model, each.paraphrase, [new] * 2),
                    "locality": score(model, *map(list, zip(*each.locality, strict=True))),
                }
            for part, scores in wanted.items():
                for [one], other in zip(result.answers[part], scores, strict=True):
                    assert one.total == pytest.approx(other.total, rel=1e-9)
                    assert (one.n_tokens, one.hits) == (other.n_tokens, other.hits)
            assert (result.texts, result.essence) == ((), None)
            assert (result.health is None) is (name == UNEDITED)


# ---- the model afterwards -----------------------------------------------------------------------------------


def test_the_weights_are_what_they_were_to_the_byte():
    for family, dtype in SINGLE[::2]:
        model = model_of(family, dtype)
        before = digests(model)
        measured_by(model, RECORDS, {kind: editor(kind) for kind in list(KINDS)[:6]}, True, SHORT)
        assert digests(model) == before
        assert not model.applied
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kind", ["rank_one", "dense", "mixed"])
@pytest.mark.parametrize("place", ["asking", "scoring", "writing", "effects"])
def test_nor_are_they_others_after_it_was_cut_short(place, kind, raised, monkeypatch):
    """In the middle of each part of the work, while an edit is on the model, or on its rows."""
    model = model_of("gpt2", torch.float32)
    module, name = {
        "asking": (PackedPasses, "step"),
        "scoring": (requests, "_token_scores"),
        "writing": (generation._Draw, "__call__"),
        "effects": (PackedPasses, "step"),
    }[place]
    before, plain, effects, calls = digests(model), getattr(module, name), side_effects.side_effects_of, []
    for length in range(32, model.max_length + 1, 32):  # the model has been asked how its blocks are called
        PackedPasses(model, [PackedSequence((0,) * length)])
    begun, unedited = [place != "effects"], 1 if place == "scoring" else 3

    def failing(*args: Any, **settings: Any) -> Any:
        on_rows = any(m._forward_hooks for m in model.hf.modules())
        calls.append(bool(model.applied) or (kind == "rank_one" and (on_rows or len(calls) >= unedited)))
        if begun[0] and calls[-1]:
            raise raised
        return plain(*args, **settings)

    def begin(*args: Any, **settings: Any) -> Any:
        begun[0] = True
        return effects(*args, **settings)

    monkeypatch.setattr(module, name, failing)
    monkeypatch.setattr(side_effects, "side_effects_of", begin)
    with pytest.raises(raised) as caught:
        measured_by(model, RECORDS, {kind: editor(kind)}, True, WHOLE)
    assert caught.tb is not None  # what is on the stack is still there
    assert digests(model) == before
    assert not model.applied
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_an_editor_that_breaks_off_ends_it():
    def make(model: Model, rewrites: Sequence[Rewrite]) -> list[Edit | ErrataError]:
        raise KeyboardInterrupt

    model = model_of("gpt2", torch.float32)
    before = digests(model)
    with pytest.raises(KeyboardInterrupt):
        measured_by(model, RECORDS, {"dense": editor("dense"), "broken": Editor("made", {}, make)}, True, WHOLE)
    assert digests(model) == before


def test_nothing_to_measure():
    found = measure(model_of(), COUNTERFACT, [], {"dense": editor("dense")}, True, WHOLE)
    assert not found.results.get("dense")
