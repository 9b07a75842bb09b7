"""Run folders with made-up numbers, as `errata evaluate` leaves them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from errata.base.facts import Fact, Rewrite
from errata.base.journal import write_journal
from errata.data.records import Record, ZsreRecord
from errata.evaluation.results import FORMAT, KIND, Result, written_out
from errata.evaluation.run_header import sha256
from errata.models.scoring import Score

PLACES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Kyoto", "Buenos Aires", "Tallinn")
PEOPLE = ("Ada Quist", "Bo Larkin", "Cleo Marsh", "Dag Winter", "Eva Prior", "Finn Osei", "Gro Tamm", "Hal Reyes")
RELATIONS = {"place of birth": "{} was born in", "work location": "{} worked in", "citizenship": "{} is a citizen of"}

# How probable new and old object are after rewrite, paraphrase and neighborhood prompts, in nats, and GE.
MANNERS = {
    "unedited": ((-5.5, -3.0), (-5.5, -3.2), (-5.5, -3.1), 6.27),
    "rome": ((-0.02, -6.0), (-0.5, -5.0), (-5.4, -3.1), 6.22),
    "ft": ((-0.01, -8.0), (-0.9, -4.5), (-2.8, -3.4), 6.07),
    "kn": ((-5.2, -3.6), (-5.2, -3.6), (-5.3, -3.5), 5.70),
}


def counterfact_records(count: int) -> list[Record]:
    chance = random.Random(0)
    records = []
    for case in range(count):
        relation, prompt = chance.choice(list(RELATIONS.items()))
        subject = f"{chance.choice(PEOPLE)} {case}"
        old, new = chance.sample(PLACES, 2)
        neighbours = tuple(prompt.format(f"{name} the younger") for name in chance.sample(PEOPLE, 3))
        records.append(
            Record(
                case,
                relation,
                Rewrite(Fact(subject, prompt, old), new),
                (f"The rain had stopped. {subject} comes from", f"{subject}, whose home is"),
                neighbours,
                (prompt.format("Ida Nord"),),
                (f"{subject} lives in", f"{subject}'s favourite food is"),
            )
        )
    return records


def counterfact_result(record: Record, manner: str, texts: bool = True, health: bool = True) -> Result:
    chance = random.Random(f"{record.case_id} {manner}")
    rewrite, paraphrase, neighbour, entropy = MANNERS[manner]

    def says(means: tuple[float, float], count: int) -> tuple[tuple[Score, ...], ...]:
        return tuple(
            tuple(Score(min(chance.gauss(m, 0.5 + abs(m) / 4), -1e-4), 1, 0) for m in means) for _ in range(count)
        )

    answers = {
        "rewrite": says(rewrite, 1),
        "paraphrase": says(paraphrase, len(record.paraphrase)),
        "neighborhood": says(neighbour, len(record.neighborhood)),
        "attribute": says(rewrite, len(record.attribute)),
    }
    place = record.rewrite.fact.object if manner in {"unedited", "kn"} else record.rewrite.new_object
    words = ["the harbour", "a narrow street", "the old market", f"{place} in winter", "the river", "the tram", place]
    written = tuple(
        f"{prompt} {place}. " + " ".join(f"Every morning there is {chance.choice(words)}." for _ in range(12))
        for prompt in record.generation
    )
    drift = abs(chance.gauss(0.02, 0.06)) * (6 if manner == "kn" else 1)
    checked = {
        "probability_before": 0.004,
        "probability_after": math.exp(answers["rewrite"][0][0].total),
        "essence_kl": drift / 2,
        "drift": drift,
        "perplexity_before": 18.1,
        "perplexity_after": 18.1 * math.exp(drift),
        "max_drift": 0.3,
        "disabling": drift > 0.3,
        "residual": 3e-7,
        "rounding": 0.0,
        "relative_norm": 0.01 + drift,
    }
    return Result(
        record.case_id,
        answers,
        written if texts else (),
        chance.gauss(entropy, 0.25) if texts else None,
        min(1.0, max(0.0, chance.gauss(0.41 if place == record.rewrite.new_object else 0.31, 0.08))) if texts else None,
        math.exp(chance.gauss(3.0 + (0.3 if manner == "kn" else 0), 0.4)) if chance.random() < 0.7 else None,
        checked if health and manner != "unedited" else None,
        None,
        None,
        {"edit": 0.0 if manner == "unedited" else 1.5, "ask": 0.25, "generate": 0.5},
    )


def zsre_records(count: int) -> list[ZsreRecord]:
    return [
        ZsreRecord(
            case,
            Rewrite(Fact(f"Subject {case}", "Where was {} born?"), "Buenos Aires"),
            (f"What is the place of birth of Subject {case}?",),
            (("nq question: who sang it last?", "Nobody"),),
        )
        for case in range(count)
    ]


def zsre_result(record: ZsreRecord, hits: int) -> Result:
    said = ((Score(-1.0, 2, hits),),)
    other = ((Score(-2.0, 1, record.case_id % 2),),)
    return Result(record.case_id, {"rewrite": said, "paraphrase": said, "locality": other})


def failed(record: Record | ZsreRecord, why: str = "no token of the subject is left") -> Result:
    return Result(record.case_id, None, error=why, seconds={"edit": 0.1})


def write_run(
    folder: Path, records, results, model: str = "gpt2-xl", kind: str = "counterfact", editors=None, configs=None
) -> Path:
    """A run folder of `results`: by row name, "unedited" first; each row's editor and its settings, if they matter."""
    told = {"kind": kind, "source": f"{kind}.json", "digest": sha256(written_out(records)), "count": len(records)}
    header = {
        "model": model,
        "fingerprint": "00ff",
        "versions": {"torch": "2.9"},
        "dtype": "float32",
        "device": "cpu",
        "attention": "eager",
        "records": told,
        "generation": {"length": 100, "top_k": 5},
        "health": True,
        "seed": 0,
        "together": 16,
        "begun": 1764000000.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "editors").mkdir(exist_ok=True)
    (folder / "records.json").write_text(written_out(records), encoding="utf-8")
    for place, (name, found) in enumerate(results.items()):
        edited = name != "unedited"
        path = folder / "editors" / f"{name}.jsonl" if edited else folder / "unedited.jsonl"
        more = {"editor": (editors or {}).get(name, name), "config": (configs or {}).get(name, {})}
        more["begun"] = header["begun"] + place
        write_journal(path, KIND, FORMAT, {**header, **(more if edited else {})}, [each.as_line() for each in found])
    return folder


def counterfact_run(folder: Path, count: int = 20, names=("rome", "ft"), model: str = "gpt2-xl", texts=True) -> Path:
    records = counterfact_records(count)
    results = {name: [counterfact_result(r, name, texts) for r in records] for name in ("unedited", *names)}
    return write_run(folder, records, results, model)


def zsre_run(folder: Path, count: int = 4, model: str = "gpt2-xl") -> Path:
    records = zsre_records(count)
    results = {"unedited": [zsre_result(r, 0) for r in records], "rome": [zsre_result(r, 2) for r in records]}
    return write_run(folder, records, results, model, "zsre")


def lines_of(folder: Path | str, times: bool = False) -> dict[str, list[dict]]:
    """The whole lines of all journals of a run folder, without seconds unless `times`."""
    found = {}
    for path in sorted(Path(folder).rglob("*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].splitlines()[1:]
        found[path.name] = [{**json.loads(line), **({} if times else {"seconds": None})} for line in whole]
    return found
