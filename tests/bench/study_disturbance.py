"""Finds out what a competing load does to a training, and from which load on it matters.

`python -m tests.bench.study_disturbance [--minutes M] [--docs]`: the shipped workload trains for a
few seconds, again and again, beside a load that keeps a part of one core busy: none, a tenth, a
quarter, a half, a whole one, two. What is told is what nightlab measures (cores used by others,
speed of the machine) beside how many tokens the training came to. A threshold is good when hardly
any quiet run lies above it and what lies below has lost little.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from agent.record.curves import unpacked
from tests.bench.studies import (
    Bench,
    Memory,
    Row,
    clock_of,
    interruptible,
    parser,
    spread,
    write_between,
)

LOADS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Cores that the load keeps busy."""
REPEATS = 5
SECONDS = 8.0
PERIOD_SECONDS = 0.05
BURNER = """
import sys, time
part, period = float(sys.argv[1]), float(sys.argv[2])
while True:
    began = time.monotonic()
    while time.monotonic() - began < part * period:
        pass
    time.sleep(max(0.0, period - (time.monotonic() - began)))
"""


@contextmanager
def load(cores: float) -> Iterator[None]:
    """Processes of somebody else, each busy for a part of one core."""
    count = max(1, round(cores)) if cores else 0
    arguments = [
        sys.executable,
        "-c",
        BURNER,
        str(cores / count if count else 0),
        str(PERIOD_SECONDS),
    ]
    burners = [subprocess.Popen(arguments) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def main() -> None:
    """Measure what is missing, then tell."""
    options = parser(__doc__ or "").parse_args()
    memory = Memory(options.runs / "disturbance.jsonl")
    jobs: list[Row] = [{"cores": c, "repeat": n} for n in range(REPEATS) for c in LOADS]
    random.Random(0).shuffle(jobs)  # so that the machine's own drift falls on all of them alike
    bench = Bench(
        (options.runs / "disturbance").absolute(),
        {
            "budget": {"kind": "wall", "seconds": SECONDS, "grace_seconds": 30.0},
            "disturbance": {"max_other_cores": 99.0, "min_speed": 0.0, "max_repeats": 0},
            "economy": {"early_stopping": "off", "smoke": "off"},
        },
    )

    def measured(job: Row) -> Row:
        with load(job["cores"]):
            training = bench.train(bench.files, seed=1)
        assert training.disturbance is not None
        assert training.curve is not None
        told = unpacked(bench.lab.ledger.get_blob(training.curve))[-1]
        return {
            **job,
            "tokens": told["tokens"],
            "other_cores": training.disturbance.other_cores,
            "speed": training.disturbance.speed,
            "own_cores": (training.result.cpu_seconds or 0.0) / training.result.wall_seconds,
        }

    if spread(jobs, [measured], memory, clock_of(options)):
        text = table(memory.rows)
        sys.stdout.write(text)
        if options.docs:
            write_between("study_disturbance", text)


def table(rows: list[Row]) -> str:
    """What each load did, in Markdown."""
    quiet = [row for row in rows if row["cores"] == 0]
    tokens, speed = median(r["tokens"] for r in quiet), median(r["speed"] for r in quiet)
    lines = [
        f"{REPEATS} trainings of {SECONDS:g} s for each load, in mixed order, one seed, "
        f"{os.cpu_count()} cores; quiet trainings came to {tokens:,.0f} tokens (median).",
        "",
        "| load, cores | others, as measured: median (range) | the run's own cores | "
        "machine's speed before and after | tokens, against quiet: median (range) |",
        "|---|---|---|---|---|",
    ]
    for cores in LOADS:
        mine = [row for row in rows if row["cores"] == cores]
        others = [row["other_cores"] for row in mine]
        told = [row["tokens"] / tokens for row in mine]
        lines.append(
            f"| {cores:g} | {median(others):.2f} ({min(others):.2f} to {max(others):.2f}) | "
            f"{median(row['own_cores'] for row in mine):.2f} | "
            f"{median(row['speed'] for row in mine) / speed:.0%} | "
            f"{median(told):.0%} ({min(told):.0%} to {max(told):.0%}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with interruptible():
        main()
