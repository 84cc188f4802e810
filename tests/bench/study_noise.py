"""Finds out how often the judge keeps luck, and how often it finds what is better.

`python -m tests.bench.study_noise [--minutes M] [--docs]`: a tiny model (`tests/support/tiny`, no
torch) trains for a fixed number of steps in real boxes and is scored by real boxes, so that a score
depends on files and seed alone and no neighbour can blur it. Every comparison has seeds of its own,
which no other one has: three scores of the best, then scores of the candidate until the judge
settles it, as in a night. The first fifty compare the files with themselves, the others with a
change whose effect is measured over all seeds.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from agent.attempt.judge import Judgement, Ruling, judge
from agent.record.repeats import pooled_noise
from tests.bench.studies import (
    ROOT,
    Bench,
    Memory,
    Row,
    clock_of,
    interruptible,
    parser,
    spread,
    turned,
    write_between,
)

COMPARISONS = 50
WITH_CHANGE = 25
CONFIDENCE = 0.95
MAX_REPEATS = 3
KNOBS: dict[str, dict[str, Any]] = {"same": {}, "changed": {"STEPS": 4000}}
WORKERS = 2
SHIFTS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
DRAWS = 2000
Scores = Callable[[str, int], float | None]
"""Gives the score of `best`, `same` or `changed` at a seed; none while it is not measured."""


def main() -> None:
    """Measure what is missing, then tell."""
    options = parser(__doc__ or "").parse_args()
    memory, clock = Memory(options.runs / "noise.jsonl"), clock_of(options)
    workers = [worker(options.runs.absolute() / f"noise-{n}") for n in range(WORKERS)]
    while jobs := missing(memory):
        if not spread(jobs, workers, memory, clock):
            return
    text = table(memory)
    sys.stdout.write(text)
    if options.docs:
        write_between("study_noise", text)


def worker(directory: Any) -> Callable[[Row], Row]:
    """Measures one score after the other in a session of its own."""
    bench = Bench(
        directory,
        {
            "budget": {"kind": "wall", "seconds": 60.0, "grace_seconds": 60.0},
            "limits": {"cpus": 1.0},
            "scoring": {"model_boxes": 1},
            "disturbance": {"max_other_cores": 99.0, "min_speed": 0.0, "max_repeats": 0},
            "economy": {"early_stopping": "off", "smoke": "off"},
        },
        ROOT / "tests" / "tiny",
    )

    def measured(job: Row) -> Row:
        files = turned(bench.files, KNOBS.get(job["files"], {}))
        training = bench.train(files, job["seed"], scored=True)
        return {
            **job,
            "score": bench.score(job["seed"]),
            "seconds": round(training.result.wall_seconds, 2),
        }

    return measured


def remembered(memory: Memory) -> Scores:
    """What was measured."""
    known = {(row["files"], row["seed"]): row["score"] for row in memory.rows}
    return lambda files, seed: known.get((files, seed))


def missing(memory: Memory) -> list[Row]:
    """The scores that every comparison needs next; none when all are settled."""
    scores = remembered(memory)
    found = []
    for files, count in (("same", COMPARISONS), ("changed", WITH_CHANGE)):
        for number in range(count):
            found += [
                {"files": name, "seed": seed} for name, seed in follow(scores, files, number)[1]
            ]
    return found


def follow(
    scores: Scores, files: str, number: int
) -> tuple[Judgement | None, list[tuple[str, int]], int]:
    """A comparison as far as it is measured: its judgement, or what it needs, and its looks."""
    first = 100 * number + (10_000 if files == "changed" else 0) + 1
    of_best = [("best", seed) for seed in range(first, first + 3)]
    needed = [pair for pair in [*of_best, (files, first + 10)] if scores(*pair) is None]
    if needed:
        return None, needed, 0
    best = [scores(*pair) for pair in of_best]
    candidate: list[float] = []
    for look in range(1, MAX_REPEATS + 1):
        pair = (files, first + 9 + look)
        score = scores(*pair)
        if score is None:
            return None, [pair], look
        candidate.append(score)
        judgement = rule(candidate, [score for score in best if score is not None])
        if judgement.ruling is not Ruling.REPEAT:
            return judgement, [], look
    raise AssertionError("the last look settles it")


def rule(candidate: Sequence[float], best: Sequence[float]) -> Judgement:
    """As a night rules in its first attempt: noise is known from the baseline's repeats alone."""
    return judge(
        candidate,
        best,
        pooled_noise([best]),
        direction="minimize",
        confidence=CONFIDENCE,
        max_repeats=MAX_REPEATS,
    )


def table(memory: Memory) -> str:
    """Everything that was found, in Markdown."""
    pool = [row["score"] for row in memory.rows if row["files"] in ("best", "same")]
    other = [row["score"] for row in memory.rows if row["files"] == "changed"]
    noise = stdev(pool)
    effect = (fmean(pool) - fmean(other)) / noise
    error = math.sqrt(1 / len(pool) + 1 / len(other))
    scores = remembered(memory)
    trained = fmean(row["seconds"] for row in memory.rows)
    lines = [
        f"{len(memory.rows)} trainings of `tests/support/tiny` ({trained:.1f} s), each scored in "
        f"boxes; noise of one score {noise:.4f} over {len(pool)} seeds. The change is "
        f"{', '.join(f'{k} {v}' for k, v in KNOBS['changed'].items())}: better by {effect:.2f} "
        f"± {error:.2f} times the noise ({len(other)} seeds).",
        "",
        "| compared, each with its own seeds | kept | looks on average | configured |",
        "|---|---|---|---|",
    ]
    for files, count in (("same", COMPARISONS), ("changed", WITH_CHANGE)):
        ends = [follow(scores, files, number) for number in range(count)]
        kept = sum(judged is not None and judged.ruling is Ruling.KEEP for judged, _, _ in ends)
        looks = fmean(look for _, _, look in ends)
        what = "with itself" if files == "same" else "with the change"
        allowed = f"at most {1 - CONFIDENCE:.0%}" if files == "same" else ""
        lines.append(
            f"| {what} | {kept} of {count} ({kept / count:.0%}) | {looks:.2f} | {allowed} |"
        )
    lines += [
        "",
        f"The same judge on {DRAWS:,} comparisons drawn from these scores (they share scores, so "
        "this is no independent evidence), with an effect added to the candidate's:",
        "",
        "| better by, in noise | kept | looks on average |",
        "|---|---|---|",
    ]
    chance = random.Random(0)
    for shift in SHIFTS:
        drawn = [draw(pool, shift * noise, chance) for _ in range(DRAWS)]
        lines.append(
            f"| {shift:g} | {sum(kept for kept, _ in drawn) / DRAWS:.1%} | "
            f"{fmean(look for _, look in drawn):.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(pool: Sequence[float], effect: float, chance: random.Random) -> tuple[bool, int]:
    """One comparison of scores that were drawn without putting back."""
    drawn = chance.sample(list(pool), 3 + MAX_REPEATS)
    best, rest = drawn[:3], drawn[3:]
    for look in range(1, MAX_REPEATS + 1):
        judgement = rule([score - effect for score in rest[:look]], best)
        if judgement.ruling is not Ruling.REPEAT:
            return judgement.ruling is Ruling.KEEP, look
    raise AssertionError("the last look settles it")


if __name__ == "__main__":
    with interruptible():
        main()
