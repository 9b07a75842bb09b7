"""Edits as adapters and as whole models: what PEFT and transformers load says what the applied edit says."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import errata
import errata.atlas
from errata.base.errors import ConfigError, EditFileError, EditMismatch, OutputError
from errata.base.tensor_files import read_tensors, write_tensors
from errata.edits import Dense, Edit, LowRank, RankOne, lora, save_merged
from errata.models import weights
from errata.models.loading import load_pretrained
from errata.models.model import Model
from errata.models.saving import save_pretrained
from helpers.adapters import apart, logits
from helpers.edits import REWRITE, down, random_edit
from helpers.models import digests, fresh_model
from tiny import ALL_FAMILIES, byte_tokenizer, tiny

CASES = [(family, tied) for family in ALL_FAMILIES for tied in (False, True)]


def several(model):
    """Two edits of one layer, the second made with the first on, and one of another layer, as one edit."""
    first, third = random_edit(model, 1), random_edit(model, 3, layer=2)
    with first.applied(model):
        second = random_edit(model, 2)
    return Edit.combine([first, second, third], model)


def with_peft(model, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), folder)


# ---- the whole way, in every family ----


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_whole_way_in_float32(family, tied, tmp_path):
    model = fresh_model(family, tie_word_embeddings=tied)
    before, plain = digests(model), logits(model.hf)
    edit = several(model)
    edit.save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors")
    assert set(edit.to_lora(tmp_path / "adapter").values()) == {0.0}
    with edit.applied(model):
        wanted = logits(model.hf)
        save_merged(model, tmp_path / "merged")
    assert digests(model) == before
    assert apart(plain, wanted) > 1e-2
    assert apart(logits(with_peft(model, tmp_path / "adapter")), wanted) < 1e-5
    with Edit.from_lora(tmp_path / "adapter", model).applied(model):
        assert apart(logits(model.hf), wanted) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), wanted)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_whole_way_in_bfloat16(family, tied, tmp_path):
    # From disk: a live model that is cast has its rotary frequencies rounded too, a loaded one has not.
    save_pretrained(fresh_model(family, torch.bfloat16, tie_word_embeddings=tied), tmp_path / "plain")
    model = load_pretrained(tmp_path / "plain")
    before, plain = digests(model), logits(model.hf)
    edit = several(model)
    edit.save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors")
    edit.to_lora(tmp_path / "adapter")
    with edit.applied(model):
        wanted = logits(model.hf)
        save_merged(model, tmp_path / "merged")
    assert digests(model) == before
    assert apart(plain, wanted) > 0.05
    adapted = with_peft(model, tmp_path / "adapter")
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    assert apart(logits(adapted), wanted) < 0.05  # the adapter is never rounded to bfloat16, the weight is
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(logits(merged), wanted)


# ---- writing an adapter ----


def test_an_adapter_names_whole_modules_and_the_rank_of_each(tmp_path):
    model = fresh_model(layers=12)
    parts = [random_edit(model, seed, layer).deltas[0] for seed, layer in enumerate((11, 1, 1, 2))]
    parts.append(LowRank(down(model, 2), torch.randn(16, 3), torch.randn(3, 24)))
    edit = Edit.of(model, parts, "test")
    edit.to_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    names = [down(model, layer).removesuffix(".weight") for layer in (11, 1, 2)]
    assert config["target_modules"] == names
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {names[0]: 1, names[1]: 2}
    assert config["fan_in_fan_out"]
    assert config["base_model_name_or_path"] == "gpt2"
    adapted = with_peft(model, tmp_path / "a")
    with edit.applied(model):
        assert apart(logits(adapted), logits(model.hf)) < 1e-5
    assert [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")] == [
        f"base_model.model.{name}.lora_A.default" for name in sorted(names, key=len)
    ]


def test_a_rank_one_edit_comes_back_as_itself(tmp_path):
    model = fresh_model(layers=11)
    edit = Edit.of(model, [random_edit(model, layer=n).deltas[0] for n in (2, 10)], "test", [REWRITE])
    edit.to_lora(tmp_path / "a", model=model)
    assert Edit.from_lora(tmp_path / "a", model) == edit
    edit = several(model)
    edit.to_lora(tmp_path / "b")
    back = Edit.from_lora(tmp_path / "b", model)
    assert [type(delta) for delta in back.deltas] == [LowRank, RankOne]
    assert back.rewrites == edit.rewrites
    assert back.restricted([2], model).weights == (down(model, 2),)


def test_scaled_and_restricted_edits_are_written_as_they_are(tmp_path):
    model = fresh_model("llama")
    edit = several(model).restricted([1], model).scaled(0.5)
    edit.to_lora(tmp_path / "a")
    with edit.applied(model):
        wanted = logits(model.hf)
    assert apart(logits(with_peft(model, tmp_path / "a")), wanted) < 1e-5


def test_a_dense_change_is_refused_or_truncated_and_told(tmp_path):
    model = fresh_model()
    edit = random_edit(model, dense=True)
    with pytest.raises(ConfigError, match=r"dense.*give a rank"):
        edit.to_lora(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    residuals = edit.to_lora(tmp_path / "a", rank=5)
    singular = torch.linalg.svdvals(edit.deltas[0].matrix().double())
    wanted = float(singular[5:].norm() / singular.norm())
    assert residuals == {down(model): pytest.approx(wanted, rel=1e-5)}
    assert edit.to_lora(tmp_path / "a", rank=16)[down(model)] < 1e-6
    adapted = logits(with_peft(model, tmp_path / "a"))
    with edit.applied(model):
        assert apart(adapted, logits(model.hf)) < 1e-5


def test_a_shared_head_can_be_merged_but_is_no_adapter(tmp_path):
    for tied in (True, False):
        model = fresh_model(tie_word_embeddings=tied)
        d_out, d_in = weights.matrix(model, "lm_head.weight").shape
        edit = Edit.of(model, [RankOne("lm_head.weight", torch.randn(d_out), torch.randn(d_in))], "test")
        if tied:
            for given in (None, model):
                with pytest.raises(ConfigError, match="shared"):
                    edit.to_lora(tmp_path / "a", model=given)
        else:
            edit.to_lora(tmp_path / "a")
            adapted = logits(with_peft(model, tmp_path / "a"))
        with edit.applied(model):
            save_merged(model, tmp_path / str(tied))
            wanted = logits(model.hf)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))), wanted)
    assert apart(adapted, wanted) < 1e-5


def test_an_adapter_replaces_one_of_ours_and_nothing_else(tmp_path):
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2)
    first.to_lora(tmp_path / "new" / "a")
    second.to_lora(tmp_path / "new" / "a")
    assert Edit.from_lora(tmp_path / "new" / "a", model) == second
    assert os.listdir(tmp_path / "new") == ["a"]
    (tmp_path / "new" / "a" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    peft.get_peft_model(fresh_model("llama").hf, peft.LoraConfig(target_modules=["down_proj"])).save_pretrained(
        tmp_path / "theirs"
    )
    for place in ("new/a", "file", "theirs"):
        with pytest.raises(OutputError, match="cannot write"):
            first.to_lora(tmp_path / place)
    (tmp_path / "new" / "a" / "mine.txt").unlink()
    assert Edit.from_lora(tmp_path / "new" / "a", model) == second


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "pathlib.Path.write_text", "os.replace"])
def test_on_a_full_disk_the_old_adapter_stays(tmp_path, monkeypatch, where):
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2)
    first.to_lora(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(where, no_room)
        with pytest.raises(OutputError, match="No space left"):
            second.to_lora(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert Edit.from_lora(tmp_path / "a", model) == first


def test_if_the_second_of_two_renames_fails_the_old_adapter_is_put_back(tmp_path, monkeypatch):
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2)
    first.to_lora(tmp_path / "a")
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        return no_room() if len(calls) == 2 else replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(OutputError, match="No space left"):
            second.to_lora(tmp_path / "a")
    assert len(calls) == 3
    assert os.listdir(tmp_path) == ["a"]
    assert Edit.from_lora(tmp_path / "a", model) == first


# ---- a whole model ----


def test_a_merged_model_tells_its_edits_and_has_its_tokenizer(tmp_path):
    model = fresh_model()
    first, second = random_edit(model, 1), random_edit(model, 2)
    with first.applied(model), second.applied(model):
        save_merged(model, tmp_path / "m")
    told = json.loads((tmp_path / "m" / "errata.json").read_text())
    assert told["model"] == "gpt2"
    assert [each["id"] for each in told["edits"]] == [first.id, second.id]
    assert told["edits"][0]["rewrites"][0]["new_object"] == "Paris"
    text = "The Space Needle"
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    with pytest.raises(OutputError, match="holds other things"):
        save_merged(model, tmp_path / "m")


@pytest.mark.parametrize("where", ["transformers.modeling_utils.safe_save_file", "os.replace"])
def test_on_a_full_disk_there_is_no_half_a_model(tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(where, no_room)
        with pytest.raises(OutputError, match="No space left"):
            save_merged(fresh_model(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


# ---- reading adapters of others ----


def theirs(model, folder, **settings):
    """An adapter that PEFT wrote, all of it random; its logits."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(copy.deepcopy(model.hf), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    adapted.save_pretrained(folder)
    return logits(adapted)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["down_proj"]},
        {"target_modules": ["down_proj", "q_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "r": 1},
        {
            "target_modules": ["down_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\..*": 2, "up_proj": 3},
            "alpha_pattern": {"layers.2.mlp.down_proj": 5},
        },
    ],
)
def test_a_plain_adapter_of_pefts_is_an_edit(tmp_path, settings):
    model = fresh_model("llama")
    before = digests(model)
    wanted = theirs(model, tmp_path / "a", **settings)
    edit = Edit.from_lora(tmp_path / "a", model)
    assert edit.method == "lora"
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").applied(model):
        assert apart(logits(model.hf), wanted) < 1e-5
    assert digests(model) == before


def test_adapters_of_gpt2s_transposed_layers_are_read(tmp_path):
    model = fresh_model("gpt2")
    wanted = theirs(model, tmp_path / "a", target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    with Edit.from_lora(tmp_path / "a", model).applied(model):
        assert apart(logits(model.hf), wanted) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*not a part of a low-rank change"),
        ({"trainable_token_indices": [1]}, "embeddings of tokens"),
        ({"init_lora_weights": "pissa"}, "the weight itself"),
    ],
)
def test_what_is_more_than_low_rank_is_refused_with_its_reason(tmp_path, settings, says):
    model = fresh_model("llama")
    theirs(model, tmp_path / "a", **{"target_modules": ["down_proj"], **settings})
    with pytest.raises(EditFileError, match=says) as caught:
        Edit.from_lora(tmp_path / "a", model)
    assert "\n" not in str(caught.value)


def reconfigured(folder, **changes):
    path = folder / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / lora.TENSORS).rename(folder / "adapter_model.bin"), "can run code"),
        (lambda folder: (folder / lora.TENSORS).write_bytes(b"cut"), "not a whole safetensors"),
        (lambda folder: (folder / lora.CONFIG).unlink(), "there is no adapter_config.json"),
        (lambda folder: (folder / lora.CONFIG).write_text("{"), "config of an adapter"),
        (lambda folder: (folder / lora.CONFIG).write_text("[]"), "config of an adapter"),
        (lambda folder: reconfigured(folder, peft_type="IA3"), "'IA3'"),
        (lambda folder: reconfigured(folder, r="four"), "broken"),
        (lambda folder: reconfigured(folder, r=3), "rank 4, 3 by"),
        (lambda folder: reconfigured(folder, rank_pattern={"(": 4}), "broken"),
        (lambda folder: save_file({}, folder / lora.TENSORS), "changes nothing"),
        (lambda folder: without_b(folder), "broken"),
    ],
)
def test_a_broken_adapter_is_refused_in_one_line(tmp_path, damage, says):
    model = fresh_model("llama")
    theirs(model, tmp_path / "a", target_modules=["down_proj"])
    damage(tmp_path / "a")
    with pytest.raises(EditFileError, match=says) as caught:
        Edit.from_lora(tmp_path / "a", model)
    assert "\n" not in str(caught.value)


def without_b(folder):
    tensors = load_file(folder / lora.TENSORS)
    save_file({name: t for name, t in tensors.items() if "lora_A" in name}, folder / lora.TENSORS)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    theirs(fresh_model("llama"), tmp_path / "a", target_modules=["down_proj"])
    with pytest.raises(EditMismatch, match="no weight named"):
        Edit.from_lora(tmp_path / "a", fresh_model("gpt2"))
    with pytest.raises(EditMismatch, match=r"is \[16, 20\]"):
        Edit.from_lora(tmp_path / "a", fresh_model("llama", intermediate_size=20))
    edit = random_edit(fresh_model("llama"))
    edit.to_lora(tmp_path / "ours")
    other = fresh_model("llama", seed=1)
    with pytest.raises(EditMismatch, match="made for other weights"):
        Edit.from_lora(tmp_path / "ours", other).apply(other)


def test_a_dense_change_of_a_zero_matrix_has_no_residual():
    zero = Dense("w", torch.zeros(3, 4))
    assert zero.residual(zero.truncated(1)) == 0.0


# ---- the base that an adapter names ----


def test_an_adapter_alone_is_enough_to_load_the_edited_model(tmp_path, monkeypatch):
    """PEFT finds the base by what is written in the folder, wherever the edit was made and saved."""
    model = fresh_model()
    model.hf.save_pretrained(tmp_path / "deep" / "base")
    model.tokenizer.save_pretrained(tmp_path / "deep" / "base")
    monkeypatch.chdir(tmp_path / "deep")
    loaded = load_pretrained("base")
    edit = random_edit(loaded)
    assert edit.source == {"path": str(tmp_path / "deep" / "base")}
    edit.save(tmp_path / "e.safetensors")
    monkeypatch.chdir(tmp_path)
    edit = Edit.load(tmp_path / "e.safetensors")
    assert edit.source == {"path": str(tmp_path / "deep" / "base")}
    for number, changed in enumerate((edit, edit.scaled(2), Edit.combine([edit, random_edit(loaded, seed=5)]))):
        folder = tmp_path / f"adapter{number}"
        changed.to_lora(folder)
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        with changed.applied(loaded):
            assert apart(logits(adapted), logits(loaded.hf)) < 1e-5


def test_the_atlas_is_named_by_its_folder(tmp_path):
    atlas = errata.load_model()
    edit = random_edit(atlas)
    edit.to_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(errata.atlas.weights_folder())
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with edit.applied(atlas), torch.no_grad():
        assert apart(adapted(ids).logits, atlas.hf(ids).logits) < 1e-5


def test_a_model_of_the_hub_is_named_by_its_id_and_revision(tmp_path):
    hf = tiny("gpt2")
    hf.config._name_or_path, hf.config._commit_hash = "someone/model", "0123abc"
    model = Model(hf, byte_tokenizer(), "model")
    edit = random_edit(model)
    assert edit.source == {"hub": "someone/model", "revision": "0123abc"}
    edit.to_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/model", "0123abc")
    assert Edit.from_lora(tmp_path / "a", model).source == edit.source


def test_where_a_model_came_from_is_no_part_of_an_edit(tmp_path):
    """The same edit has one id everywhere; files from before models kept their source are read."""
    model = fresh_model()
    edit = random_edit(model)
    assert edit.source == {}
    elsewhere = dataclasses.replace(edit, source={"path": "/models/gpt2"})
    assert elsewhere == edit
    edit.save(tmp_path / "old.safetensors")
    header, tensors = read_tensors(tmp_path / "old.safetensors", "edit", 2, EditFileError)
    del header["source"]
    write_tensors(tmp_path / "old.safetensors", "edit", 1, header, tensors)
    assert Edit.load(tmp_path / "old.safetensors").source == {}
    edit.to_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("gpt2", None)


def test_an_edit_for_another_model_says_which_to_load(tmp_path):
    model = fresh_model()
    edit = dataclasses.replace(random_edit(model), source={"path": "/models/gpt2"})
    for other in (fresh_model(seed=3), fresh_model("llama"), Model(tiny("gpt2", n_inner=32), byte_tokenizer(), "wide")):
        with pytest.raises(EditMismatch, match="made for: --model /models/gpt2, or load_model"):
            edit.apply(other)
