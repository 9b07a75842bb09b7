"""What stands between a prompt and what completes it, and between a sentence and a prompt, in any script."""

from __future__ import annotations

import pytest
import torch

from errata.base.errors import FactError
from errata.base.facts import Fact, as_plain
from errata.base.text import after_sentence, ended, joined, moved_spaces, phrase, separator
from errata.editors.rome.config import RomeConfig
from errata.editors.rome.contexts import Context
from errata.editors.rome.texts import texts_of
from errata.editors.texts import text_of
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.metrics.requests import Request
from errata.models.generation import generate
from errata.models.scoring import score, target_ids
from errata.models.tokens import after_prefix, encode, locate
from errata.tracing.config import TraceConfig
from errata.tracing.result import load_traces
from errata.tracing.tokenized import tokenize_fact
from errata.tracing.trace import trace
from helpers.models import shared_model
from tiny import byte_tokenizer, llama_tokenizer
from tokenizers_zoo import byte_fallback, byte_level, gpt2_tokenizer, unigram

APART = [  # written with a space
    ("The capital of France is", "Paris"),
    ("Столица Франции —", "Париж"),
    ("Столица Франции это", "Париж"),
    ("η πρωτεύουσα είναι η", "Αθήνα"),
    ("عاصمة فرنسا هي", "باريس"),
    ("בירת צרפת היא", "פריז"),
    ("फ़्रांस की राजधानी", "पेरिस"),
    ("프랑스의 수도는", "파리"),
    ("Thủ đô của Pháp là", "Paris"),
    ("የፈረንሳይ ዋና ከተማ", "ፓሪስ"),
    ("ქვეყნის დედაქალაქია", "თბილისი"),
    ("In Japanese, Tokyo is", "東京"),
    ("Answer:", "Paris"),
    ("In France,", "Paris"),
    ("Where is it?", "Paris"),
    ("He said “yes” to", "Paris"),
    ("It is called “Paris”", "there"),
    ('the "Eiffel Tower"', "stands"),
    ("the 'Eiffel Tower'", "stands"),
    ("die Zeitung „Der Spiegel“", "ist"),
    ("le journal « Le Monde »", "est"),
    ("Paris (France)", "is"),
    ("the Beatles'", "singer"),
    ("x =", "5"),
    ("1 + 1 =", "2"),
    ("France →", "Paris"),
    ("France -", "Paris"),
    ("the year 19.", "It"),
    ("5 $", "more"),
    ("10 %", "more"),
    ("C#", "is"),
    ("**France**", "is"),
    ("the framework is", ".NET"),
    ("the price is", "$5"),
    ("the range is", "(0, 1)"),
]
TOGETHER = [  # written without one
    ("法国的首都是", "巴黎"),
    ("法国的首都是", "Paris"),
    ("法国的首都：", "巴黎"),
    ("问:法国的首都? 答:", "巴黎"),
    ("他出生于19", "世纪"),
    ("フランスの首都は", "パリ"),
    ("その車はトヨタのカー", "です"),
    ("東京は「", "日本の首都"),
    ("ประเทศฝรั่งเศสมีเมืองหลวงคือ", "ปารีส"),
    ("ເມືອງຫຼວງຂອງຝຣັ່ງແມ່ນ", "ປາຣີ"),
    ("រដ្ឋធានីរបស់បារាំងគឺ", "ប៉ារីស"),
    ("ပြင်သစ်နိုင်ငံ၏မြို့တော်မှာ", "ပါရီ"),
    ("ཕ་རན་སིའི་རྒྱལ་ས་ནི་", "པ་རི"),
    ("x=", "5"),
    ("f(", "x"),
    ("[", "x"),
    ("Paris/", "France"),
    ("https://", "example.org"),
    ('He said "', "yes"),
    ('{"capital": "', "Paris"),
    ("He said “", "yes"),
    ("Il dit «", "oui"),
    ("The capital is **", "Paris"),
    ("run `", "ls"),
    ("la capitale de l'", "Italie"),
    ("la capitale de l’", "Italie"),
    ("la capitale dell'", "Italia"),
    ("Franco-", "German"),
    ("the temperature is -", "5"),
    ("costs $", "5"),
    ("¿", "Dónde"),
    ("user@", "example.org"),
    ("snake_", "case"),
    ("<|assistant|>", "Paris"),
    ("<|im_start|>assistant\n", "Paris"),
    ("Answer:\n", "Paris"),
    ("Answer:\t", "Paris"),
    ("首都は\u3000", "パリ"),
    ("", "Paris"),
    ("It is Paris", ", France"),
    ("It is Paris", "."),
    ("(Paris", ")"),
    ("Paris", "'s river"),
]


@pytest.mark.parametrize(("before", "after"), APART)
def test_a_space_where_a_writer_puts_one(before, after):
    assert (separator(before, after), joined(before, after)) == (" ", f"{before} {after}")


@pytest.mark.parametrize(("before", "after"), TOGETHER)
def test_none_where_a_writer_puts_none(before, after):
    assert joined(before, after) == before + after


def test_what_is_named_goes_before_the_text():
    assert joined("法国的首都是", "柏林", " ") == "法国的首都是 柏林"
    assert joined("The capital is", "Berlin", "") == "The capital isBerlin"
    assert joined("Answer:", "Berlin", "\n") == "Answer:\nBerlin"
    assert joined("Answer:", "\tBerlin", "") == "Answer:\tBerlin"  # what begins with white space is taken as it is


@pytest.mark.parametrize(
    ("sentence", "text", "whole"),
    [
        ("It rained. ", "The Louvre is", "It rained. The Louvre is"),
        ("It rained.", "The Louvre is", "It rained. The Louvre is"),
        ("", "法国的首都是", "法国的首都是"),
        ("It rained. ", "法国的首都是", "It rained。法国的首都是"),
        ("It rained. ", "《红楼梦》的作者是", "It rained。《红楼梦》的作者是"),
        ("下雨了。", "法国的首都是", "下雨了。法国的首都是"),
        ("It rained. ", "ประเทศไทย", "It rained.ประเทศไทย"),
        ("It rained. ", "भारत की राजधानी", "It rained. भारत की राजधानी"),
        ("Where is it?\n", "The Louvre is", "Where is it?\nThe Louvre is"),
    ],
)
def test_a_prompt_after_a_sentence(sentence, text, whole):
    assert after_sentence(sentence, text) == whole


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It rained", "It rained. "),
        ("下雨了", "下雨了。"),
        ("雨が降ったー", "雨が降ったー。"),
        ("बारिश", "बारिश। "),
        ("42", "42. "),
    ],
)
def test_a_sentence_ends_as_its_script_has_it(text, whole):
    assert ended(text) == whole


# ---- facts --------------------------------------------------------------------------------------------


def test_a_fact_is_written_as_its_text_asks():
    assert Fact("法国", "{}的首都是", "巴黎").statement == "法国的首都是巴黎"
    assert Fact("France", "The capital of {} is", "Paris").statement == "The capital of France is Paris"
    assert Fact("法国", "{}的首都是", "巴黎").rewrite("柏林").statement == "法国的首都是柏林"


def test_a_separator_that_is_named_is_kept_by_the_rewrite():
    fact = Fact("France", "capital[{}] is", "Paris", separator="")
    assert fact.statement == "capital[France] isParis"
    assert fact.rewrite("Rome").statement == "capital[France] isRome"
    assert Fact(*fact.as_list()) == fact
    assert as_plain(fact.rewrite("Rome"))["fact"]["separator"] == ""
    assert "separator" not in as_plain(Fact("France", "{} is", "x"))


def test_white_space_before_an_object_is_taken_as_it_is():
    assert Fact("法国", "{}的首都是", " 巴黎 ").object == " 巴黎"
    assert Fact("法国", "{}的首都是", "巴黎").rewrite(" 柏林\n").statement == "法国的首都是 柏林"
    # where the text asks for the same, the object is its name alone
    assert Fact("France", "{} is", " Paris") == Fact("France", "{} is", "Paris")
    assert Fact("France", "{} is", "x").rewrite(" Paris") == Fact("France", "{} is", "x").rewrite("Paris")
    assert Fact("France", "{} is", "\nParis").statement == "France is\nParis"


def test_spaces_at_the_end_of_a_prompt_stand_before_the_object():
    fact = Fact("France", "The capital of {} is ", "Paris")
    assert (fact.prompt, fact.text, fact.separator) == ("The capital of {} is", "The capital of France is", " ")
    assert fact.statement == "The capital of France is Paris"
    assert Fact("法国", "{}的首都是 ", "巴黎").statement == "法国的首都是 巴黎"
    assert Fact("Ann ", "Here is {} ", "now").statement == "Here is Ann  now"
    assert Fact("France", "Q: {}?\nA:\n", "Paris").text == "Q: France?\nA:\n"  # a line's end is a token of its own
    assert moved_spaces("  ") == ("  ", "")


@pytest.mark.parametrize("wrong", ["-", " and ", 0, True])
def test_what_is_no_separator(wrong):
    with pytest.raises(FactError, match="the separator is"):
        Fact("France", "{} is", "Paris", separator=wrong)


# ---- tokens -------------------------------------------------------------------------------------------

ZOO = {
    "gpt2": gpt2_tokenizer,
    "byte_level": byte_level,
    "unigram": unigram,
    "byte_fallback": byte_fallback,
    "bytes": byte_tokenizer,
    "llama": llama_tokenizer,
}


def parts(tokenizer, prompt: str, target: str, separator: str | None = None) -> tuple[list[int], list[int]]:
    ids, n_prompt = target_ids(tokenizer, prompt, target, separator)
    return ids[:n_prompt], ids[n_prompt:]


@pytest.mark.parametrize("name", ZOO)
def test_a_target_in_a_script_without_spaces_is_its_own_tokens_alone(name):
    tokenizer = ZOO[name]()
    before, after = parts(tokenizer, "東京カ", "東")
    assert [*before, *after] == tokenizer("東京カ東")["input_ids"]
    assert before == tokenizer("東京カ")["input_ids"]
    assert tokenizer.decode(after) == "東"


@pytest.mark.parametrize("name", ZOO)
def test_spaces_at_a_prompts_end_change_nothing(name):
    tokenizer = ZOO[name]()
    assert parts(tokenizer, "The Space Needle is in ", "The") == parts(tokenizer, "The Space Needle is in", "The")
    assert parts(tokenizer, "The Space Needle is in", " The") == parts(tokenizer, "The Space Needle is in", "The")


@pytest.mark.parametrize("name", ZOO)
def test_after_a_special_token_that_is_written_out_there_is_no_space(name):
    tokenizer = ZOO[name]()
    marker = tokenizer.bos_token
    before, after = parts(tokenizer, f"The {marker}", "The")
    assert [*before, *after] == tokenizer(f"The {marker}The")["input_ids"]
    assert before[-1] == tokenizer.bos_token_id


def test_an_override_decides():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(parts(tokenizer, "The Space", "Needle", "")[1]) == "Needle"
    assert tokenizer.decode(parts(tokenizer, "東京の", "京", " ")[1]) == " 京"


def test_scores_take_separators():

    model = shared_model("gpt2")
    prompts, targets = ["The Space", "The Space", "東京の"], ["Needle", "Needle", "京"]
    glued, apart, plain = (each.total for each in score(model, prompts, targets, ["", None, None]))
    assert glued != pytest.approx(apart)
    assert glued == pytest.approx(score(model, ["The Space"], ["Needle"], [""])[0].total, rel=1e-5)
    assert plain == pytest.approx(score(model, ["東京の"], ["京"], [""])[0].total, rel=1e-5)
    with pytest.raises(FactError, match="3 prompts and 1 separators"):
        score(model, prompts, targets, [None])


# ---- the rest of the package agrees ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Cairo.\nThe next", "Cairo"),
        (" the city of Cairo, which lies", "the city of Cairo"),
        (" St. Petersburg. It is", "St. Petersburg"),
        (" 1,000,000 people. It", "1,000,000 people"),
        (" 3.5 million", "3.5 million"),
        ("开罗。埃及是", "开罗"),
        ("「カイロ」です", "カイロ"),
        ("\n\nCairo\n", "Cairo"),
        (' "The Godfather" and', "The Godfather"),
        (".", ""),
    ],
)
def test_where_an_answer_ends(text, answer):
    assert phrase(text) == answer


def test_models_go_on_from_the_text_before_a_prompts_last_spaces():

    model = shared_model("gpt2")
    prompt = "The Space Needle is in"
    (plain,) = generate(model, [prompt], 8, greedy=True)
    for spaces in (" ", "   "):
        (whole,) = generate(model, [prompt + spaces], 8, greedy=True)
        assert whole.startswith(prompt + spaces)
        assert whole.removeprefix(prompt).lstrip(" ") == plain.removeprefix(prompt).lstrip(" ")
    assert generate(model, ["Rome\n"], 4, greedy=True)[0].startswith("Rome\n")


def traced(model, fact: Fact, **settings):
    return trace(model, fact, samples=1, parts=("state",), noise="0.5", **settings)


def test_a_trace_reads_no_space_at_a_prompts_end():

    model = shared_model("gpt2")
    plain, spaced = (traced(model, Fact("The Louvre", prompt)) for prompt in ("{} is in", "{} is in  "))
    assert (plain.tokens, plain.answer, plain.clean) == (spaced.tokens, spaced.answer, spaced.clean)
    assert spaced.fact.separator == "  "


@pytest.mark.parametrize(
    "fact",
    [
        Fact("東京", "{}カ", "京"),
        Fact("東京", "{}カ", "京", separator=" "),
        Fact("Rome", "{} is", "Paris"),
        Fact("Rome", "{}-", "Paris"),
        Fact("Rome", "{} is\n", "Paris"),
    ],
)
def test_what_is_scored_traced_and_edited_is_one_text(fact):

    model = shared_model("gpt2")
    ids, n_prompt = target_ids(model.tokenizer, fact.text, fact.object, fact.separator)
    assert ids == model.tokenizer(fact.statement)["input_ids"]
    tokenized = tokenize_fact(model, fact, TraceConfig(answer="object", scored="whole"))
    assert [*tokenized.span.ids, *tokenized.target] == ids
    trained = text_of(model, fact.text, fact.object, fact.separator)
    assert [*trained.ids, trained.targets[-1]] == ids
    context, *_ = texts_of(model, [fact.rewrite(fact.object)], [""], RomeConfig(kl_factor=0))
    assert [*context.ids, context.targets[-1]] == ids
    (asked,) = Request(fact.text, (fact.object,), fact.separator).rows(model)
    assert asked == (ids, n_prompt)


def test_a_prefix_leaves_the_tokens_of_a_subject_without_spaces():
    for name in ("unigram", "byte_fallback", "llama", "bytes"):
        tokenizer = ZOO[name]()
        context = Context.of(Fact("東京", "{}カ", "京"), "It rained. ", tokenizer)
        span = locate(tokenizer, context.text, context.start, context.subject)
        assert "".join(span.tokens[span.first : span.last + 1]).replace(" ", "")[:1] == "東", name
        assert not any(token == " " for token in span.tokens[span.first - 1 : span.last + 1]), (name, span.tokens)


def test_an_edit_keeps_its_separator_and_old_files_have_none(tmp_path):

    model = shared_model("gpt2")
    fact = Fact("Rome", "{} is", "Paris", separator="")
    name = "transformer.h.0.mlp.c_proj.weight"
    delta = RankOne(name, torch.ones(16), torch.ones(24))
    edit = Edit.of(model, [delta], "test", [fact.rewrite("Oslo")])
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").rewrites == (fact.rewrite("Oslo"),)
    plain = Edit.of(model, [delta], "test", [Fact("Rome", "{} is", "Paris").rewrite("Oslo")])
    assert "separator" not in str(plain.header()["rewrites"])


def test_a_trace_keeps_its_separator(tmp_path):

    found = traced(shared_model("gpt2"), Fact("Rome", "{} is", "Paris", separator="\n"))
    found.save(tmp_path / "trace.jsonl")
    assert load_traces(tmp_path / "trace.jsonl")[0].fact == found.fact


# ---- a start token that is written out -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "byte_level", "unigram", "byte_fallback"])
def test_a_start_token_that_the_text_has_is_not_doubled(name):
    tokenizer = ZOO[name]()
    start = tokenizer.bos_token
    text = f"{start}The Space Needle is in"
    with pytest.warns(UserWarning, match="one of the two is left out"):
        encoded = encode(tokenizer, text, return_offsets_mapping=True)
    plain = tokenizer("The Space Needle is in", return_offsets_mapping=True)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
    assert len(encoded["offset_mapping"]) == len(encoded["input_ids"])
    if name in ("byte_level",):
        assert encoded["input_ids"] == plain["input_ids"]
    with pytest.warns(UserWarning, match="left out"):
        ids, _ = target_ids(tokenizer, text, "The")
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.warns(UserWarning, match="left out"):
        span = locate(tokenizer, text, text.index("Needle"), "Needle")
    assert "".join(span.tokens[span.first : span.last + 1]).strip() == "Needle"


@pytest.mark.parametrize("name", ["llama", "byte_level", "unigram", "byte_fallback"])
def test_a_prefix_goes_behind_a_start_token_that_is_written_out(name):
    tokenizer = ZOO[name]()
    start = tokenizer.bos_token
    assert after_prefix(tokenizer, "It rained. ", f"{start}The Space is") == f"{start}It rained. The Space is"
    assert after_prefix(tokenizer, "It rained. ", "The Space is") == "It rained. The Space is"
    assert after_prefix(byte_tokenizer(), "It rained. ", "<|endoftext|>x") == "It rained. <|endoftext|>x"
    context = Context.of(Fact("Needle", start + "The {} is"), "It rained. ", tokenizer)
    assert context.text[context.start :].startswith("Needle is")


def test_a_start_token_that_the_tokenizer_does_not_add_is_kept():
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, "<|endoftext|>Rome")["input_ids"] == tokenizer("<|endoftext|>Rome")["input_ids"]
    doubled = encode(tokenizer, "<|endoftext|><|endoftext|>Rome")["input_ids"]  # as it is written
    assert doubled.count(tokenizer.bos_token_id) == 2
