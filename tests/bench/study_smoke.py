"""Finds out what a smoke run costs, and what it saves.

`python -m tests.bench.study_smoke [--minutes M] [--docs]`: the shipped workload, whole and broken
in five ways, is smoked and then trained and scored all the same, so that what was saved can be
seen.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from statistics import fmean

from agent.attempt.decide import Failure, outcome_of
from agent.attempt.smoke import run_smoke
from agent.attempt.trial import run_trial
from agent.night.waiting import with_retries
from agent.record.events import ATTEMPT, AttemptStarted
from tests.bench.studies import (
    Bench,
    Files,
    Memory,
    Row,
    clock_of,
    interruptible,
    parser,
    spread,
    write_between,
)

SECONDS = 20.0
REPEATS = 2
SAVING = "    torch.save(saved, output / CHECKPOINT)\n"
LOADING = "    model.load_state_dict(saved["
CASES: dict[str, tuple[str, str]] = {
    "nothing": ("", ""),
    "crashes at its start": ("    budget = Budget(", "    budget = Budgets("),
    "out of memory at its first step": (
        "        loss.backward()\n",
        "        loss.backward()\n        hog = torch.ones(10**10)\n",
    ),
    "crashes while it saves": (SAVING, SAVING.replace("saved", "saves")),
    "leaves no checkpoint": (SAVING, ""),
    "its checkpoint cannot be loaded": (LOADING, LOADING.replace("load_state", "loud_state")),
}


def main() -> None:
    """Measure what is missing, then tell."""
    options = parser(__doc__ or "").parse_args()
    memory = Memory(options.runs / "smoke.jsonl")
    bench = Bench(
        (options.runs / "smoke").absolute(),
        {
            "budget": {"kind": "wall", "seconds": SECONDS, "grace_seconds": 30.0},
            "disturbance": {"max_other_cores": 99.0, "min_speed": 0.0, "max_repeats": 0},
            "economy": {"early_stopping": "off", "smoke": "off"},
        },
    )
    jobs: list[Row] = [{"case": case, "repeat": n} for n in range(REPEATS) for case in CASES]
    if spread(jobs, [lambda job: both_ways(bench, job)], memory, clock_of(options)):
        text = table(memory.rows)
        sys.stdout.write(text)
        if options.docs:
            write_between("study_smoke", text)


def both_ways(bench: Bench, job: Row) -> Row:
    """Smoke the files of a case, then train and score them."""
    files = broken(bench.files, *CASES[job["case"]])
    began = time.monotonic()
    run = partial(run_smoke, bench.lab, files, asked_by="researcher")
    smoked = with_retries(bench.lab, run).finished
    assert smoked is not None
    after = time.monotonic()
    found = whole(bench, files)
    return {
        **job,
        "smoke": smoked.reason or "passed",
        "smoke_seconds": round(after - began, 2),
        "whole": found,
        "whole_seconds": round(time.monotonic() - after, 2),
    }


def broken(files: Files, old: str, new: str) -> Files:
    """The files with one place changed."""
    text = files["train.py"].decode()
    assert not old or text.count(old) == 1, old
    return {**files, "train.py": (text.replace(old, new) if old else text).encode()}


def whole(bench: Bench, files: Files) -> str:
    """What a whole training and its score come to."""
    lab = bench.lab
    number = len(lab.ledger.history.attempts)
    lab.ledger.append(
        AttemptStarted(
            attempt=number,
            kind="baseline",
            hypothesis="study",
            researcher="study",
            files={name: lab.ledger.put_blob(content) for name, content in files.items()},
            diff=None,
            parent=None,
            seeds=(),
        )
    )
    trial = lab.trial(ATTEMPT, number, lab.seeds[0], files)
    lab.record(run_trial(lab.worker, trial))
    outcome = outcome_of(lab.history, trial.key, lab.ledger.get_blob)
    return outcome.reason if isinstance(outcome, Failure) else "scored"


def table(rows: list[Row]) -> str:
    """What each case cost, in Markdown."""
    smoke_seconds = rows and fmean(r["smoke_seconds"] for r in rows if r["case"] == "nothing")
    lines = [
        f"The shipped train.py, means of {REPEATS}. A smoke run that passes takes "
        f"{smoke_seconds:.1f} s, loading the checkpoint included.",
        "",
        "| what is wrong | smoke run | seconds | whole run | seconds at a budget of "
        f"{SECONDS:g} s | saved |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        mine = [row for row in rows if row["case"] == case]
        smoke = fmean(row["smoke_seconds"] for row in mine)
        whole_run = fmean(row["whole_seconds"] for row in mine)
        saved = -smoke if mine[0]["smoke"] == "passed" else whole_run - smoke
        lines.append(
            f"| {case} | {mine[0]['smoke']} | {smoke:.1f} | {mine[0]['whole']} | "
            f"{whole_run:.1f} | {saved:+.1f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with interruptible():
        main()
