"""How fast edits are measured: the plain way against many records a pass, in one run on one machine.

The plain way is what the published code does, records one by one: both targets of every prompt as rows of one padded
batch, a full forward pass of it with the head on every position, before and after the edit, which is put on the weight
and taken off again; texts by sampling from one record's prompts with the attention cache. Models have random weights:
speed does not depend on what they know. Lengths are those of CounterFact in GPT-2's tokens, all targets one token.

    python benchmarks/evaluation.py                     # all of it but xl
    python benchmarks/evaluation.py one many            # some of it, by name
    python benchmarks/evaluation.py xl                  # GPT-2 XL's shape, on a GPU if there is one
    python benchmarks/evaluation.py --json
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial

import torch
from common import VOCABULARY, gpt2, main, row, timed
from transformers import GenerationConfig

import errata
from errata.atlas import records as atlas_records
from errata.base.facts import Fact
from errata.data.records import Record
from errata.editors.rome import rome
from errata.edits.delta import RankOne
from errata.edits.edit import Edit
from errata.evaluation import measure
from errata.evaluation.executors import Cluster, Here
from errata.evaluation.measure import Generation, Measures
from errata.evaluation.runner import TOGETHER, evaluate
from errata.metrics.requests import score_requests
from errata.metrics.side_effects import sampled_texts
from errata.models.model import Model
from errata.models.weights import add_, down_weight_name, matrix
from errata.statistics import SecondMoment
from errata.tasks.counterfact import COUNTERFACT

LAYER = 4  # of 12, about where GPT-2 XL is edited of 48
# Tokens of prompts: deciles of CounterFact's in GPT-2's tokens; paraphrases are longer.
PROMPTS = (5, 6, 7, 7, 8, 8, 9, 9, 10, 15)
PARAPHRASES = (6, 7, 8, 8, 9, 10, 11, 13, 16, 25)


def records(count: int, generation: int = 0) -> list[Record]:
    draw = random.Random(0)

    def text(lengths: Sequence[int]) -> str:
        return " ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(draw.choice(lengths)))

    def made(case: int) -> Record:
        words = text(PROMPTS).split()
        subject = min(4, len(words) - 1)
        fact = Fact(" ".join(words[:subject]), " ".join(["{}", *words[subject:]]), f"w{draw.randrange(1, VOCABULARY)}")
        openings = [text(PROMPTS) for _ in range(3)]
        return Record(
            case,
            "",
            fact.rewrite(f"w{draw.randrange(1, VOCABULARY)}"),
            tuple(text(PARAPHRASES) for _ in range(2)),
            tuple(text(PROMPTS) for _ in range(10)),
            (),
            tuple(draw.choice(openings) for _ in range(generation)),
        )

    return [made(case) for case in range(count)]


def edits_of(model: Model, count: int, seed: int = 0) -> list[Edit]:
    """Changes of about the size of ROME's: they move what is said, and break nothing."""
    generator = torch.Generator().manual_seed(seed)
    name = down_weight_name(model, LAYER)
    write = torch.randn(count, model.d_model, generator=generator)
    read = torch.randn(count, model.d_mlp, generator=generator)
    return [
        Edit.of(model, [RankOne(name, w / w.norm(), r / r.norm())], "random") for w, r in zip(write, read, strict=True)
    ]


@torch.no_grad()
def plain_answers(model: Model, record: Record) -> list[float]:
    """Log-probability of the new object, then of the old, after each prompt."""
    asked = [(request.prompt, target) for request in COUNTERFACT.requests(record) for target in request.targets]
    ids = [model.tokenizer(f"{prompt} {target}")["input_ids"] for prompt, target in asked]
    ends = [len(model.tokenizer(prompt)["input_ids"]) for prompt, _ in asked]
    width = max(map(len, ids))
    batch = torch.tensor([one + [0] * (width - len(one)) for one in ids], device=model.device)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=model.device)
    logits = model.hf(input_ids=batch, attention_mask=mask).logits
    return [
        sum(float(logits[i, at - 1].log_softmax(0)[one[at]]) for at in range(end, len(one)))
        for i, (one, end) in enumerate(zip(ids, ends, strict=True))
    ]


def plain_texts(model: Model, record: Record) -> list[str]:
    """Texts of 100 tokens in all, drawn from the five most probable tokens."""
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in record.generation]
    width = max(map(len, rows))
    batch = torch.tensor([[0] * (width - len(one)) + one for one in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in rows], device=model.device)
    settings = GenerationConfig(max_length=100, do_sample=True, top_k=5, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        output = model.hf.generate(input_ids=batch, attention_mask=mask, generation_config=settings)
    return list(model.tokenizer.batch_decode(output))


def plain(model: Model, record: Record, edit: Edit) -> list[float]:
    found = []
    weight = matrix(model, edit.weights[0]).detach()
    kept = weight.clone()
    for put_on in (False, True):
        if put_on:
            add_(model, edit.weights[0], edit.deltas[0].matrix())
        found += plain_answers(model, record)
        if record.generation:
            plain_texts(model, record)
    with torch.no_grad():
        weight.copy_(kept)
    return found


def ours(model: Model, some: Sequence[Record], *editors: Sequence[Edit]) -> list[list[float]]:
    """As `plain`, of each record with the first editor's edits; what is unedited is measured once for all editors."""
    asked = [request for record in some for request in COUNTERFACT.requests(record)]
    owners = [i for i, record in enumerate(some) for _ in COUNTERFACT.requests(record)]
    variants = [[None] * len(asked), *([edits[i] for i in owners] for edits in editors)]
    before, after, *_ = score_requests(model, asked, variants)
    if some[0].generation:
        settings = Measures(generation=Generation())
        for each in ([None] * len(some), *editors):
            measure._written(model, COUNTERFACT, some, each, settings)
    return [
        [
            each.total
            for said in (before, after)
            for one, owner in zip(said, owners, strict=True)
            if owner == i
            for each in one
        ]
        for i in range(len(some))
    ]


def compared(
    work: str,
    count: int,
    threads: int,
    generation: int = 0,
    plain_of: int | None = None,
    together: int = TOGETHER,
    editors: int = 1,
) -> list[dict]:
    """The plain way is timed on the first few of many records, and told per record and editor like ours."""
    torch.set_num_threads(threads)
    model = gpt2(12, 768)
    some = records(count, generation)
    edits, *others = [edits_of(model, count, seed) for seed in range(editors)]
    ours(model, some[:1], edits[:1])
    plain(model, records(1)[0], edits[0])
    few = plain_of or count
    theirs, seconds = timed(lambda: [plain(model, *pair) for pair in zip(some[:few], edits[:few], strict=True)])
    found: list[list[float]] = []
    begin = time.perf_counter()
    for start in range(0, count, together):
        part = slice(start, start + together)
        found += ours(model, some[part], edits[part], *(each[part] for each in others))
    own = (time.perf_counter() - begin) / editors
    apart = max(abs(a - b) for x, y in zip(theirs, found, strict=False) for a, b in zip(x, y, strict=True))
    moved = max(abs(one[i] - one[i + len(one) // 2]) for one in found for i in range(len(one) // 2))
    return [row(work, seconds / few, own / count, threads=threads, records=count, difference=apart, moved=moved)]


def one() -> list[dict]:
    return compared("one record, before and after; mean of ten", 10, 1, together=1)


def many() -> list[dict]:
    return compared("200 records, per record", 200, 2, plain_of=50)


def generation() -> list[dict]:
    return [
        *compared("50 records with texts, per record", 50, 2, generation=10, plain_of=8),
        *compared("the same of 4 editors at once, per record and editor", 16, 2, 10, plain_of=4, editors=4),
    ]


def atlas() -> list[dict]:
    """ROME on 500 of the atlas's records, edits included, no texts: a row of Table 2. Workers' start is included."""
    torch.set_num_threads(2)
    model = errata.load_model("atlas")
    editor = rome.bind(model)
    found = []
    for work, health, workers in (
        ("atlas: ROME row, 500 records, 2 threads", False, 0),
        ("the same on 2 Ray workers of a thread each", False, 2),
        ("the same with side effects", True, 2),
    ):
        settings = Measures(probes=sampled_texts(model, 0) if health else ())
        executor = Cluster(model, partial(errata.load_model, "atlas"), workers=workers) if workers else Here(model)
        with tempfile.TemporaryDirectory() as folder:
            some = atlas_records.records(500)
            _, seconds = timed(evaluate, model, some, {"rome": editor}, folder, settings, executor=executor)
        found.append(row(work, None, seconds, minutes=seconds / 60))
    return found


def xl() -> list[dict]:
    """ROME on GPT-2 XL's shape, edits included, no texts."""
    on_gpu = torch.cuda.is_available()
    count = 512 if on_gpu else 16
    model = gpt2(48, 1600)
    if on_gpu:
        model.hf.to("cuda")
    settings = {"layer": 17, "prefixes": "paper", "stop_below": 0.0, "kl_prompt": "{} w1 w2"}
    editor = rome.bind(model, second_moment=SecondMoment.identity(model.d_mlp), **settings)
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = timed(evaluate, model, records(count), {"rome": editor}, folder, Measures())
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan")
    return [
        row(
            f"GPT-2 XL's shape: ROME, {count} records", None, seconds, minutes_for_7500=seconds / count * 125, gb=memory
        )
    ]


if __name__ == "__main__":
    works = {"one": one, "many": many, "generation": generation, "atlas": atlas, "xl": xl}
    if not {"xl", *sys.argv} - {"xl", "--json", sys.argv[0]} and "xl" not in sys.argv:
        sys.argv += [name for name in works if name != "xl"]
    main(__doc__, works)
