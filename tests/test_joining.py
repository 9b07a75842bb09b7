"""What stands between a prompt and what completes it, and between a sentence and a prompt, in any script."""

from __future__ import annotations

import pytest

from errata.base.errors import FactError
from errata.base.facts import Fact, as_plain
from errata.base.text import after_sentence, ended, joined, moved_spaces, separator
from errata.models.scoring import score, target_ids
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
    from test_scoring import model_of

    model = model_of("gpt2")
    prompts, targets = ["The Space", "The Space", "東京の"], ["Needle", "Needle", "京"]
    glued, apart, plain = (each.total for each in score(model, prompts, targets, ["", None, None]))
    assert glued != pytest.approx(apart)
    assert glued == pytest.approx(score(model, ["The Space"], ["Needle"], [""])[0].total, rel=1e-5)
    assert plain == pytest.approx(score(model, ["東京の"], ["京"], [""])[0].total, rel=1e-5)
    with pytest.raises(FactError, match="3 prompts and 1 separators"):
        score(model, prompts, targets, [None])
