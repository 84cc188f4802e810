"""One attempt: candidate, boxes, score, verdict, ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agent.attempt.judge import Judgement, Ruling, judge, pooled_noise
from agent.attempt.lab import Lab, forget_checkpoints, snapshot, stored_files
from agent.attempt.measurement import Failure, measure
from agent.attempt.smoke import is_due, smoke
from agent.attempt.waiting import SessionOver, patiently
from agent.candidate.diffs import unified_diff
from agent.record.events import (
    AttemptFinished,
    AttemptInterrupted,
    AttemptKind,
    AttemptStarted,
    Noticed,
    Verdict,
)
from agent.record.history import BOX_LOST, TRIES, Attempt, Smoke
from sandbox.contract.errors import BoxLost, SandboxError, host_faults

Closing = Callable[[float], AttemptFinished]
"""Makes the closing event once the attempt's duration in seconds is known."""


def run_attempt(
    lab: Lab, kind: AttemptKind, hypothesis: str, researcher: str, *, is_last_try: bool = False
) -> Attempt:
    """Train, score and judge the files that lie in the workspace now.

    Args:
        lab: of the session.
        kind: whether it is the baseline.
        hypothesis: what the researcher expects.
        researcher: who it is.
        is_last_try: whether a candidate whose box is lost once more, although the engine
            answers, has failed.

    Raises:
        SandboxError: nightlab or the engine failed; the attempt is recorded as interrupted.
        SessionOver: the session had to end while the attempt waited; recorded in the same way.
        KeyboardInterrupt: passed on after the attempt was recorded as interrupted.
    """
    candidate = lab.workspace.candidate()
    number = len(lab.ledger.history.attempts)
    started = time.monotonic()
    lab.ledger.append(_attempt_started(lab, number, kind, hypothesis, researcher, candidate))
    lab.observer.attempt_started(number, kind, hypothesis)
    try:
        with host_faults(), snapshot(lab, number, candidate) as files:
            failure = _smoked(lab, candidate)
            if failure is not None:
                verdict = _failed(number, failure)
            elif kind == "baseline":
                verdict = _baseline(lab, number, files)
            else:
                verdict = _candidate(lab, number, files)
    except (SandboxError, SessionOver, KeyboardInterrupt) as error:
        is_last = is_last_try and kind == "candidate"
        if is_last and isinstance(error, BoxLost) and lab.executor.answers():
            return _closed(lab, _lost(number, error)(time.monotonic() - started))
        reason = "stopped by the person" if isinstance(error, KeyboardInterrupt) else str(error)
        lab.ledger.append(AttemptInterrupted(attempt=number, reason=reason))
        drop(lab, number)
        raise
    return _closed(lab, verdict(time.monotonic() - started))


def _closed(lab: Lab, finished: AttemptFinished) -> Attempt:
    """The attempt with its verdict on record, and the best's files in the workspace."""
    number = finished.attempt
    lab.ledger.append(finished)
    advance(lab, number) if finished.verdict is Verdict.KEPT else drop(lab, number)
    attempt = lab.ledger.history.attempt(number)
    lab.observer.attempt_finished(attempt)
    return attempt


def run_patiently(lab: Lab, kind: AttemptKind, hypothesis: str, researcher: str) -> Attempt:
    """`run_attempt`, tried again with the same files when the sandbox, not the program, failed.

    Raises:
        SandboxError: it failed too often in a row.
        SessionOver: the session had to end meanwhile.
        KeyboardInterrupt: see `run_attempt`.
    """
    candidate, lost = lab.workspace.candidate(), 0

    def work() -> Attempt:
        nonlocal lost
        lab.workspace.restore(candidate)
        last = lost == TRIES - 1
        try:
            return run_attempt(lab, kind, hypothesis, researcher, is_last_try=last)
        except BoxLost:
            lost += 1
            raise

    return patiently(lab, work)


def smoke_patiently(lab: Lab, files: dict[str, bytes]) -> Smoke:
    """The smoke run that a researcher asks for, tried again when the sandbox failed.

    Raises:
        SandboxError: it failed too often in a row.
        SessionOver: the session had to end meanwhile.
    """
    return patiently(lab, lambda: smoke(lab, files, asked_by_researcher=True))


def _smoked(lab: Lab, candidate: dict[str, bytes]) -> Failure | None:
    """What a short training first showed to be wrong; none also where there was none."""
    if not is_due(lab, candidate):
        return None
    finished = smoke(lab, candidate, asked_by_researcher=False).finished
    assert finished is not None
    if finished.reason is None:
        return None
    return Failure(Verdict.FAILED, finished.reason, finished.explanation)


def _baseline(lab: Lab, number: int, files: Path) -> Closing:
    for seed in lab.seeds[: lab.settings.noise.baseline_repeats]:
        failure = measure(lab, number, seed, files)
        if failure is not None:
            return _failed(number, failure)
    values = list(lab.ledger.history.attempt(number).values().values())
    mean = sum(values) / len(values)
    noise = pooled_noise([values])
    text = f"baseline {mean:.4f}, noise {noise.sigma:.4f} from {len(values)} repeats"
    return lambda seconds: AttemptFinished(
        attempt=number,
        verdict=Verdict.KEPT,
        reason="baseline",
        explanation=text,
        value=mean,
        arithmetic=None,
        seconds=seconds,
    )


def _candidate(lab: Lab, number: int, files: Path) -> Closing:
    for seed in lab.seeds:
        # A close call has shown that it may win, and its repeats must not be chosen by their luck.
        failure = measure(lab, number, seed, files, may_stop=seed == lab.seeds[0])
        if failure is not None:
            return _failed(number, failure)
        judgement = _judge(lab, number)
        if judgement.ruling is not Ruling.REPEAT:
            return _judged(number, judgement)
        _give_best_the_same_seeds(lab, number)
    return _judged(number, _judge(lab, number))


def _judge(lab: Lab, number: int) -> Judgement:
    history = lab.ledger.history
    assert history.best is not None
    settings = lab.settings
    return judge(
        list(history.attempt(number).values().values()),
        list(history.best.values().values()),
        pooled_noise(history.repeats_beside(number)),
        direction=settings.goal.direction,
        confidence=settings.noise.confidence,
        max_repeats=min(settings.noise.max_repeats, len(lab.seeds)),
    )


def _give_best_the_same_seeds(lab: Lab, number: int) -> None:
    """Measure the best at the seed that a close call uses next, so that seeds stay paired."""
    best = lab.ledger.history.best
    assert best is not None
    wanted = lab.seeds[: len(lab.ledger.history.attempt(number).values()) + 1]
    missing = [seed for seed in wanted if seed not in best.values()]
    if not missing:
        return
    with snapshot(lab, best.number, stored_files(lab, best)) as files:
        for seed in missing:
            failure = _measure_best(lab, best.number, seed, files)
            if failure is not None:
                text = f"the best (attempt {best.number}) failed at seed {seed}: {failure.reason}"
                lab.ledger.append(Noticed(kind="best_failed", explanation=text))


def _lost(number: int, error: BoxLost) -> Closing:
    text = f"the box was lost in {TRIES} tries, and the engine answers: {error.message}"
    return _failed(number, Failure(Verdict.FAILED, BOX_LOST, text))


def _measure_best(lab: Lab, number: int, seed: int, files: Path) -> Failure | None:
    try:
        return measure(lab, number, seed, files)
    except BoxLost as error:  # which says nothing of the candidate
        raise SandboxError(error.message, error.hint) from error


def _judged(number: int, judgement: Judgement) -> Closing:
    keep = judgement.ruling is Ruling.KEEP
    return lambda seconds: AttemptFinished(
        attempt=number,
        verdict=Verdict.KEPT if keep else Verdict.DISCARDED,
        reason=judgement.reason,
        explanation=judgement.explanation,
        value=judgement.arithmetic.candidate_mean,
        arithmetic=judgement.arithmetic,
        seconds=seconds,
    )


def _failed(number: int, failure: Failure) -> Closing:
    return lambda seconds: AttemptFinished(
        attempt=number,
        verdict=failure.verdict,
        reason=failure.reason,
        explanation=failure.explanation,
        value=None,
        arithmetic=None,
        seconds=seconds,
        early_stop=failure.early_stop,
    )


def advance(lab: Lab, number: int) -> None:
    """Make the attempt the best: forget the checkpoints of others except the baseline's."""
    baseline = lab.ledger.history.baseline
    keep = {number} | ({baseline.number} if baseline else set())
    for attempt in lab.ledger.history.attempts:
        if attempt.number not in keep:
            forget_checkpoints(lab, attempt.number)


def drop(lab: Lab, number: int) -> None:
    """Put the best's files back into the workspace and forget the attempt's checkpoints."""
    forget_checkpoints(lab, number)
    best = lab.ledger.history.best
    if best is not None:
        lab.workspace.restore(stored_files(lab, best))


def _attempt_started(
    lab: Lab,
    number: int,
    kind: AttemptKind,
    hypothesis: str,
    researcher: str,
    candidate: dict[str, bytes],
) -> AttemptStarted:
    best = lab.ledger.history.best
    diff = None if best is None else unified_diff(stored_files(lab, best), candidate)
    return AttemptStarted(
        attempt=number,
        kind=kind,
        hypothesis=hypothesis,
        researcher=researcher,
        files={name: lab.ledger.put_blob(content) for name, content in candidate.items()},
        diff=None if diff is None else lab.ledger.put_blob(diff),
        parent=None if best is None else best.number,
    )
