"""Tables 1 and 2 of the atlas, every row: trains KE and MEND on three kinds of examples each, measures all, reports.

    python benchmarks/tables.py --out tables                 # some two hours on two cores
    python benchmarks/tables.py --out tables --minutes 2 --records 20 --no-generation

What was stopped goes on with the same command. Two trainings run at a time, then two workers of Ray, on one thread
each. The commands are those of the command line, and are printed; everything stays in the folder:

    trained/NAME             an editor that was trained, and losses.png
    table1, table2           run folders of zsRE's and of CounterFact's kind; a page beside each
    table1.md, table2.md     the tables
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ERRATA = [sys.executable, "-m", "errata.cli.app"]
AT_ONCE = 2

# Name of the row, method, kind of training examples.
TRAINED = [
    ("KE-CF", "ke", "counterfact"),
    ("MEND-CF", "mend", "counterfact"),
    ("KE-zsRE", "ke", "zsre"),
    ("MEND-zsRE", "mend", "zsre"),
    ("KE", "ke", "text"),
    ("MEND", "mend", "text"),
]
# For a model of width 256: a network of lower rank and a higher rate than published for large ones; KE's masks are
# small at first, so they are multiplied. KE's authors minimise the edit's loss within a bound on what else moves, which
# puts the edit first: equal factors come nearer to that than MEND's do.
SETTINGS = {
    "ke": ["--set", "largest=100", "--c-edit", "1"],
    "mend": ["--set", "rank=256", "--learning-rate", "1e-5"],
}
PLAIN = ["FT=ft", "FT+L=ft-l", "ROME=rome", "ROME-reference=rome:key=reference"]
ROWS = {
    "zsre": [*PLAIN, *(f"{name}={method}:trained={{}}" for name, method, kind in TRAINED if kind != "counterfact")],
    "counterfact": [
        *PLAIN,
        "attention=attention",
        "KN=kn",
        *(f"{name}={method}:trained={{}}" for name, method, kind in TRAINED if kind != "zsre"),
    ],
}
TABLES = {"zsre": "table1", "counterfact": "table2"}


def run(*arguments: object) -> str:
    """An errata command; what it writes to standard output."""
    command = [*map(str, arguments)]
    print(f"errata {shlex.join(command)}\n", end="", flush=True)
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run([*ERRATA, *command], env=threads, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"errata {command[0]} ended with {done.returncode}")
    return done.stdout


def train(out: Path, name: str, method: str, kind: str, minutes: float) -> None:
    """One trained editor; nothing is done that is done already."""
    folder = out / "trained" / name
    run(
        *("train-editor", method, "--kind", kind, "--out", folder, "--picture", out / "trained" / f"{name}.png"),
        *("--max-minutes", minutes, "--validate-every", 50, "--patience", 10, *SETTINGS[method]),
    )


def measure(out: Path, kind: str, records: int, generation: bool) -> None:
    """A table's run folder, its page and its rows."""
    table = TABLES[kind]
    editors = [option for row in ROWS[kind] for option in ("--editor", row.format(out / "trained" / row.split("=")[0]))]
    # Side effects for the first table alone: they say of each edit what a table of texts shows anyway.
    options = ["--no-generation"] if kind == "zsre" else ["--no-health"]
    options += ["--no-generation"] if kind == "counterfact" and not generation else []
    options += ["--executor", "ray", "--workers", str(AT_ONCE)]
    run("evaluate", "--kind", kind, "--limit", records, *editors, *options, "--out", out / table, "--json")
    (out / f"{table}.md").write_text(run("report", out / table, "--format", "markdown"), encoding="utf-8")
    run("report", out / table, "--page", out / f"{table}.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tables"), help="the folder")
    parser.add_argument(
        "--records", type=int, default=500, help="how many are measured; training examples are made of others"
    )
    parser.add_argument("--minutes", type=float, default=12, help="of each training, on one thread")
    parser.add_argument("--no-generation", action="store_true", help="no texts, and so no GE and RS")
    given = parser.parse_args()
    if not 1 <= given.records <= 500:
        parser.error("records: 1 to 500; editors learn from those after the five hundredth")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda each: train(given.out, *each, given.minutes), TRAINED):
            pass
    for kind in TABLES:
        measure(given.out, kind, given.records, not given.no_generation)


if __name__ == "__main__":
    main()
