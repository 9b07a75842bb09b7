"""How fast editing is: the plain way against replay, in one run on one machine.

The plain way is what the published code does: for the key a forward pass of the contexts; for the value, at every step,
a full forward and backward pass of all contexts and the essence prompt, the head on every position; for statistics, one
layer a pass. Models have random weights: speed does not depend on what they know.

    python benchmarks/editing.py                    # all of it
    python benchmarks/editing.py one statistics     # some of it, by name
    python benchmarks/editing.py --json             # the same as JSON
"""

from __future__ import annotations

import math
import random
import resource
from statistics import fmean

import torch
from common import VOCABULARY, fact_of, gpt2, main, row, timed

from errata.base.facts import Rewrite
from errata.editors.rome import RomeConfig, rome
from errata.edits.edit import Edit
from errata.models.model import Model
from errata.models.scoring import score
from errata.statistics import SecondMoment, collect

STEPS, LEARNING_RATE, DECAY, KL, CLAMP = 20, 0.5, 0.5, 0.0625, 4.0
LAYER = 4  # of 12, about where GPT-2 XL is edited of 48
# Tokens of a prompt, and of what of it begins with the subject's last: 32 quantiles of CounterFact in GPT-2's tokens.
COUNTERFACT = [
    (5, 2),
    (7, 2),
    (8, 2),
    (9, 2),
    (10, 2),
    (11, 2),
    (15, 2),
    (5, 3),
    (5, 3),
    (6, 3),
    (7, 3),
    (8, 3),
    (5, 4),
    (6, 4),
    (6, 4),
    (7, 4),
    (7, 4),
    (8, 4),
    (8, 4),
    (9, 4),
    (14, 4),
    (6, 5),
    (7, 5),
    (9, 5),
    (10, 5),
    (7, 6),
    (9, 6),
    (9, 6),
    (10, 6),
    (11, 6),
    (8, 7),
    (11, 8),
]


def prefixes() -> tuple[str, ...]:
    """Ten of 5 tokens, ten of 10, and the bare prompt, as in the published code."""
    draw = random.Random(0)
    return ("", *("".join(f"w{draw.randrange(1, VOCABULARY)} " for _ in range(n)) for n in [5] * 10 + [10] * 10))


def config_of(layer: int, **changes: object) -> RomeConfig:
    """The published code's settings, all steps, and no probing, which it does not do."""
    own = {"layer": layer, "key": "reference", "prefixes": prefixes(), "stop_below": 0.0, "kl_prompt": "{} w1 w2"}
    return RomeConfig(**{**own, "steps": STEPS, "max_drift": None, **changes})


def rewrite_of(seed: int, length: int = 6, subject: int = 2) -> Rewrite:
    """As many tokens as "Steve Jobs was the founder of", the published code's own example; one of the new object."""
    return fact_of(length, subject, seed=seed).rewrite(f"w{1000 + seed}")


def moment_of(model: Model, layer: int) -> SecondMoment:
    """A well-conditioned C."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2 * model.d_mlp, model.d_mlp, generator=generator)
    return SecondMoment(keys.T @ keys / len(keys), len(keys), layer)


def texts(tokens: int, length: int = 256) -> list[str]:
    draw = random.Random(1)
    return [" ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(length)) for _ in range(tokens // length)]


# ---- the plain way ------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def plain_edit(model: Model, rewrite: Rewrite, layer: int, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two vectors of the change, `[d_model]` and `[d_mlp]`; C⁻¹ is there, as it is kept between edits."""
    hf, tokenizer = model.hf, model.tokenizer
    module = hf.transformer.h[layer].mlp.c_proj
    contexts = [prefix + rewrite.text for prefix in prefixes()]
    before = len(rewrite.subject.split()) - 1
    lookups = torch.tensor([len(prefix.split()) + before for prefix in prefixes()])
    (target,) = tokenizer(rewrite.new_object)["input_ids"]

    def batch(rows: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [tokenizer(text)["input_ids"] for text in rows]
        width = max(map(len, ids))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return padded, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])

    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for rows in (contexts, [rewrite.text]):
        ids, mask = batch(rows)
        with torch.no_grad():
            hf(input_ids=ids, attention_mask=mask)
    hook.remove()
    mean = seen[0][range(len(contexts)), lookups].mean(0)
    direction = inverse @ mean
    direction = direction / direction.norm()
    bare_key = seen[1][0, before]

    ids, mask = batch([*contexts, f"{rewrite.subject} w1 w2"])
    all_lookups = torch.cat([lookups, torch.tensor([before])])
    ends = mask[:-1].sum(1) - 1
    labels = torch.full_like(ids[:-1], -100)
    labels[range(len(contexts)), ends] = target
    delta = torch.zeros(model.d_model, dtype=torch.float32, requires_grad=True)
    first: list[torch.Tensor] = []

    def add(_, args, output):
        if not first:
            first.append(output[0, before].detach().clone())
        for each, place in enumerate(all_lookups):
            output[each, place] = output[each, place] + delta.to(output)
        return output

    adam = torch.optim.Adam([delta], lr=LEARNING_RATE)
    hf.requires_grad_(False)
    untouched = None
    hook = module.register_forward_hook(add)
    try:
        for step in range(STEPS):
            adam.zero_grad()
            logits = hf(input_ids=ids, attention_mask=mask).logits
            kl_logs = logits[-1, before].float().log_softmax(-1)
            if untouched is None:
                untouched = kl_logs.detach().clone()
            logs = logits[:-1].float().log_softmax(2)
            picked = logs.gather(2, labels.clamp_min(0)[..., None]).squeeze(2)
            nll = -(picked * (labels != -100)).sum(1).mean()
            kl = KL * torch.nn.functional.kl_div(untouched[None], kl_logs[None], log_target=True, reduction="batchmean")
            size = first[0].float().norm()
            loss = nll + kl + DECAY * delta.norm() / size**2
            if step == STEPS - 1:
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                if delta.norm() > CLAMP * size:
                    delta.mul_(CLAMP * size / delta.norm())
    finally:
        hook.remove()
    write = delta.detach() / torch.dot(bare_key.float(), direction.float())
    return write, direction


def plain_statistics(model: Model, layer: int, rows: list[str]) -> torch.Tensor:
    """C of one layer, which stops the pass, 3,072 tokens at a time."""
    total, count = torch.zeros(model.d_mlp, model.d_mlp), 0
    seen: list[torch.Tensor] = []

    def read(_, args):
        seen.append(args[0])
        raise _Stop

    hook = model.hf.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(read)
    for begin in range(0, len(rows), 12):
        ids = torch.tensor([model.tokenizer(text)["input_ids"] for text in rows[begin : begin + 12]])
        try:
            with torch.no_grad():
                model.hf(input_ids=ids, attention_mask=torch.ones_like(ids))
        except _Stop:
            pass
        keys = seen.pop().flatten(0, 1)
        total += keys.T @ keys
        count += len(keys)
    hook.remove()
    return total / count


# ---- the table ----------------------------------------------------------------------------------------


def difference(edit: Edit, plain: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of two changes of a weight, relative to the largest entry."""
    wanted = torch.outer(*plain)
    return float((edit.deltas[0].matrix() - wanted).abs().max() / wanted.abs().max())


def probability(model: Model, edit: Edit) -> float:
    (rewrite,) = edit.rewrites
    with edit.applied(model):
        return math.exp(score(model, [rewrite.text], [rewrite.new_object])[0].total)


def one() -> list[dict]:
    """One edit, GPT-2 small's shape, one thread, float32."""
    torch.set_num_threads(1)
    model = gpt2(12, 768)
    moment = moment_of(model, LAYER)
    inverse = torch.linalg.inv(moment.matrix).float()
    moment.solve(moment.matrix[0])  # factorised once for all edits, as the plain way's inverse
    rome(model, rewrite_of(1), config_of(LAYER, steps=1), second_moment=moment)  # warm
    rows = []
    for length, subject in ((6, 2), (8, 5)):  # the published code's example, and CounterFact's mean
        rewrite = rewrite_of(0, length, subject)
        wanted, plain = timed(plain_edit, model, rewrite, LAYER, inverse)
        found, ours = timed(rome, model, rewrite, config_of(LAYER), second_moment=moment)
        probed = config_of(LAYER, max_drift=1e9, probes=tuple(texts(96, 24)))
        _, with_health = timed(rome, model, rewrite, probed, second_moment=moment)
        shape = (
            f"12 x 768, layer {LAYER}, subject {subject} of {length} tokens, 21 contexts and the KL prompt, {STEPS} "
            "steps, "
            "1 thread, float32"
        )
        off = difference(found, wanted)
        rows.append(row(f"one edit ({shape})", plain, ours, largest_relative_difference=off))
        rows.append(row(f"the same, with its side effects on 4 texts of 24 tokens ({shape})", plain, with_health))
    return rows


def many() -> list[dict]:
    """32 edits of CounterFact's lengths together, two threads; the plain way one by one, of which four are timed."""
    torch.set_num_threads(2)
    model = gpt2(12, 768)
    moment = moment_of(model, LAYER)
    inverse = torch.linalg.inv(moment.matrix).float()
    moment.solve(moment.matrix[0])
    rewrites = [rewrite_of(i, length, length - tail + 1) for i, (length, tail) in enumerate(COUNTERFACT)]
    rome(model, rewrites[:2], config_of(LAYER, steps=1), second_moment=moment)  # warm
    plain = [timed(plain_edit, model, rewrite, LAYER, inverse) for rewrite in rewrites[::8]]
    edits, ours = timed(rome, model, rewrites, config_of(LAYER), second_moment=moment)
    off = max(difference(edit, wanted) for edit, (wanted, _) in zip(edits[::8], plain, strict=True))
    shape = f"12 x 768, layer {LAYER}, CounterFact's lengths, {STEPS} steps, 2 threads, float32"
    return [
        row(
            f"32 edits together, seconds an edit ({shape})",
            fmean(s for _, s in plain),
            ours / 32,
            largest_relative_difference=off,
        )
    ]


def bfloat16() -> list[dict]:
    """One edit of a model in bfloat16, against the plain way in float32."""
    torch.set_num_threads(1)
    model, rewrite = gpt2(12, 768), rewrite_of(0)
    moment = moment_of(model, LAYER)
    inverse = torch.linalg.inv(moment.matrix).float()
    _, plain = timed(plain_edit, model, rewrite, LAYER, inverse)
    exact = rome(model, rewrite, config_of(LAYER), second_moment=moment)
    wanted = probability(model, exact)
    half = gpt2(12, 768, torch.bfloat16)
    moment.solve(moment.matrix[0])
    rome(half, rewrite_of(1), config_of(LAYER, steps=1), second_moment=moment)  # warm
    found, ours = timed(rome, half, rewrite, config_of(LAYER), second_moment=moment)
    shape = f"12 x 768, layer {LAYER}, {STEPS} steps, 1 thread, plain in float32"
    more = {"target_probability_float32": wanted, "target_probability_bfloat16": probability(half, found)}
    return [row(f"one edit in bfloat16 ({shape})", plain, ours, **more, **_rounding(found))]


def _rounding(edit: Edit) -> dict[str, float]:
    return {"residual": edit.notes["residual"], "rounding": edit.notes["rounding"]}


def statistics() -> list[dict]:
    """Second moments of all 12 layers, against the plain way's one last layer."""
    torch.set_num_threads(1)
    model, rows = gpt2(12, 768), texts(3072 * 4)
    plain_statistics(model, 11, rows[:12])  # warm
    wanted, plain = timed(plain_statistics, model, 11, rows)
    found, ours = timed(collect, model, range(12), rows)
    off = float((found[11].matrix - wanted).abs().max() / wanted.abs().max())
    work = "second moments of all 12 layers, 12,288 tokens; plain: of layer 11 alone (12 x 768, 1 thread, float32)"
    return [row(work, plain, ours, times_plain=ours / plain, largest_relative_difference=off)]


def xl() -> list[dict]:
    """One edit at GPT-2 XL's shape, layer 17, float32, two threads, and the memory that it took."""
    torch.set_num_threads(2)
    model = gpt2(48, 1600)
    moment = moment_of(model, 17)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, first = timed(moment.solve, moment.matrix[0])
    _, ours = timed(rome, model, rewrite_of(0), config_of(17), second_moment=moment)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = f"one edit, GPT-2 XL's shape (48 x 1600, layer 17, {STEPS} steps, 2 threads, float32)"
    memory = {"peak_memory_gb": after / 2**20, "model_loaded_gb": before / 2**20}
    return [row(work, None, ours, factorising_c_s=first, **memory)]


WORKS = {"one": one, "bfloat16": bfloat16, "many": many, "statistics": statistics, "xl": xl}

if __name__ == "__main__":
    main(__doc__, WORKS)
