"""The parts of a decoder, found in the live module tree and verified by measurement.

Model names and class names are not used. One short forward pass is recorded, module by module, and the parts are found
by their behaviour:

- the blocks are the longest `ModuleList` whose members hand the state on, each to the next;
- attention is the part of a block through which a later token sees an earlier one; hybrids have recurrent
  layers or convolutions in its place in some blocks, and all else must be alike;
- the MLP is the part that does not mix tokens and whose output one last linear map writes: the
  down-projection (value = W key, v = W k in the paper);
- the final norm is what stands between the last state and the head.

A block adds to its state what its two branches write, state' = state + attention + mlp. The MLP reads
either the state to which attention has already added (serial: GPT-2, Llama) or the block's input
(parallel: GPT-J, GPT-NeoX). Some families (Gemma 2 and 3, OLMo 2) norm a branch's output before it is
added. All of this is measured, in every layer; a model that does not fit is refused, with the name of the module.

This file watches modules with hooks of its own, because it runs before there is a `Model` to hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from errata.base.autocast import without_autocast
from errata.base.errors import UnsupportedModel
from errata.base.interrupt import attached, unbroken
from errata.models.modules import at_hand, linear_matrix, place
from errata.models.quantised import require_unquantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """Dotted paths of a decoder's parts; `attention`, `mlp`, `down` and the norms are relative to a block.

    Attributes:
        embedding: the token embedding.
        blocks: the `ModuleList` of blocks.
        attention: the attention module of a block, or what else mixes tokens there; of hybrids, of block 0.
        mlp: the MLP of a block; the down-projection itself where a block has no module for its MLP.
        down: the MLP's down-projection.
        final_norm: the norm between the last state and the head.
        head: the linear map to logits.
        parallel: whether attention and MLP both read the block's input.
        attention_norm: the norm that attention's output passes before it is added to the state, if any.
        mlp_norm: the same for the MLP.
        residual_scale: factor of both branches before they are added (Granite; else 1).
        logit_scale: factor of the head's output (Cohere, Granite; else 1).
        softcap: c where logits are c tanh(head / c) (Gemma 2; else None).
        mixers: for a hybrid, whose blocks mix tokens in different ways, the attention of each block; else empty.
    """

    embedding: str
    blocks: str
    attention: str
    mlp: str
    down: str
    final_norm: str
    head: str
    parallel: bool
    attention_norm: str | None = None
    mlp_norm: str | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    mixers: tuple[str, ...] = ()

    def attention_of(self, layer: int) -> str:
        """The attention of one block."""
        return self.mixers[layer] if self.mixers else self.attention


def softcapped(head_output: Tensor, anatomy: Anatomy) -> Tensor:
    """Logits from the head's output."""
    logits = head_output if anatomy.logit_scale == 1.0 else head_output * anatomy.logit_scale
    return logits if anatomy.softcap is None else anatomy.softcap * torch.tanh(logits / anatomy.softcap)


# ---- finding ------------------------------------------------------------------------------------------


@without_autocast
def find_anatomy(hf: PreTrainedModel) -> Anatomy:
    """The parts of a live decoder, found by a few short forward passes. The model is left unchanged.

    Raises:
        UnsupportedModel: if a part cannot be found; the message names the module that did not fit.
    """
    require_runnable(hf)
    names = {module: name for name, module in hf.named_modules()}
    head, embedding = _module_or_none(hf.get_output_embeddings), _module_or_none(hf.get_input_embeddings)
    if head is None or linear_matrix(head) is None:
        raise UnsupportedModel(f"{type(hf).__name__} has no head that gives logits. Load it with AutoModelForCausalLM")
    if embedding is None:
        raise UnsupportedModel(f"{type(hf).__name__} has no token embedding")

    ids = _probe_ids(embedding)
    with _recorded(dict(hf.named_modules()), ids.device) as calls, _inference(hf):
        logits = _logits(hf, ids)
    _require_repeatable(hf, calls, ids)
    blocks = _find_blocks(hf, calls)
    _require_causal(hf, blocks, ids, logits)
    if names[head] not in calls:
        raise UnsupportedModel(f"{names[head]}: the head does not run in a forward pass")
    final_norm = _find_final_norm(calls, blocks, len(hf.get_submodule(blocks)), names[head])
    scale, cap = _find_logit_shape(hf, _tensor(calls[names[head]].output), logits, names[head])
    return Anatomy(
        embedding=names[embedding],
        blocks=blocks,
        final_norm=final_norm,
        head=names[head],
        logit_scale=scale,
        softcap=cap,
        **_look_inside_all(hf, calls, blocks, ids),
    )


def require_runnable(hf: Any) -> None:
    """A decoder of Hugging Face's, loaded, on one device or spread over several by accelerate."""
    from transformers import PreTrainedModel

    if not isinstance(hf, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(hf).__name__} is a model with adapters, whose weights are in two places. Merge them first: "
            "model.merge_and_unload()"
            if hasattr(hf, "merge_and_unload")
            else f"{type(hf).__name__} is not a Hugging Face model. Load one with AutoModelForCausalLM"
        )
    require_unquantised(hf)
    adapted = next((name for name, module in hf.named_modules() if hasattr(module, "lora_A")), None)
    if adapted is not None:
        raise UnsupportedModel(
            f"{adapted}: an adapter is on it, so its weight is in two places. Merge it first: "
            "peft_model.merge_and_unload(), or load the model without the adapter"
        )
    if getattr(hf.config, "is_encoder_decoder", False):
        encoder = next((name for name, _ in hf.named_modules() if name.split(".")[-1] == "encoder"), "encoder")
        raise UnsupportedModel(
            f"{encoder}: {type(hf).__name__} is an encoder with a decoder, and errata edits decoders alone"
        )
    if hasattr(hf, "_hf_hook"):  # accelerate's, which brings states and offloaded weights to where they are needed
        return
    places = {parameter.device for parameter in hf.parameters()}
    if torch.device("meta") in places:
        raise UnsupportedModel(f"the weights of {type(hf).__name__} are not loaded: they are on the device 'meta'")
    if len(places) > 1:
        raise UnsupportedModel(
            f"the weights of {type(hf).__name__} are spread over {len(places)} devices, and nothing moves states "
            "between them. Put them on one, or load the model with a device_map"
        )


def _require_repeatable(hf: PreTrainedModel, calls: dict[str, _Call], ids: Tensor) -> None:
    """The same input must give the same output, module by module; only then can anything be measured."""
    with _recorded(dict(hf.named_modules()), ids.device) as again, _inference(hf):
        _logits(hf, ids)
    for name, call in calls.items():  # inner modules end first, so the first to differ is to blame
        if call.output is not None and (name not in again or not _close(again[name].output, call.output)):
            raise UnsupportedModel(
                f"{name or type(hf).__name__}: it gives another output for the same input, in eval mode"
            )


def _find_blocks(hf: PreTrainedModel, calls: dict[str, _Call]) -> str:
    """The longest outermost `ModuleList` all of whose members ran."""
    ran = {
        name: module
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and {f"{name}.{i}" for i in range(len(module))} <= calls.keys()
    }
    outermost = [name for name in ran if len(ran[name]) and not any(name.startswith(f"{n}.") for n in ran)]
    if not outermost:
        raise UnsupportedModel(f"{type(hf).__name__} has no list of blocks that its forward pass goes through")
    blocks = max(outermost, key=lambda name: len(ran[name]))
    state = None
    for index in range(len(ran[blocks])):
        call = calls[f"{blocks}.{index}"]
        if call.count != 1:
            raise UnsupportedModel(f"{blocks}.{index}: it runs {call.count} times in a pass; a block runs once")
        if call.input is None or call.output is None or call.output.dim() != 3:
            raise UnsupportedModel(f"{blocks}.{index}: it does not map a state [batch, tokens, features] to another")
        if state is not None and not _same(call.input, state):
            raise UnsupportedModel(f"{blocks}.{index}: its input is not the output of the block before it")
        state = call.output
    return blocks


def _require_causal(hf: PreTrainedModel, blocks: str, ids: Tensor, logits: Tensor) -> None:
    """Another last token must leave all logits before it as they are."""
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    with _inference(hf):
        after = _logits(hf, changed)
    if not _close(after[:, :-1], logits[:, :-1]):
        raise UnsupportedModel(
            f"{blocks}: a later token changes the logits before it, so this is an encoder, not a decoder"
        )


def _find_final_norm(calls: dict[str, _Call], blocks: str, count: int, head: str) -> str:
    """The module that turns the last state into what the head reads."""
    state, read = calls[f"{blocks}.{count - 1}"].output, calls[head].input
    for name, call in calls.items():
        inside = name == head or name.startswith(f"{blocks}.")
        if not inside and call.count == 1 and _same(call.input, state) and _same(call.output, read):
            return name
    raise UnsupportedModel(f"{head}: no single norm stands between the last block and the head")


def _find_logit_shape(hf: PreTrainedModel, raw: Tensor, logits: Tensor, head: str) -> tuple[float, float | None]:
    """(logit_scale, softcap) that lead from the head's output to the logits."""
    # The config's word goes first: logits far below the cap do not show that there is one.
    config = hf.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    if cap and _close(cap * torch.tanh(raw / cap), logits):
        return 1.0, float(cap)
    if _close(raw, logits):
        return 1.0, None
    scale = float((raw.double() * logits.double()).sum() / raw.double().square().sum())
    if _close(raw * scale, logits):
        return scale, None
    raise UnsupportedModel(f"{head}: the logits are not its output, nor a scaled or soft-capped form of it")


def _look_inside_all(hf: PreTrainedModel, calls: dict[str, _Call], blocks: str, ids: Tensor) -> dict[str, Any]:
    """The fields of `Anatomy` that lie inside a block; blocks may differ in what mixes tokens there, and in no more."""
    first = _look_inside(hf, calls, f"{blocks}.0", ids)
    mixers = []
    for layer in range(len(hf.get_submodule(blocks))):
        block = f"{blocks}.{layer}"
        if f"{block}.{first['attention']}" in calls:
            mixers.append(first["attention"])
            continue
        own = _look_inside(hf, calls, block, ids)
        mixers.append(own.pop("attention"))
        for name, value in own.items():
            if name == "residual_scale":
                alike = abs(value - first[name]) <= 1e-3 * first[name]  # measured, and so rounded
            else:
                alike = value == first[name]
            if not alike:
                raise UnsupportedModel(
                    f"{block}: its {name} is {value!r}, that of {blocks}.0 is {first[name]!r}; blocks may differ in "
                    "their attention alone"
                )
    return first | ({"mixers": tuple(mixers)} if len(set(mixers)) > 1 else {})


def _look_inside(hf: PreTrainedModel, calls: dict[str, _Call], block: str, ids: Tensor) -> dict[str, Any]:
    """The fields of `Anatomy` that lie inside a block."""
    state, new_state = _tensor(calls[block].input), _tensor(calls[block].output)
    inside = {n.removeprefix(f"{block}."): call for n, call in calls.items() if n.startswith(f"{block}.")}
    children = [
        name
        for name, _ in hf.get_submodule(block).named_children()
        if name in inside and _features(inside[name].output) == state.shape[-1]
    ]
    attention = _find_attention(hf, block, children, ids)
    down = _find_down(hf, block, inside, [name for name in children if name != attention], state.shape[-1])
    value = inside[down].output
    # the outermost module that passes the value on as it is; without an MLP module, the down-projection
    mlp = next(path for path in _ancestors(down) if _same(inside[path].output, value))
    # an attention that adds the residual itself (BLOOM) still has an output projection that does not
    projections = _writers(hf, block, inside, [attention], state.shape[-1])[-1:]

    for a in _branches(inside, [attention, *projections], children):
        for m in _branches(inside, [mlp], children):
            scale = _residual_scale(state, a.written, m.written, new_state)
            if scale is not None:
                return {
                    "attention": a.path,
                    "mlp": m.path,
                    "down": down,
                    "parallel": not _reaches(hf, f"{block}.{a.path}", f"{block}.{down}", block, ids),
                    "attention_norm": a.norm,
                    "mlp_norm": m.norm,
                    "residual_scale": scale,
                }
    outer = _ancestors(down)[0]
    if not _same(inside[outer].output, value):
        raise UnsupportedModel(f"{block}.{outer}: its output is not what its down-projection {block}.{down} writes")
    raise UnsupportedModel(
        f"{block}: its output is not its input plus what {block}.{attention} and {block}.{mlp} write"
    )


def _find_attention(hf: PreTrainedModel, block: str, children: list[str], ids: Tensor) -> str:
    """The one child of a block through which a token sees earlier ones."""
    mixing = [name for name in children if _mixes_tokens(hf, f"{block}.{name}", block, ids)]
    if len(mixing) != 1:
        found = ", ".join(f"{block}.{name}" for name in mixing) or "none"
        raise UnsupportedModel(
            f"{block}: one part of a block, its attention, should let tokens see earlier ones; found: {found}"
        )
    return mixing[0]


def _find_down(hf: PreTrainedModel, block: str, inside: dict[str, _Call], others: list[str], width: int) -> str:
    """The last linear map outside attention that writes as many features as the state has."""
    writers = _writers(hf, block, inside, others, width)
    if writers:
        return writers[-1]
    wide = [n for n in others if any(p.dim() > 1 for p in hf.get_submodule(f"{block}.{n}").parameters())]
    if not wide:
        raise UnsupportedModel(f"{block}: beside its attention it has no MLP to edit")
    raise UnsupportedModel(
        f"{block}.{wide[-1]}: no single linear map writes its output (a mixture of experts has many), "
        "so there is no down-projection to edit"
    )


def _writers(hf: PreTrainedModel, block: str, inside: dict[str, _Call], children: list[str], width: int) -> list[str]:
    """Linear maps to `width` features, in or among some children of a block, in the order of their calls."""
    matrices = {
        name: linear_matrix(hf.get_submodule(f"{block}.{name}")) for name in inside if _ancestors(name)[0] in children
    }
    return [name for name, matrix in matrices.items() if matrix is not None and matrix.shape[0] == width]


@dataclass(frozen=True)
class _Branch:
    """A module that may be one of the two that write to the state."""

    path: str
    norm: str | None  # that its output passes first
    written: Tensor  # what is then added to the state


def _branches(inside: dict[str, _Call], paths: list[str], children: list[str]) -> Iterator[_Branch]:
    """Every way in which the outputs of `paths` may reach the state: as they are, or through a sibling."""
    for path in paths:
        written = _tensor(inside[path].output)
        yield _Branch(path, None, written)
        for norm in children:
            call = inside[norm]
            if norm != path and _same(call.input, written) and call.output is not None:
                yield _Branch(path, norm, call.output)


def _residual_scale(state: Tensor, attention: Tensor, mlp: Tensor, new_state: Tensor) -> float | None:
    """s in new_state = state + s (attention + mlp); None if there is no such s."""
    if _adds_up(state, attention, mlp, new_state, 1.0):
        return 1.0
    written = attention.double().reshape(state.shape) + mlp.double().reshape(state.shape)
    change = new_state.double() - state.double()
    scale = float((written * change).sum() / written.square().sum())
    return scale if scale > 0 and _adds_up(state, attention, mlp, new_state, scale) else None


# ---- verifying ----------------------------------------------------------------------------------------


@without_autocast
def verify(hf: PreTrainedModel, anatomy: Anatomy) -> None:
    """Verify by measurement, in every layer, that the parts behave as `Anatomy` says.

    On one short input: the down-projection's weight times the key, plus bias, is the value; the value is
    the MLP's output; a block's output is its input plus what both branches write; the head of the final
    norm of the last state gives the logits; no token sees a later one.

    Raises:
        UnsupportedModel: if a module does not fit; the message names it.
    """
    layers = [f"{anatomy.blocks}.{layer}" for layer in range(len(hf.get_submodule(anatomy.blocks)))]
    mixers = [anatomy.attention_of(layer) for layer in range(len(layers))]
    inside = {anatomy.mlp, anatomy.down, anatomy.attention_norm, anatomy.mlp_norm} - {None}
    paths = [anatomy.embedding, *layers, anatomy.final_norm, anatomy.head]
    paths += [f"{block}.{name}" for block, mixer in zip(layers, mixers, strict=True) for name in {*inside, mixer}]
    modules = {path: _module_at(hf, path) for path in paths}
    ids = _probe_ids(modules[anatomy.embedding])
    with _recorded(modules, ids.device) as calls, _inference(hf):
        logits = _logits(hf, ids)
    for path in paths:
        if path not in calls or calls[path].output is None or calls[path].input is None:
            raise UnsupportedModel(f"{path}: it does not run in a forward pass, or not on a tensor")
    for block, mixer in zip(layers, mixers, strict=True):
        _verify_block(calls, modules, anatomy, block, mixer)
    with _inference(hf):
        normed = modules[anatomy.final_norm](calls[layers[-1]].output)
        again = softcapped(modules[anatomy.head](normed).to(logits.device), anatomy)
    if not _close(again, logits):
        raise UnsupportedModel(
            f"{anatomy.head}: it does not turn {anatomy.final_norm} of the last state into the logits"
        )
    _require_causal(hf, anatomy.blocks, ids, logits)


def _verify_block(
    calls: dict[str, _Call], modules: dict[str, nn.Module], anatomy: Anatomy, block: str, mixer: str
) -> None:
    down, mlp = f"{block}.{anatomy.down}", f"{block}.{anatomy.mlp}"
    state, new_state = _tensor(calls[block].input), _tensor(calls[block].output)
    key, value = _tensor(calls[down].input), _tensor(calls[down].output)
    with at_hand(modules[down]):
        weight = linear_matrix(modules[down])
        if weight is None:
            raise UnsupportedModel(f"{down}: it is not a linear map with a weight of its own")
        again = nn.functional.linear(key.to(weight.device), weight.detach(), getattr(modules[down], "bias", None))
    if not _close(again.to(value.device), value):
        raise UnsupportedModel(f"{down}: its weight times its input, plus bias, is not its output")
    if not _close(value, _tensor(calls[mlp].output)):
        raise UnsupportedModel(f"{mlp}: its output is not what its down-projection {down} writes")
    attention = _tensor(calls[f"{block}.{anatomy.attention_norm or mixer}"].output)
    written = _tensor(calls[f"{block}.{anatomy.mlp_norm or anatomy.mlp}"].output)
    if not _adds_up(state, attention, written, new_state, anatomy.residual_scale):
        raise UnsupportedModel(f"{block}: its output is not its input plus what its {mixer} and {anatomy.mlp} write")


def _module_at(hf: PreTrainedModel, path: str) -> nn.Module:
    try:
        return hf.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"{path}: there is no such module, though another block has one; all blocks must be alike"
        ) from None


# ---- measuring ----------------------------------------------------------------------------------------

# Relative to the largest feature of each token: rounding passes, another computation does not.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_PROBE_LENGTH = 7


@dataclass
class _Call:
    """Input and output of a module: the first tensor of each, copied."""

    input: Tensor | None
    output: Tensor | None
    count: int = 1


class _Stop(Exception):
    """Enough of the forward pass has run."""


@unbroken
def _recorded(modules: dict[str, nn.Module], device: torch.device) -> Iterator[dict[str, _Call]]:
    """Calls of the named modules by name, in the order in which their first calls ended; tensors on `device`."""
    calls: dict[str, _Call] = {}
    inputs: dict[str, Tensor | None] = {}

    def before(name: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            inputs[name] = None if tensor is None else tensor.to(device, copy=True)

        return note

    def after(name: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            tensor = tensor.to(device, copy=True) if isinstance(tensor, Tensor) else None
            if name in calls:
                calls[name].count += 1
            else:
                calls[name] = _Call(inputs[name], tensor)

        return note

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        yield calls


@unbroken
def _inference(hf: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, then the modes as they were."""
    training = [module for module in hf.modules() if module.training]
    hf.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _logits(hf: PreTrainedModel, ids: Tensor) -> Tensor:
    try:
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except _Stop:
        raise
    except Exception as error:  # whatever a foreign forward pass raises, the model cannot be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModel(f"{type(hf).__name__} does not run on token ids alone ({reason})") from error
    if not logits.isfinite().all():
        raise UnsupportedModel(
            f"{type(hf).__name__}: its logits are not finite on a short text in {logits.dtype}. "
            "Load it with dtype='float32'; if that does not help, its weights are broken"
        )
    return logits


def _probe_ids(embedding: nn.Module) -> Tensor:
    """A few different token ids `[1, t]`, the same every time."""
    weight = embedding.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(weight), generator=generator)[:_PROBE_LENGTH][None].to(place(embedding))


def _mixes_tokens(hf: PreTrainedModel, path: str, block: str, ids: Tensor) -> bool:
    """Whether a module's output at the last token depends on its input at earlier ones."""

    def disturb(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(_with_other_past, args)), {k: _with_other_past(v) for k, v in kwargs.items()}

    plain = _run_until(hf, path, block, ids)
    with attached(lambda: hf.get_submodule(path).register_forward_pre_hook(disturb, with_kwargs=True)):
        return not _close(_run_until(hf, path, block, ids)[:, -1], plain[:, -1])


def _with_other_past(value: Any) -> Any:
    """A state `[1, t, d]` with every token but its last one changed; anything else as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == (1, _PROBE_LENGTH)):
        return value
    changed = value.clone()
    changed[:, :-1] = changed[:, :-1].flip(-1) + 1
    return changed


def _reaches(hf: PreTrainedModel, source: str, target: str, block: str, ids: Tensor) -> bool:
    """Whether a change of one module's output changes another module's output in the same block."""

    def shift(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tensor = _tensor(output[0] if isinstance(output, tuple) else output)
        changed = tensor + torch.linspace(-1, 1, tensor.shape[-1], device=tensor.device, dtype=tensor.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    plain = _run_until(hf, target, block, ids)
    with attached(lambda: hf.get_submodule(source).register_forward_hook(shift)):
        return not torch.equal(_run_until(hf, target, block, ids), plain)


def _run_until(hf: PreTrainedModel, path: str, block: str, ids: Tensor) -> Tensor:
    """The output of a module inside `block`; the forward pass stops with the block."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> NoReturn:
        raise _Stop

    with (
        _recorded({path: hf.get_submodule(path)}, ids.device) as calls,
        _inference(hf),
        contextlib.suppress(_Stop),
        attached(lambda: hf.get_submodule(block).register_forward_hook(stop)),
    ):
        _logits(hf, ids)
    output = _tensor(calls[path].output)
    return output.reshape(1, _PROBE_LENGTH, -1)


def _ancestors(path: str) -> list[str]:
    """From "a.b.c", the list ["a", "a.b", "a.b.c"]."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise UnsupportedModel(f"a module returned {type(value).__name__} where a tensor was wanted")
    return value


def _features(tensor: Tensor | None) -> int | None:
    return tensor.shape[-1] if isinstance(tensor, Tensor) and tensor.dim() >= 2 else None


def _module_or_none(getter: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal values, whether or not a batch dimension was folded away."""
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b)


def _close(a: Tensor | None, b: Tensor) -> bool:
    """Equal up to rounding, judged token by token, whether or not a batch dimension was folded away."""
    if a is None or a.numel() != b.numel():
        return False
    a = a.reshape(b.shape)
    if torch.equal(a, b):  # infinities too
        return True
    if not b.is_floating_point():
        return False
    size = b.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
    return bool(((a - b).abs() <= _TOLERANCE.get(b.dtype, 2e-2) * size).all())


def _adds_up(state: Tensor, attention: Tensor, mlp: Tensor, new_state: Tensor, scale: float) -> bool:
    """new_state = state + scale (attention + mlp), up to the rounding of a few additions, feature by feature.

    Sharper than `_close`: next to the huge features that some states have, a branch could be anything.
    """
    if attention.numel() != state.numel() or mlp.numel() != state.numel():
        return False
    state = state.double()
    attention = scale * attention.double().reshape(state.shape)
    mlp = scale * mlp.double().reshape(state.shape)
    size = state.abs() + attention.abs() + mlp.abs()
    error = (new_state.double() - (state + attention + mlp)).abs()
    return bool((error <= 8 * torch.finfo(new_state.dtype).eps * size).all())
