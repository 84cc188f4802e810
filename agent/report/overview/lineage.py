"""From baseline to best: what was kept, and its cost."""

from collections import Counter
from collections.abc import Iterator

from agent.record.events import Verdict
from agent.record.history import History
from sandbox.contract.record import Record


class Ancestor(Record):
    """A kept attempt in its place between the baseline and the best."""

    attempt: int
    parent: int | None
    is_on_line: bool
    """Whether the best descends from it, or is it."""
    rank: int | None
    """Its place among the kept by gain, the largest first; none of the baseline."""
    tries: int
    """Candidates that were judged on top of it."""


def lineage(history: History) -> list[Ancestor]:
    """The baseline and every attempt that was ever kept, in order."""
    kept = [attempt for attempt in history.attempts if attempt.was_kept]
    parents = {attempt.number: attempt.started.parent for attempt in kept}
    line, number = set(), history.best.number if history.best else None
    while number is not None and number not in line:
        line.add(number)
        number = parents.get(number)
    gains = {
        a.number: a.finished.arithmetic.gain for a in kept if a.finished and a.finished.arithmetic
    }
    ranked = sorted(gains, key=lambda number: -gains[number])
    tries = Counter(a.started.parent for a in history.candidates if a.finished)
    return [
        Ancestor(
            attempt=attempt.number,
            parent=attempt.started.parent,
            is_on_line=attempt.number in line,
            rank=ranked.index(attempt.number) + 1 if attempt.number in gains else None,
            tries=tries[attempt.number],
        )
        for attempt in kept
    ]


def rates(history: History) -> Iterator[tuple[str, str]]:
    """How often something was kept, how fast it went, and what a kept change cost."""
    judged, kept = len(history.completed), history.count(Verdict.KEPT)
    if not judged:
        return
    yield "kept", f"{kept} of {judged}, {kept / judged:.0%}"
    if hours := history.time.active_seconds / 3600:
        yield "attempts an hour", f"{judged / hours:.1f}"
    if not kept:
        return
    runs = [run.result for attempt in history.attempts for run in attempt.trainings]
    gpus = sum(run.wall_seconds * len(run.gpus) for run in runs) / 3600
    spent = gpus or sum(run.wall_seconds for run in runs) / 3600
    cost = [f"{spent / kept:.2f} {'GPU-hours' if gpus else 'hours'} of training"]
    if history.spend.usd:
        least = "at least " if history.spend.unpriced_calls else ""
        cost.append(f"{least}${history.spend.usd / kept:.2f}")
    yield "a kept change cost", ", ".join(cost)
