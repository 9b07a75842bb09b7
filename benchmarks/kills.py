"""What kills cost a run: `errata evaluate` killed with SIGKILL again and again, against the same run left alone.

    python benchmarks/kills.py                       # 20 kills over 200 records
    python benchmarks/kills.py --kills 5 --records 40
    python benchmarks/kills.py --json

Each process is killed at a random moment (seeded) after it began to measure, so that the kills are spread over the run.
Then the run is let end. Its lines must be those of the run left alone in all but the seconds; what was lost is told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

SPEC = "rome:steps=5,prefixes=none"
COMMAND = [sys.executable, "-m", "errata.cli.app", "evaluate", "--identity", "--no-generation", "--editor", SPEC]


def started(folder: Path, records: int) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "--limit", str(records), "--out", str(folder), "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"errata evaluate ended with {process.returncode}: {said.decode().strip()}")


def journals(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.rglob("*.jsonl"))}


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The whole lines of each journal, without those that differ from run to run."""
    found = {}
    for name, path in journals(folder).items():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        found[name] = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in whole]
    return found


def count(folder: Path) -> int:
    """Results that are there."""
    return sum(len(some) - 1 for some in lines(folder).values() if some)


def begun(folder: Path, since: float, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has gone through the folder: it writes the run card just before it measures."""
    card = folder / "card.json"
    while process.poll() is None and not (card.is_file() and card.stat().st_mtime > since):
        time.sleep(0.005)


def differences(ours: Path, theirs: Path) -> int:
    """Lines that are not in both, or stand elsewhere; headers count but for when they were begun."""
    one, other = (
        {
            name: [{key: value for key, value in line.items() if key != "begun"} for line in some]
            for name, some in lines(folder).items()
        }
        for folder in (ours, theirs)
    )
    return sum(
        each != twin for name in {*one, *other} for each, twin in zip_longest(one.get(name, []), other.get(name, []))
    )


def run(kills: int, records: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        begin = time.time()
        process = started(whole, records)
        begun(whole, begin, process)
        loaded = time.time()
        ended(process)
        alone = time.time() - begin
        measuring = max(path.stat().st_mtime for path in journals(whole).values()) - loaded

        told, worked = [0], []
        begin = time.time()
        for number in range(kills):
            since = time.time()
            process = started(killed, records)
            begun(killed, since, process)
            # Of what is left its share, and more, for with each kill some work is lost.
            moment = chance.uniform(0, 3.5 * measuring * (1 - told[-1] / (2 * records)) / (kills - number + 1))
            time.sleep(moment)
            process.kill()
            process.communicate()
            told.append(count(killed))
            worked.append(moment)
            print(f"kill {number + 1}: {moment:.2f} s of work, {told[-1]} results", file=sys.stderr)
        last = told[-1]
        ended(started(killed, records))
        through = time.time() - begin
        found = lines(killed)
        cases = [line["case"] for some in found.values() for line in some[1:]]
        per_second = 2 * records / measuring
        gained = (now - then for then, now in pairwise(told))
        lost = [max(0.0, work - more / per_second) for work, more in zip(worked, gained, strict=True)]
        return {
            "kills": kills,
            "kills_that_cut_the_run": sum(1 for each in told[1:] if each < 2 * records),
            "records": records,
            "lines": count(killed),
            "twice": len(cases) - len({(name, line["case"]) for name, some in found.items() for line in some[1:]}),
            "differences": differences(killed, whole),
            "lines_before_the_last_start": last,
            "mean_seconds_lost_with_a_kill": fmean(lost),
            "seconds_alone": alone,
            "seconds_measuring_alone": measuring,
            "seconds_with_kills": through,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    os.environ["COLUMNS"] = "100"
    found = run(arguments.kills, arguments.records, arguments.seed)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name.replace('_', ' '):<32} {shown}")
    if found["differences"] or found["twice"]:
        sys.exit("the killed run is not the one that was left alone")


if __name__ == "__main__":
    main()
