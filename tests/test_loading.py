"""Models from folders and from live objects; everything that is not a model is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, T5Config, T5ForConditionalGeneration

import errata
from errata.base.errors import ConfigError, DeviceError, FactError, ModelNotFound, UnsupportedModel
from errata.base.fingerprint import tensor_digest
from errata.models.loading import load_pretrained, usable_device
from errata.statistics import SecondMoment
from tiny import FAMILIES, byte_tokenizer, config_of, llama_tokenizer, randomised, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    hf = tiny("gpt2")
    hf.config.errata = {"rome_layer": 1}
    hf.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "broken")


def refusal(error: type[Exception], source, **settings) -> str:
    with pytest.raises(error) as caught:
        load_pretrained(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_the_same(family, tmp_path):
    hf, tokenizer = tiny(family), byte_tokenizer()
    hf.save_pretrained(tmp_path / "it")
    tokenizer.save_pretrained(tmp_path / "it")
    live, loaded = load_pretrained((hf, tokenizer)), load_pretrained(tmp_path / "it")
    assert loaded.name == "it"
    assert loaded.anatomy == live.anatomy
    assert not loaded.hf.training
    theirs = loaded.hf.state_dict()
    for name, value in live.hf.state_dict().items():
        assert tensor_digest(theirs[name]) == tensor_digest(value)
    batch = live.encode(["The Space Needle", "Rome"])
    assert torch.equal(loaded.encode(["The Space Needle", "Rome"]).input_ids, batch.input_ids)
    assert torch.equal(loaded.forward(batch), live.forward(batch))


def test_loading_says_nothing_on_the_terminal(saved, capfd):
    load_pretrained(saved)
    assert capfd.readouterr() == ("", "")


def test_a_models_config_can_give_hints(saved):
    assert load_pretrained(saved).hints == {"rome_layer": 1}
    assert load_pretrained((tiny("gpt2"), byte_tokenizer())).hints == {}


def test_sizes():
    model = load_pretrained((tiny("qwen3", layers=2), byte_tokenizer()), name="mine")
    sizes = (model.n_layers, model.d_model, model.d_mlp, model.vocab_size, model.max_length)
    assert sizes == (2, 16, 24, 320, 96)
    assert (model.name, model.device, model.dtype) == ("mine", torch.device("cpu"), torch.float32)
    assert repr(model) == "Model('mine', 2 layers, d_model 16, d_mlp 24, torch.float32, cpu)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float64])
def test_the_dtype_can_be_chosen(saved, dtype):
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert load_pretrained(saved, dtype=dtype).dtype == wanted
    assert load_pretrained((tiny("gpt2"), byte_tokenizer()), dtype=dtype).dtype == wanted


def test_auto_is_the_dtype_of_the_file(tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_live_model_is_taken_as_it_is():
    hf, tokenizer = tiny("gpt2", dtype=torch.float64).train(), byte_tokenizer()
    model = load_pretrained((hf, tokenizer))
    assert model.hf is hf
    assert model.tokenizer is tokenizer
    assert model.dtype == torch.float64
    assert not hf.training
    assert tokenizer.pad_token is None


# ---- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere/at/all", Path("nowhere")])
def test_a_folder_that_is_not_there(source):
    assert "there is no folder" in refusal(ModelNotFound, source)


def test_a_hub_id_is_looked_for_in_the_local_cache_alone():
    message = refusal(ModelNotFound, "nobody/has-this-model")
    assert "'nobody/has-this-model'" in message
    assert "not in the local cache" in message
    assert "download=True" in message


def test_names_that_name_nothing(saved):
    assert "is empty" in refusal(ModelNotFound, " ")
    assert "is a file" in refusal(ModelNotFound, saved / "config.json")
    assert "names no model" in refusal(ConfigError, None)
    assert "not 3 things" in refusal(ConfigError, (1, 2, 3))
    assert "not a Hugging Face model" in refusal(UnsupportedModel, (1, byte_tokenizer()))
    assert "not a tokenizer" in refusal(UnsupportedModel, (tiny("gpt2"), None))


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    assert "holds no Hugging Face model" in refusal(ModelNotFound, folder)


@pytest.mark.parametrize("content", ["{ no json", "{}", "[]", '{"model_type": "unheard-of"}'])
def test_a_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    assert "its config cannot be loaded" in refusal(UnsupportedModel, folder)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_weights_that_are_cut_short(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "its weights cannot be loaded" in refusal(UnsupportedModel, folder)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert "no weights in safetensors" in refusal(ModelNotFound, folder)


@pytest.mark.parametrize("changes", [{"n_layer": 5}, {"n_embd": 32}])
def test_weights_of_another_config_would_be_random(folder, changes):
    rewrite_config(folder, **changes)
    message = refusal(UnsupportedModel, folder)
    assert "transformer.h." in message
    assert "would be random" in message


def test_code_of_a_repository_is_never_run(folder, tmp_path):
    trace = tmp_path / "it-ran"
    (folder / "its_code.py").write_text(f"open({str(trace)!r}, 'w')\nclass A: pass\n")
    rewrite_config(
        folder,
        model_type="its-own",
        auto_map={"AutoConfig": "its_code.A", "AutoModelForCausalLM": "its_code.A"},
    )
    assert "errata never runs" in refusal(UnsupportedModel, folder)
    assert not trace.exists()


def test_a_missing_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()
    assert "has no vocabulary" in refusal(ModelNotFound, folder)


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be loaded" in refusal(UnsupportedModel, folder)


def test_a_tokenizer_of_another_model():
    message = refusal(UnsupportedModel, (tiny("gpt2"), byte_tokenizer(vocab=340)))
    assert "ids up to 339" in message
    assert "embeddings for 320" in message


def test_a_tokenizer_that_ends_every_text():
    tokenizer = llama_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert "'</s>' after every text" in refusal(UnsupportedModel, (tiny("llama"), tokenizer))


def test_a_tokenizer_without_offsets(monkeypatch):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert "not a fast one" in refusal(UnsupportedModel, (tiny("gpt2"), tokenizer))


def test_an_encoder_with_a_decoder(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ).save_pretrained(folder)
    assert "an encoder with a decoder (t5)" in refusal(UnsupportedModel, folder)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "meta", "cpu:x", 3.5])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "choose 'cpu'" in refusal(DeviceError, "./nowhere", device=device)


def test_devices_that_are_here(monkeypatch):
    assert usable_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="cuda:0 to cuda:1"):
        usable_device("cuda:2")


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int64, None])
def test_a_dtype_that_is_none(saved, dtype):
    assert "is not a dtype for a model" in refusal(ConfigError, saved, dtype=dtype)


# ---- text to tokens -----------------------------------------------------------------------------------


def test_texts_are_padded_on_the_right():
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()))
    batch = model.encode(["Rome", "The Space Needle"])
    assert len(batch) == 2
    short = model.tokenizer("Rome")["input_ids"]
    assert batch.input_ids[0].tolist()[: len(short)] == short
    assert batch.attention_mask[0].tolist() == [1] * len(short) + [0] * (batch.input_ids.shape[1] - len(short))
    assert batch.last.tolist() == [len(short) - 1, batch.input_ids.shape[1] - 1]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long
    assert batch.to("cpu").last.tolist() == batch.last.tolist()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text to encode"),
        ("Rome", "put the text in brackets"),
        (["Rome", ""], "the text '' has no tokens"),
        (["Rome " * 60], r"the text 'Rome Rome .*\.\.\.' has \d+ tokens; gpt reads at most 96"),
    ],
)
def test_texts_that_cannot_be_encoded(texts, message):
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()), name="gpt")
    with pytest.raises(FactError, match=message):
        model.encode(texts)


# ---- fingerprints -------------------------------------------------------------------------------------


def test_a_digest_tells_bytes_shape_and_dtype_apart():
    tensor = torch.arange(6.0)
    digests = {
        tensor_digest(tensor),
        tensor_digest(tensor.reshape(2, 3)),
        tensor_digest(tensor.double()),
        tensor_digest(tensor + 1e-6),
        tensor_digest(tensor.bfloat16()),
        tensor_digest(torch.tensor(0.0)),
        tensor_digest(torch.tensor(-0.0)),
        tensor_digest(torch.empty(0)),
    }
    assert len(digests) == 8


def test_a_digest_does_not_see_memory_layout():
    tensor = torch.randn(4, 5)
    assert tensor_digest(tensor.T.contiguous().T) == tensor_digest(tensor)
    assert tensor_digest(torch.nn.Parameter(tensor)) == tensor_digest(tensor)
    assert len(tensor_digest(tensor)) == 64


@pytest.mark.parametrize("hints", [["x"], {"rome": [1]}, {"subject_sigma": "x"}, {"rome_layer": "4"}])
def test_hints_of_another_shape_are_refused(hints):
    hf = tiny("gpt2")
    hf.config.errata = hints
    with pytest.raises(UnsupportedModel, match="'errata'"):
        load_pretrained((hf, byte_tokenizer())).hints  # noqa: B018


# ---- weights and config that do not belong together ----------------------------------------------------


def test_more_layers_in_the_files_than_in_the_config_are_refused(folder):
    rewrite_config(folder, n_layer=2)
    message = refusal(UnsupportedModel, folder)
    assert "weights that its config has no place for, such as transformer.h.2." in message
    assert "it says 2 layers" in message


def test_other_weights_within_the_model_are_refused(tmp_path):
    tiny("qwen2").save_pretrained(tmp_path)  # its attention has biases
    byte_tokenizer().save_pretrained(tmp_path)
    rewrite_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "no place for, such as model.layers.0.self_attn.k_proj.bias" in refusal(UnsupportedModel, tmp_path)


def stored(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_beside_the_model_are_said_to_be_left_out(folder):
    stored(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 16)}))
    with pytest.warns(UserWarning, match=r"1 weights .* such as v_head\.summary\.weight; they are left out"):
        load_pretrained(folder)


def test_buffers_of_older_versions_are_nothing_to_speak_of(folder):
    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    stored(folder, add)
    load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_without_a_quantisation_config_are_refused(folder, dtype):
    name = "transformer.h.1.mlp.c_proj.weight"
    stored(folder, lambda tensors: tensors.update({name: tensors[name].mul(9).to(dtype)}))
    message = refusal(UnsupportedModel, folder)
    assert f"{name} in model.safetensors is stored as" in message
    assert "names no quantisation" in message


# ---- quantised models ----------------------------------------------------------------------------------

QUANTISATIONS = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ({"quant_method": "hqq"}, "hqq"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
]


@pytest.mark.parametrize(("config", "named"), QUANTISATIONS)
def test_a_quantised_folder_is_called_so(folder, config, named):
    rewrite_config(folder, quantization_config=config)
    message = refusal(UnsupportedModel, folder)
    assert f"the model is quantised ({named})" in message
    assert "dequantize()" in message


class Codes(nn.Module):
    """A linear map as a library of quantised ones keeps it: no number here is a weight."""

    def __init__(self, module: nn.Module, name: str, dtype: torch.dtype, packed: int, parameter: bool):
        super().__init__()
        weight = module.weight.detach()
        codes = torch.zeros(weight.shape[0], weight.shape[1] // packed, dtype=dtype)
        if parameter:
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        else:
            self.register_buffer(name, codes)
        self.register_buffer("scales", torch.ones(weight.shape[0]))
        self.bias = module.bias
        self._map = [module]

    def forward(self, x):
        return self._map[0](x)


@pytest.mark.parametrize(
    ("name", "dtype", "packed", "parameter"),
    [
        ("weight", torch.int8, 1, True),  # bitsandbytes, 8 bits
        ("weight", torch.uint8, 2, True),  # and 4
        ("qweight", torch.int32, 8, False),  # GPTQ, AWQ
        ("weight", torch.float8_e4m3fn, 1, True),  # fp8
        ("W_q", torch.uint8, 2, True),  # HQQ
        ("weight_packed", torch.int32, 8, True),  # compressed-tensors
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_live_quantised_model_is_called_so(name, dtype, packed, parameter, told):
    hf = tiny("llama")
    for block in hf.model.layers:
        block.mlp.down_proj = Codes(block.mlp.down_proj, name, dtype, packed, parameter)
    if told:
        hf.config.quantization_config = {"quant_method": "some", "bits": 4}
    message = refusal(UnsupportedModel, (hf, byte_tokenizer()))
    assert message.startswith("model.layers.0.mlp.down_proj: Codes is quantised (")
    assert ("some, 4 bits" if told else str(dtype).removeprefix("torch.")) in message


def test_a_dequantised_model_is_no_quantised_one():
    hf = tiny("llama")
    hf.config.quantization_config = {"quant_method": "fp8"}
    assert load_pretrained((hf, byte_tokenizer())).n_layers == 3


# ---- adapters, and models that read more than text -----------------------------------------------------


def test_a_model_with_an_adapter_is_to_be_merged_first():
    hf = tiny("llama")
    adapted = peft.get_peft_model(hf, peft.LoraConfig(target_modules=["down_proj"]))
    assert "Merge them first: model.merge_and_unload()" in refusal(UnsupportedModel, (adapted, byte_tokenizer()))
    message = refusal(UnsupportedModel, (hf, byte_tokenizer()))  # in which the adapter stands
    assert message.startswith("model.layers.0.mlp.down_proj: ")
    assert "Merge it first" in message
    assert load_pretrained((adapted.merge_and_unload(), byte_tokenizer())).n_layers == 3


def vision_config(family: str):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = config_of("llama").to_dict()
    if family == "qwen2_5_vl":
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
        ends = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
        text.pop("model_type")
        return CONFIG_MAPPING[family](text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]}, **ends)
    kind = {"mistral3": "pixtral", "llava": "clip_vision_model"}[family]
    text["model_type"] = {"mistral3": "mistral"}.get(family, "llama")
    return CONFIG_MAPPING[family](text_config=text, vision_config={"model_type": kind, **vision}, image_token_index=5)


@pytest.mark.parametrize("family", ["mistral3", "qwen2_5_vl", "llava"])
def test_models_that_see_images_are_loaded_for_their_text(family, tmp_path):
    hf = randomised(AutoModelForImageTextToText.from_config(vision_config(family)))
    hf.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.anatomy.blocks == "model.language_model.layers"
    assert (model.n_layers, model.d_model, model.d_mlp) == (3, 16, 24)
    batch = model.encode(["The Space Needle is in"])
    with torch.no_grad():
        assert torch.equal(model.forward(batch), hf(input_ids=batch.input_ids).logits)
    rewrite = errata.Fact("The Space Needle", "{} is in", "Seattle").rewrite("Rome")
    config = errata.RomeConfig(layer=1, prefixes="none", max_drift=None, steps=3)
    edit = errata.rome(model, rewrite, config, second_moment=SecondMoment.identity(24))
    with edit.applied(model), torch.no_grad():
        assert not torch.equal(model.forward(batch), hf(input_ids=batch.input_ids).logits)
    assert errata.trace(model, rewrite.fact, samples=1).clean > 0
