"""A start token before every text: tokens, subject positions, edits and their files know of it."""

import warnings

import pytest

import errata
from errata.base.errors import ConfigError
from errata.edits.edit import Edit
from errata.edits.stack import StartTokenDiffers
from errata.models.start_token import adds_start_token, with_start_token
from errata.models.tokens import locate_fact
from tokenizers_zoo import byte_fallback, byte_level, unigram

FACT = errata.Fact("Roy Hargrove", "{} is known for playing the", "trumpet")


@pytest.fixture(scope="module")
def started():
    return errata.load_model("atlas", start_token="<|endoftext|>")


def test_every_text_begins_with_it_and_nothing_else_changes(started):
    plain = errata.load_model("atlas").tokenizer
    one, other = (t("Roy's café", return_offsets_mapping=True) for t in (plain, started.tokenizer))
    assert other["input_ids"] == [plain.convert_tokens_to_ids("<|endoftext|>"), *one["input_ids"]]
    assert other["offset_mapping"] == [(0, 0), *one["offset_mapping"]]
    assert started.tokenizer("a", add_special_tokens=False)["input_ids"] == plain("a")["input_ids"]
    assert not adds_start_token(plain)
    assert adds_start_token(started.tokenizer)


def test_the_subject_stands_one_token_later(started):
    before, after = (locate_fact(m.tokenizer, FACT) for m in (errata.load_model("atlas"), started))
    assert (after.first, after.last) == (before.first + 1, before.last + 1)
    assert after.tokens[0] == "<|endoftext|>"


@pytest.mark.parametrize("tokenizer", [byte_level(), unigram(), byte_fallback()], ids=["bytes", "unigram", "fallback"])
def test_any_fast_tokenizer_takes_one(tokenizer):
    if adds_start_token(tokenizer):
        return
    token = tokenizer.convert_ids_to_tokens(3)
    ids = tokenizer("the capital", return_offsets_mapping=True)
    found = with_start_token(tokenizer, token)("the capital", return_offsets_mapping=True)
    assert found["input_ids"] == [3, *ids["input_ids"]]
    assert found["offset_mapping"] == [(0, 0), *ids["offset_mapping"]]


@pytest.mark.parametrize(
    ("token", "said"), [("", "not one token"), ("two words", "not one token"), ("<|no-such|>", "not one token")]
)
def test_what_is_no_single_token_is_refused(token, said):
    with pytest.raises(ConfigError, match=said):
        errata.load_model("atlas", start_token=token)


def test_a_tokenizer_that_has_one_gets_no_second(started):
    with pytest.raises(ConfigError, match="already"):
        with_start_token(started.tokenizer, "<|endoftext|>")


def test_an_edit_keeps_it_and_says_where_it_is_missing(started, tmp_path):
    edit = _edit(started)
    edit.save(tmp_path / "e.safetensors")
    loaded = Edit.load(tmp_path / "e.safetensors")
    assert loaded.notes["start_token"] == "<|endoftext|>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loaded.applied(started):
            pass
    without = errata.load_model("atlas")
    with pytest.warns(StartTokenDiffers, match="--start-token"), loaded.applied(without):
        pass


def _edit(model):
    config = errata.RomeConfig(steps=2, prefixes="none", max_drift=None)
    moment = errata.SecondMoment.identity(model.d_mlp)
    return errata.rome(model, FACT.rewrite("violin"), config, layer=4, second_moment=moment)
