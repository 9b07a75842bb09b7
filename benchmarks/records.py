"""Scores and side effects of edits on the atlas's own records, for each way of making an edit.

    python benchmarks/records.py --records 500            # a table
    python benchmarks/records.py --records 500 --json     # the same as JSON

The ways: one by one with one key everywhere (`consistent`), with the published code's two keys (`reference`), many
together (`batched`, with the difference to one by one), and with weights in bfloat16 (`bfloat16`); `--ways` names some.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import fmean, median

import torch
from rich.console import Console
from rich.table import Table

import errata
from errata.atlas.records import records
from errata.base.errors import ErrataError
from errata.data.records import Record
from errata.editors.rome.contexts import prefixes
from errata.edits.edit import Edit
from errata.metrics.summary import Estimate
from errata.models.model import Model
from errata.tasks.counterfact import COUNTERFACT, score_record
from errata.tasks.task import estimates

WAYS = ("consistent", "reference", "batched", "bfloat16")
METRICS = ("s", "es", "ps", "ns", "em", "pm", "nm")


def summarise(scores: list[dict[str, float | None]]) -> dict[str, Estimate]:
    """Means over records."""
    return estimates(COUNTERFACT.columns, {name: [each[name] for each in scores] for name in scores[0]})


def measured(model: Model, some: list[Record], made: list[Edit | ErrataError]) -> dict[str, object]:
    """Scores with each edit on the model, and its side effects."""
    scores, health, exact = [], [], []
    for record, edit in zip(some, made, strict=True):
        if isinstance(edit, ErrataError):
            continue
        with edit.applied(model):
            scores.append(score_record(model, record))
        health.append(edit.notes["health"])
        exact.append((edit.notes["residual"], edit.notes["rounding"]))
    drifts = [one["drift"] for one in health if one["drift"] is not None]
    return {
        "made": len(scores),
        "scores": {name: 100 * summarise(scores)[name].mean for name in METRICS},
        "probability_after": fmean(one["probability_after"] for one in health),
        "relative_norm": median(one["relative_norm"] for one in health),
        "essence_kl": fmean(one["essence_kl"] for one in health if one["essence_kl"] is not None),
        "drift": {"mean": fmean(drifts), "median": median(drifts), "largest": max(drifts)},
        "disabling": sum(one["disabling"] for one in health),
        "above_0.1_nats": sum(drift > 0.1 for drift in drifts),
        "largest_residual": max(one for one, _ in exact),
        "median_rounding": median(one for _, one in exact),
    }


def largest_difference(one: list, other: list) -> float:
    """Of changes of weights, relative to the largest entry of each."""
    pairs = [(a.deltas[0].matrix(), b.deltas[0].matrix()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    some = list(records(arguments.records))
    rewrites = [record.rewrite for record in some]
    found: dict[str, dict] = {}

    unedited = {}
    made: dict[str, list[Edit | ErrataError]] = {}
    for name in arguments.ways:
        model = errata.load_model("atlas", dtype="bfloat16" if name == "bfloat16" else "float32")
        unedited = unedited or summarise([score_record(model, record) for record in some])
        config = errata.RomeConfig(
            key="reference" if name == "reference" else "consistent", prefixes=prefixes(model, "paper", 0), steps=20
        )
        begin = time.perf_counter()
        if name in ("batched", "bfloat16"):
            made[name] = errata.rome(model, rewrites, config, force=True, errors="keep")
        else:
            made[name] = [errata.rome(model, [one], config, force=True, errors="keep")[0] for one in rewrites]
        seconds = (time.perf_counter() - begin) / len(some)
        found[name] = {"seconds_an_edit": seconds, **measured(model, some, made[name])}
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    if {"consistent", "batched"} <= set(made):
        found["batched"]["largest_difference_to_one_by_one"] = largest_difference(made["consistent"], made["batched"])
    told = {
        "records": len(some),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "unedited": {name: 100 * unedited[name].mean for name in METRICS},
        "ways": found,
    }
    if arguments.json:
        print(json.dumps(told, indent=1))
        return
    table = Table(title=f"{len(some)} records of the atlas", title_justify="left", header_style="bold")
    for column in ("way", *(name.upper() for name in METRICS), "P after", "drift (mean, largest)", "disabling", "s"):
        table.add_column(column)
    table.add_row("unedited", *(f"{told['unedited'][name]:.1f}" for name in METRICS))
    for name, of in found.items():
        scores = [f"{of['scores'][metric]:.1f}" for metric in METRICS]
        drift = f"{of['drift']['mean']:.2g}, {of['drift']['largest']:.2g}"
        more = [f"{of['probability_after']:.3f}", drift, str(of["disabling"]), f"{of['seconds_an_edit']:.2f}"]
        table.add_row(name, *scores, *more)
    Console().print(table)


if __name__ == "__main__":
    main()
