"""Runs an attempt again from the record alone, and compares.

Nothing of the session's directory is trusted but the ledger and its blobs: files, scorer, image
and settings are those on record. See docs/decisions/0005.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from agent.attempt.decide import Failure, outcome_of
from agent.attempt.experiment import dethrone
from agent.attempt.judge import SINGLE_LOOK, Demands, judge
from agent.attempt.lab import Lab, Trial, fresh_directory, snapshot
from agent.attempt.trial import run_trial
from agent.record.attempts import Attempt, TrialKey
from agent.record.chain import GetBlob, read_files
from agent.record.events import ReplayedSeed, ReplayFinished
from agent.record.history import History
from agent.record.repeats import FIVE_DIGITS
from agent.text import one_line
from sandbox.contract.errors import UsageError

Say = Callable[[str], None]

SCRATCH = "review"
MEASURED = "measured"
NOT_COMPARABLE = {
    "stopped_early": "the night ended its training early, and a replay trains to the end",
    "disturbed": "what others did to the machine decided, not the files",
}
"""Outcomes that do not show whether a run can be repeated, and why."""


def replay(lab: Lab, number: int, say: Say) -> ReplayFinished:
    """Run an attempt again and compare.

    Raises:
        UsageError: there is no such attempt, or it has no training to compare with.
        SandboxError: nightlab or the engine failed.
    """
    attempt = _trained(lab, number)
    with recorded_bench(lab) as bench:
        for key in _keys(attempt):
            trial = bench.trial(key.purpose, number, key.seed, lab.stored_files(attempt))
            outcome = measure_separately(bench, trial)
            say(f"attempt {number}, seed {key.seed}: {describe(outcome)}")
            if isinstance(outcome, Failure):
                break  # the other seeds would fail alike, at the price of a training
    finished = replayed(lab.history, number, lab.ledger.get_blob)
    lab.ledger.append(finished)
    dethrone(lab)
    return finished


def replayed(history: History, number: int, get_blob: GetBlob) -> ReplayFinished:
    """How an attempt's scores compare with those of its replay, whose runs are on record.

    Raises:
        LedgerError: a blob that decides is lost.
        ValueError: the replay is not on record, or there is nothing to compare it with.
    """
    attempt = history.attempt(number)
    if attempt.finished is None:
        raise ValueError("it replays an attempt without a verdict")
    was = attempt.finished.reason if attempt.finished.value is None else MEASURED
    now, keys = MEASURED, _keys(attempt)
    # A candidate's first score too, which chose it for a test and counts for nothing else.
    scores = (s for s in attempt.scores[attempt.counted_from :] if s.split == "val")
    recorded = {s.seed: s.value for s in scores if s.value is not None} | attempt.values()
    today: dict[int, float] = {}
    for key in keys:
        outcome = outcome_of(history, key, get_blob)
        if outcome is None:
            raise ValueError(f"seed {key.seed} was not run again")
        if isinstance(outcome, Failure):
            now = outcome.reason
            break
        today[key.seed] = outcome
    pairs = [(today[seed], recorded[seed]) for seed in today if seed in recorded]
    agrees, explanation = _agreement(history, was, now, pairs)
    noise = history.repeats.noise()
    return ReplayFinished(
        attempt=number,
        recorded_outcome=was,
        outcome=now,
        scores=tuple(
            ReplayedSeed(seed=k.seed, recorded=recorded.get(k.seed), today=today.get(k.seed))
            for k in keys
        ),
        noise=noise.sigma if noise else None,
        largest_difference=max((abs(one - other) for one, other in pairs), default=None),
        agrees=agrees,
        explanation=explanation,
        is_comparable=not {was, now} & NOT_COMPARABLE.keys(),
    )


@contextmanager
def recorded_bench(lab: Lab) -> Iterator[Lab]:
    """The lab with a directory of its own and the recorded scorer; gone afterwards."""
    session = lab.history.session
    assert session is not None
    files = read_files(lab.ledger.directory, session.fixed_files)
    scratch = fresh_directory(lab.worker.directory / SCRATCH)
    try:
        with snapshot(scratch / "fixed", files) as fixed:
            yield replace(lab, worker=replace(lab.worker, directory=scratch, fixed_dir=fixed))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure_separately(bench: Lab, trial: Trial) -> float | Failure:
    """What a trial comes to that belongs to no attempt of the night: its score on val, or why not.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    bench.record(run_trial(bench.worker, trial))
    outcome = outcome_of(bench.history, trial.key, bench.ledger.get_blob)
    assert outcome is not None
    return outcome


def describe(outcome: float | Failure) -> str:
    """A score, or why there is none, in one line."""
    if isinstance(outcome, Failure):
        return f"{outcome.reason}: {one_line(outcome.explanation, 160)}"
    return f"{outcome:.4f}"


def _trained(lab: Lab, number: int) -> Attempt:
    """The attempt of that number, which has something to compare with."""
    attempts = {attempt.number: attempt for attempt in lab.history.attempts}
    if (attempt := attempts.get(number)) is None:
        message = f"session {lab.session} has no attempt {number}"
        raise UsageError(message, f"its attempts are 0 to {len(attempts) - 1}")
    if attempt.finished is None:
        raise UsageError(f"attempt {number} has no verdict", "choose one that was judged")
    if not attempt.runs:
        reason = one_line(attempt.finished.reason, 60)
        message = f"attempt {number} failed in its smoke run ({reason}) and was never trained"
        raise UsageError(message, "choose one that was trained")
    return attempt


def _keys(attempt: Attempt) -> list[TrialKey]:
    """The trials of a replay: one for each seed that the attempt was trained at."""
    seeds = dict.fromkeys(run.seed for run in attempt.trainings)
    return [TrialKey(f"replay-{attempt.number}", attempt.number, seed) for seed in seeds]


def _agreement(
    history: History, was: str, now: str, pairs: Sequence[tuple[float, float]]
) -> tuple[bool, str]:
    """Equal to five digits; with a wall budget a difference within noise is agreement too."""
    for end in (was, now):
        if end in NOT_COMPARABLE:
            return False, f"recorded: {was}; today: {now}; {NOT_COMPARABLE[end]}"
    if was != now:
        return False, f"recorded: {was}; today: {now}"
    if not pairs:
        return True, f"{now} again"
    largest = max(abs(one - other) for one, other in pairs)
    if largest < FIVE_DIGITS:
        return True, "the same score to five digits"
    settings, noise = history.in_force, history.repeats.noise()
    if settings.budget.kind == "tokens":
        return False, f"scores differ by up to {largest:.6f}; with a token budget they should not"
    if noise is None:
        return False, f"scores differ by up to {largest:.6f}, and noise is not known"
    now_scores, then = zip(*pairs, strict=True)
    terms = Demands(settings.goal.direction, SINGLE_LOOK, SINGLE_LOOK)
    numbers = judge(now_scores, then, noise, terms).arithmetic
    in_noise = f" ({abs(numbers.gain) / numbers.noise:.1f} x noise)" if numbers.noise else ""
    agrees = abs(numbers.gain) <= numbers.required_gain
    words = "within" if agrees else "beyond"
    return agrees, f"means differ by {abs(numbers.gain):.4f}{in_noise}: {words} noise"
