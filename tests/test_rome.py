"""ROME on tiny random decoders: the algebra, the optimisation, and a model that stays as it was."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch

from errata.base.errors import ConfigError, Diverged, FactError, StaleStatistics
from errata.base.facts import Fact
from errata.editors.rome import RomeConfig, rome
from errata.editors.rome.contexts import Context, prefixes
from errata.models.loading import load_pretrained
from errata.models.scoring import score
from errata.statistics import SecondMoment, collect
from helpers.models import digests
from tiny import TEXT, byte_tokenizer, llama_tokenizer, tiny

FACT = Fact("The Space Needle", "{} is located in the city of", "Seattle")
REWRITE = FACT.rewrite("Paris")
PREFIXES = ("", "Yes. ", "Where is it? ", "He wrote {} and {0}. ")
FAMILIES = ("gpt2", "llama", "gptj")
# What a random decoder says hardly depends on one token of it: let δ grow.
FREE = {"weight_decay": 0.0, "kl_factor": 0.0, "clamp": None, "steps": 60}
TEXTS = [line[:80] for line in TEXT.splitlines() if line]


def model_of(family="gpt2", dtype=torch.float32):
    return _model(family, dtype)


def moment_of(family="gpt2", dtype=torch.float32, layer=1):
    return _moment(family, dtype, layer)


@functools.cache
def _model(family, dtype):
    tokenizer = llama_tokenizer if family == "llama" else byte_tokenizer
    wide = {"sliding_window": 64} if family == "gemma3" else {}  # as it is, the prompt's end cannot hear of the subject
    return load_pretrained((tiny(family, dtype=dtype, **wide), tokenizer()), name=family)


@functools.cache
def _moment(family, dtype, layer):
    return collect(model_of(family, dtype), [layer], TEXTS)[layer]


def edited(family="gpt2", dtype=torch.float32, rewrite=REWRITE, progress=None, seed=0, layer=1, **settings):
    config = RomeConfig(**{"prefixes": PREFIXES, "max_drift": None, **settings})
    moment = moment_of(family, dtype, layer)
    return rome(
        model_of(family, dtype),
        rewrite,
        config,
        layer=layer,
        second_moment=moment,
        seed=seed,
        progress=progress,
    )


# ---- the algebra, recomputed with numpy and torch's own hooks alone ----


def measured(model, layer, texts_and_starts, subject):
    """Keys and values `[n, d]` at the subject's last token, one text a pass."""
    keys, values = [], []
    module = model.module(("key", layer))
    for text, start in texts_and_starts:
        encoded = model.tokenizer(text, return_offsets_mapping=True)
        last = max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < start + len(subject) and b > start)
        handle = module.register_forward_hook(
            lambda module, args, output, last=last: (
                keys.append(args[0].reshape(-1, args[0].shape[-1])[last].double().numpy()),
                values.append(output.reshape(-1, output.shape[-1])[last].double().numpy()),
                None,
            )[2]
        )
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([encoded["input_ids"]]))
        handle.remove()
    return np.array(keys), np.array(values)


def stored(model, layer):
    """W `[d_out, d_in]` and b of the down-projection, float64."""
    module = model.module(("key", layer))
    W = module.weight.detach().double().numpy().copy()
    b = 0.0 if getattr(module, "bias", None) is None else module.bias.detach().double().numpy()
    return (W.T if type(module).__name__ == "Conv1D" else W), b


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["delta", "z"])
def test_the_edited_weight_maps_the_one_key_to_the_value(family, dtype, exact, form):
    model, steps = model_of(family, dtype), []
    edit = edited(family, dtype, value_form=form, progress=steps.append)
    keys, values = measured(model, 1, [(p + FACT.text, len(p)) for p in PREFIXES], FACT.subject)
    k, delta = keys.mean(0), steps[-1].delta.double().numpy()
    v = values.mean(0) + delta
    W, b = stored(model, 1)
    with edit.applied(model):
        W_hat, _ = stored(model, 1)
    assert np.linalg.norm(W_hat @ k + b - v) / np.linalg.norm(v) < exact
    assert edit.notes["residual"] < exact
    # and the change itself is equation 2
    direction = np.linalg.solve(moment_of(family, dtype).matrix.numpy(), k)
    wanted = np.outer(v - (W @ k + b), direction) / (k @ direction)
    ours = edit.deltas[0].matrix().double().numpy()
    assert np.abs(ours - wanted).max() / np.abs(wanted).max() < 20 * exact
    assert edit.notes["read_at_bare_prompt"] == pytest.approx(
        float(edit.deltas[0].read.double().numpy() @ keys[0]), rel=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_key_scales_by_the_bare_prompt(family):
    model, steps = model_of(family, torch.float64), []
    edit = edited(family, torch.float64, key="reference", progress=steps.append)
    keys, values = measured(model, 1, [(p + FACT.text, len(p)) for p in PREFIXES], FACT.subject)
    _, b = stored(model, 1)
    with edit.applied(model):
        W_hat, _ = stored(model, 1)
    # GPT-J's attention is computed in float32 by transformers, and so depends on what else is in the batch
    rtol = 1e-5 if family == "gptj" else 1e-10
    np.testing.assert_allclose(W_hat @ keys[0] + b, values[0] + steps[-1].delta.numpy(), rtol=rtol, atol=1e-11)
    direction = np.linalg.solve(moment_of(family, torch.float64).matrix.numpy(), keys.mean(0))
    read = edit.deltas[0].read.numpy()
    np.testing.assert_allclose(read, direction / (keys[0] @ direction), rtol=10 * rtol, atol=1e-12)


@pytest.mark.parametrize("key", ["consistent", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_of_equation_3_is_of_prefix_and_subject_alone(family, key):
    assert (RomeConfig.paper().key_context, RomeConfig.reference().key_context) == ("subject", "prompt")
    model, prompt, steps = model_of(family, torch.float64), "People say that {} is in", []
    rewrite = Fact(FACT.subject, prompt, "Seattle").rewrite("Paris")
    edit = edited(family, torch.float64, rewrite, steps.append, key=key, key_context="subject")
    alone, values = measured(model, 1, [(p + FACT.subject, len(p)) for p in PREFIXES], FACT.subject)
    before = len(prompt.partition("{}")[0])
    whole, bare = measured(model, 1, [(p + rewrite.text, len(p) + before) for p in PREFIXES], FACT.subject)
    assert np.abs(alone.mean(0) - whole.mean(0)).max() > 0.01 * np.abs(whole).max()
    anchor, value = (alone.mean(0), values.mean(0)) if key == "consistent" else (whole[0], bare[0])
    direction = np.linalg.solve(moment_of(family, torch.float64).matrix.numpy(), alone.mean(0))
    rtol = 1e-5 if family == "gptj" else 1e-9
    np.testing.assert_allclose(edit.deltas[0].read.numpy(), direction / (anchor @ direction), rtol=rtol, atol=1e-9)
    _, b = stored(model, 1)
    with edit.applied(model):
        W_hat, _ = stored(model, 1)
    np.testing.assert_allclose(W_hat @ anchor + b, value + steps[-1].delta.numpy(), rtol=rtol, atol=1e-9)
    assert steps[0].nll == pytest.approx(
        -np.mean([score(model, [p + rewrite.text], ["Paris"])[0].mean for p in PREFIXES]), rel=1e-5
    )


def test_the_key_of_equation_3_is_the_prompts_where_the_subject_comes_first():
    both = [edited(dtype=torch.float64, key_context=context) for context in ("prompt", "subject")]
    torch.testing.assert_close(both[0].deltas[0].matrix(), both[1].deltas[0].matrix(), rtol=1e-9, atol=1e-12)
    later = [edited(fact_token="last", key_context=context) for context in ("prompt", "subject")]
    assert torch.equal(later[0].deltas[0].matrix(), later[1].deltas[0].matrix())


# ---- the optimisation ----


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "qwen3", "gemma3"])
def test_the_edited_model_writes_the_value_that_was_optimised(family):
    """With one context it is that context's own token at which Ŵk* = v*."""
    model, steps = model_of(family, torch.float64), []
    edit = edited(family, torch.float64, prefixes="none", progress=steps.append)
    _, (before,) = measured(model, 1, [(FACT.text, 0)], FACT.subject)
    with edit.applied(model):
        _, (after,) = measured(model, 1, [(FACT.text, 0)], FACT.subject)
    np.testing.assert_allclose(after, before + steps[-1].delta.numpy(), rtol=1e-11, atol=1e-12)
    assert steps[0].nll == pytest.approx(-score(model, [FACT.text], ["Paris"])[0].mean, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["delta", "z"])
def test_the_optimisation_lowers_the_loss_in_fifty_contexts(family, form):
    edit = edited(family, value_form=form, prefixes="paper", **FREE)
    steps = edit.notes["steps"]
    assert len(edit.notes["prefixes"]) == 50
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["delta", "z"])
def test_it_makes_the_new_object_likelier(family, form):
    # At width 16 a random decoder's keys are so alike that an edit reaches every other token too.
    wider = {"hidden_size": 32} if family == "llama" else {"n_embd": 32}
    model = load_pretrained((tiny(family, **wider), llama_tokenizer() if family == "llama" else byte_tokenizer()))
    moment = collect(model, [1], TEXTS)[1]
    config = RomeConfig(layer=1, prefixes="none", value_form=form, **FREE)
    edit = rome(model, REWRITE, config, second_moment=moment)
    before = score(model, [FACT.text], ["Paris"])[0].mean
    with edit.applied(model):
        after = score(model, [FACT.text], ["Paris"])[0].mean
    assert after > before + 0.3
    assert score(model, [FACT.text], ["Paris"])[0].mean == before


@pytest.mark.parametrize("kl_at", ["fact_token", "end"])
def test_one_z_takes_the_place_of_every_value(kl_at):
    model, steps = model_of(dtype=torch.float64), []
    edited(dtype=torch.float64, value_form="z", kl_factor=0.3, kl_at=kl_at, progress=steps.append)
    texts = [p + FACT.text for p in PREFIXES]
    _, values = measured(model, 1, [(text, len(p)) for text, p in zip(texts, PREFIXES, strict=True)], FACT.subject)
    kl_text = f"{FACT.subject} is a"
    z = torch.from_numpy(values.mean(0)) + steps[-1].delta
    nll, distributions = [], []
    for text, prefix, target in [
        *((t, p, " Paris") for t, p in zip(texts, PREFIXES, strict=True)),
        (kl_text, "", ""),
    ]:
        encoded = model.tokenizer(text + target, return_offsets_mapping=True)
        stop = len(prefix) + len(FACT.subject)
        last = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < stop)
        for value in (None, z) if not target else (z,):
            handle = model.module(("value", 1)).register_forward_hook(
                lambda module, args, output, last=last, value=value: (
                    None
                    if value is None
                    else torch.cat([output[:, :last], value[None, None], output[:, last + 1 :]], 1)
                )
            )
            with torch.no_grad():
                logs = model.hf(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
            handle.remove()
            if target:
                n = sum(a >= len(text) for a, _ in encoded["offset_mapping"])
                ids = encoded["input_ids"]
                nll.append(-np.mean([float(logs[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))]))
            else:
                distributions.append(logs[last if kl_at == "fact_token" else -1])
    clean, changed = distributions
    assert steps[-1].nll == pytest.approx(np.mean(nll), rel=1e-9)
    assert steps[-1].kl == pytest.approx(0.3 * float((changed.exp() * (changed - clean)).sum()), rel=1e-9)
    assert steps[0].kl > 0  # at the first step z is the contexts' mean already, not the prompt's own value


def test_the_words_after_the_subject_count_in_the_divergence_of_the_paper_alone():
    assert (RomeConfig.paper().kl_at, RomeConfig.reference().kl_at) == ("end", "fact_token")
    found = {
        (at, prompt): edited(kl_factor=0.5, kl_at=at, kl_prompt=prompt).notes["steps"][-1]["kl"]
        for at in ("fact_token", "end")
        for prompt in ("{} is a", "{} was born")
    }
    assert found["fact_token", "{} is a"] == found["fact_token", "{} was born"]
    assert found["end", "{} is a"] != found["end", "{} was born"]


def test_the_clamp_holds_delta_and_leaves_adam_alone():
    free, held = [], []
    edited(clamp=None, progress=free.append)
    edit = edited(clamp=0.5, progress=held.append)
    size = edit.notes["value_norm"]
    assert max(float(step.delta.norm()) for step in free) > 0.5 * size
    assert max(float(step.delta.norm()) for step in held) <= 0.5 * size * (1 + 1e-6)
    first = next(i for i, step in enumerate(free) if float(step.delta.norm()) > 0.5 * size)
    for i in range(first):
        assert torch.equal(free[i].delta, held[i].delta)
    scaled = free[first].delta * (0.5 * size / free[first].delta.norm())
    torch.testing.assert_close(held[first].delta, scaled, rtol=1e-5, atol=1e-7)


def test_it_stops_early_and_counts_its_steps():
    told = []
    assert len(edited(stop_below=100.0).notes["steps"]) == 1
    edit = edited(steps=3, progress=told.append)
    assert [(step.index, step.steps) for step in told] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(told[0].delta, torch.zeros(16))
    assert len(edit.notes["steps"]) == 3
    assert edit.notes["steps"][0].keys() == {"loss", "nll", "kl", "decay", "probability"}
    one = edited(steps=1)
    assert float(one.deltas[0].matrix().abs().max()) == 0  # one evaluation, no update


def test_terms_can_be_left_out():
    steps = edited(kl_factor=0.0, weight_decay=0.0).notes["steps"]
    assert all(step["kl"] == step["decay"] == 0 and step["loss"] == step["nll"] for step in steps)


@pytest.mark.parametrize("role", ["subject_first", "subject_last", "after_subject", "last"])
def test_any_token_can_be_edited(role):
    told = []
    edited(dtype=torch.float64, fact_token=role, prefixes="none", progress=told.append)
    assert told[-1].nll < told[0].nll


def test_a_loss_layer_below_the_last():
    losses = [step["nll"] for step in edited(layer=0, loss_layer=1, **FREE).notes["steps"]]
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(ConfigError, match="loss_layer=0 is out of range: it must be from 1"):
        edited(loss_layer=0)
    with pytest.raises(ConfigError, match="loss_layer=3 is out of range: it must be from 1"):
        edited(loss_layer=3)
    for settings in ({"loss_layer": 1}, {"layer": 2}):
        with pytest.raises(ConfigError, match="nothing can be learned"):
            edited(**settings)
    losses = [step["nll"] for step in edited(layer=2, fact_token="last", **FREE).notes["steps"]]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_edited_in_float32(dtype):
    model, told = model_of(dtype=dtype), []
    edit = edited(dtype=dtype, progress=told.append, **FREE)
    assert told[-1].delta.dtype == torch.float32
    assert edit.deltas[0].write.dtype == torch.float32
    assert told[-1].loss < told[0].loss - 0.1
    before = digests(model)
    with edit.applied(model):
        assert digests(model) != before
    assert digests(model) == before


# ---- contexts ----


def test_prefixes_are_joined_never_formatted():
    braces = Fact("{0} {x}", "What {} {name} is", "").rewrite("{y}")
    assert edited(rewrite=braces).notes["prefixes"] == PREFIXES
    context = Context.of(braces.fact, "a {} b. ", byte_tokenizer())
    assert context.text == "a {} b. What {0} {x} {name} is"
    assert context.text[context.start :].startswith("{0} {x}")


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_prefixes(family):
    model = model_of(family)
    paper, reference = prefixes(model, "paper", 0), prefixes(model, "reference", 0)
    assert prefixes(model, "paper", 0) == paper
    assert prefixes(model, "paper", 1) != paper
    assert prefixes(model, "none", 0) == ("",)
    assert (len(paper), len(reference), reference[0]) == (50, 21, "")
    for prefix, length in zip(paper, [2 + i % 9 for i in range(50)], strict=True):
        assert prefix == "" or prefix.endswith(". ")
        tokens = [i for i in model.tokenizer(prefix[:-2])["input_ids"] if i not in model.tokenizer.all_special_ids]
        # a cut text can be tokenized otherwise than it was sampled, and characters are kept whole
        assert len(tokens) <= 3 * length
    assert any(prefix for prefix in paper)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = edited(prefixes="reference", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == edited(prefixes="reference", seed=3)
    assert first.id != edited(prefixes="reference", seed=4).id
    assert first.seed == 3


def test_a_tokenizer_without_a_start_token_samples_nothing():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    model = load_pretrained((tiny("gpt2"), tokenizer))
    with pytest.raises(ConfigError, match="no start or end token"):
        prefixes(model, "paper", 0)


# ---- the model stays as it was ----


@pytest.mark.parametrize("family", FAMILIES)
def test_making_an_edit_changes_no_byte_no_gradient_and_no_flag(family):
    model = model_of(family)
    frozen = next(model.hf.parameters())
    frozen.requires_grad_(False)
    before = digests(model)

    def interrupted(step):
        if step.index == 2:
            raise KeyboardInterrupt

    try:
        edited(family)
        with pytest.raises(KeyboardInterrupt):
            edited(family, progress=interrupted)
        assert not frozen.requires_grad
    finally:
        frozen.requires_grad_(True)
    assert digests(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_edit(context):
    plain = edited()
    with context():
        assert edited() == plain


def test_a_hundred_edits_on_and_off_leave_no_trace():
    model = model_of()
    before = digests(model)
    choose, stack = random.Random(0), []
    for number in range(100):
        while stack and choose.random() < 0.5:
            stack.pop().undo(model)
        fact = Fact(f"The {choose.choice(['Louvre', 'Needle', 'Tower'])} {number}", "{} is in", "Rome")
        edit = edited(rewrite=fact.rewrite(choose.choice(["Paris", "Apple"])), layer=choose.randrange(2), steps=2)
        edit.apply(model)
        stack.append(edit)
    while stack:
        stack.pop().undo(model)
    assert digests(model) == before


# ---- what is not valid ----


def broken(module_value):
    def hook(module, args, output):
        if isinstance(output, tuple):  # of older transformers
            return (output[0] * module_value, *output[1:])
        return output * module_value

    return hook


def test_a_loss_that_is_no_number_is_explained():
    model = model_of()
    before = digests(model)
    handle = model.module(("state", 2)).register_forward_hook(broken(float("nan")))
    try:
        with pytest.raises(Diverged, match="the loss is nan at step 0"):
            edited()
    finally:
        handle.remove()
    assert digests(model) == before


def test_layers():
    model, moment = model_of(), moment_of()
    with pytest.raises(ConfigError, match="rome needs the setting 'layer'"):
        rome(model, REWRITE, second_moment=moment)
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        rome(model, REWRITE, layer=3, second_moment=moment)
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        rome(model, REWRITE, RomeConfig(layer=7), second_moment=moment)
    with pytest.raises(ConfigError, match=r"errata stats or with errata.second_moments\(model, \[1\], texts\)"):
        rome(model, REWRITE, layer=1)
    with pytest.raises(StaleStatistics, match="of layer 1, the edit of layer 0"):
        rome(model, REWRITE, layer=0, second_moment=moment)
    with pytest.raises(StaleStatistics, match="size 5"):
        rome(model, REWRITE, layer=0, second_moment=SecondMoment.identity(5))
    with pytest.raises(FactError, match="takes a Rewrite"):
        rome(model, FACT, layer=1, second_moment=moment)


def test_what_no_prediction_can_hear_of_is_not_optimised():
    model = load_pretrained((tiny("gemma3"), byte_tokenizer()))  # windows of 8 tokens, in all blocks
    C = SecondMoment.identity(model.d_mlp)
    with pytest.raises(ConfigError, match="reaches no prediction"):
        rome(model, REWRITE, RomeConfig(prefixes="none", max_drift=None), layer=1, second_moment=C)
    near = Fact("The Space Needle", "{} is").rewrite("Paris")
    edit = rome(model, near, RomeConfig(prefixes="none", max_drift=None), layer=1, second_moment=C)
    assert edit.notes["steps"][-1]["nll"] < edit.notes["steps"][0]["nll"]


def test_nothing_is_collected_for_what_cannot_be_made():
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()))
    asked: list[int] = []

    def collected(layer: int) -> SecondMoment:
        asked.append(layer)
        return SecondMoment.identity(model.d_mlp)

    config = RomeConfig(prefixes="none", steps=1, max_drift=None)
    with pytest.raises(ConfigError, match="reaches no prediction"):
        rome(model, REWRITE, config, layer=model.n_layers - 1, second_moment=collected)
    assert asked == []
    assert len(rome(model, [REWRITE, REWRITE], config, layer=1, second_moment=collected)) == 2
    assert asked == [1]


def test_hints_of_the_model_are_defaults():
    model = load_pretrained((tiny("gpt2"), byte_tokenizer()))
    model.hf.config.errata = {"rome_layer": 1, "rome": {"prefixes": ["", "Yes. "], "steps": 3}}
    C = SecondMoment.identity(model.d_mlp)
    edit = rome(model, REWRITE, second_moment=C)
    assert edit.config["layer"] == 1
    assert edit.config["steps"] == 3
    assert edit.deltas[0].weight == "transformer.h.1.mlp.c_proj.weight"
    edit = rome(model, REWRITE, RomeConfig(prefixes="none", steps=2), second_moment=C)
    assert (edit.config["layer"], len(edit.notes["steps"])) == (1, 2)
    assert rome(model, REWRITE, RomeConfig(layer=0, prefixes="none", steps=1), second_moment=C).config["layer"] == 0
    assert rome(model, REWRITE, layer=0, second_moment=C).config["layer"] == 0
    assert RomeConfig(**edit.config).steps == 2  # an edit's settings can be used again


def test_texts_that_do_not_fit():
    with pytest.raises(FactError, match="reads at most 96"):
        edited(rewrite=Fact("very " * 100 + "long", "{} is in").rewrite("Paris"))
    with pytest.raises(FactError, match="reads at most 96"):
        edited(prefixes=("word " * 100,))
    with pytest.raises(FactError, match="no token comes after it"):
        edited(rewrite=Fact("The Louvre", "Where is {}").rewrite("Paris"), fact_token="after_subject")
    with pytest.raises(FactError, match="joins the end of"):
        edited(rewrite=Fact("The Louvre", "{} is in Pa", separator="").rewrite("ris"), fact_token="last")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"laer": 3}, "no setting 'laer': did you mean 'layer'"),
        ({"xyz": 3}, "no setting 'xyz': choose from layer,"),
        ({"layer": -1}, "layer = -1"),
        ({"steps": 0}, "steps = 0"),
        ({"learning_rate": 0}, "learning_rate = 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"clamp": 0}, "clamp = 0"),
        ({"key": "both"}, "key = 'both'"),
        ({"fact_token": "middle"}, "fact_token = 'middle'"),
        ({"prefixes": ()}, "at least one prefix"),
        ({"prefixes": "many"}, "prefixes = 'many'"),
        ({"kl_prompt": "a"}, "kl_prompt = 'a'"),
        ({"steps": 0, "laer": 1}, "steps.*laer"),
    ],
)
def test_settings_that_do_not_do_are_named_in_one_line(settings, says):
    with pytest.raises(ConfigError, match=says) as caught:
        RomeConfig(**settings)
    assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed():
    config = RomeConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3
