"""Facts in a script without spaces, on a pretrained model: known, traced and edited as they are written."""

from __future__ import annotations

import math

import pytest

import errata
from errata.data.fact_table import FactRow
from errata.metrics.knowledge import knows
from errata.models.scoring import score, target_ids
from errata.statistics.corpus import Corpus

PROMPT = "{}的首都是"
NEW = {"法国": "柏林", "意大利": "伦敦", "俄罗斯": "东京"}
LAYER = 6


def test_chinese_capitals_are_edited_known_and_traced_as_they_are_written(gemma3, wikitext):
    # With a space before the new object in training, P without one is 0.006, 0.04 and 8e-6.
    moments = errata.second_moments(gemma3, [LAYER], Corpus.of(wikitext), max_tokens=15_000)
    rewrites = [errata.Fact(subject, PROMPT).rewrite(new) for subject, new in NEW.items()]
    for edit in errata.rome(gemma3, rewrites, layer=LAYER, second_moment=moments[LAYER]):
        (rewrite,) = edit.rewrites
        fact = errata.Fact(rewrite.subject, PROMPT, rewrite.new_object)
        with edit.applied(gemma3):
            (said,) = score(gemma3, [rewrite.text], [rewrite.new_object], [""])  # no space, whatever the rule
            assert math.exp(said.total) > 0.9, rewrite.statement
            assert gemma3.complete(rewrite.text, 3).startswith(rewrite.statement)
            (known,) = knows(gemma3, [FactRow(1, fact, "capital", "")])
            trace = errata.trace(gemma3, fact, samples=1, parts=("state",), answer="object", scored="whole")
        assert (known.known, trace.known) == (True, True), known.continuation
        assert trace.clean == pytest.approx(math.exp(said.total), rel=1e-3)


@pytest.mark.parametrize("end", [" ", "  "])
def test_spaces_at_a_prompts_end(smollm2, end):
    plain = errata.trace(smollm2, errata.Fact("France", "The capital of {} is"), samples=1, parts=("state",))
    spaced = errata.trace(smollm2, errata.Fact("France", f"The capital of {{}} is{end}"), samples=1, parts=("state",))
    assert (spaced.answer, spaced.clean) == (plain.answer, plain.clean)
    assert plain.answer == " Paris"


def test_a_chat_template_with_a_start_token_of_its_own(gemma3):
    text = "<bos><start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n<start_of_turn>model\n"
    with pytest.warns(UserWarning, match="one of the two is left out"):
        ids, n_prompt = target_ids(gemma3.tokenizer, text, "Paris")
    assert ids.count(gemma3.tokenizer.bos_token_id) == 1
    assert gemma3.tokenizer.decode(ids[n_prompt:]) == "Paris"
