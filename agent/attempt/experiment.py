"""One attempt: candidate, trials, verdict, ledger.

The seven steps: take the candidate, put it on record, smoke it, let trials run until the judge is
sure, decide, close, and either advance to its files or drop them. What happens in boxes is a
trial's (`trial.py`), what is decided is a pure function's (`decide.py`). See docs/decisions/0008
for what an interruption leaves.
"""

import shutil
import time

from agent.attempt import smoke
from agent.attempt.decide import (
    UNKNOWN_NOISE,
    Decision,
    Failure,
    Measure,
    Rescore,
    dethroned,
    literals_read,
    lost,
    next_step,
    outcome_of,
)
from agent.attempt.lab import Lab, SessionOver
from agent.attempt.trial import run_trial, score_again
from agent.candidate.diffs import unified_diff
from agent.candidate.seeds import pins_its_seed
from agent.record.attempts import Attempt
from agent.record.events import (
    ATTEMPT,
    AttemptFinished,
    AttemptInterrupted,
    AttemptKind,
    AttemptStarted,
    Noticed,
    Verdict,
)
from agent.record.repeats import are_moved
from sandbox.contract.errors import BoxLost, SandboxError, host_faults
from sandbox.contract.log import log

CHECKPOINTS_KEPT = 3
"""Of so many kept attempts, the best among them, and of the baseline."""


def run_attempt(lab: Lab, kind: AttemptKind, hypothesis: str, researcher: str) -> Attempt:
    """Train, score and judge the files that lie in the workspace now.

    Raises:
        SandboxError: nightlab or the engine failed; the attempt is recorded as interrupted.
        SessionOver: the session had to end while the attempt waited; recorded in the same way.
        KeyboardInterrupt: passed on after the attempt was recorded as interrupted.
    """
    candidate, started = lab.workspace.candidate(), time.monotonic()
    number = len(lab.history.attempts)
    lab.ledger.append(_attempt_started(lab, number, kind, hypothesis, researcher, candidate))
    lab.observer.attempt_started(number, kind, hypothesis)
    lab.ledger.append(literals_read(lab.history, number, lab.ledger.get_blob))
    try:
        with host_faults():
            # Nothing runs of files that hold what their score would be computed on.
            is_clean = isinstance(next_step(lab.history, number, lab.ledger.get_blob), Measure)
            if is_clean and smoke.is_due(lab, candidate):
                smoke.run_smoke(lab, candidate, asked_by="nightlab", attempt=number)
            decision = _decide(lab, number, candidate)
    except (SandboxError, SessionOver, KeyboardInterrupt) as error:
        is_lost, is_candidate = isinstance(error, BoxLost), kind == "candidate"
        # Files that lose their box each time, although the engine is well, get a verdict.
        is_suspect = is_lost and is_candidate and lab.worker.executor.answers()
        end = lost(lab.history, number) if is_suspect else None
        if end is None:
            reason = "stopped by the person" if isinstance(error, KeyboardInterrupt) else str(error)
            lab.ledger.append(
                AttemptInterrupted(attempt=number, is_box_lost=is_lost, reason=reason)
            )
            drop(lab, number)
            lab.observer.attempt_finished(lab.history.attempt(number))
            raise
        decision = end
    return _close(lab, decision.finished(number, time.monotonic() - started))


def _decide(lab: Lab, number: int, candidate: dict[str, bytes]) -> Decision:
    """Let trials run until there is nothing left to measure."""
    while not isinstance(step := next_step(lab.history, number, lab.ledger.get_blob), Decision):
        if isinstance(step, Rescore):
            again = lab.trial(ATTEMPT, number, step.seed, candidate, checks=step.checks)
            lab.record(score_again(lab.worker, again, lab.checkpoint(number, step.seed)))
        elif step.attempt == number:
            # Runs of a test must not be chosen by their luck: they go on to their end. And what
            # only opens the door is not checked: a keep is, more than once.
            is_candidate = lab.history.attempt(number).started.kind == "candidate"
            trial = lab.trial(
                ATTEMPT,
                number,
                step.seed,
                candidate,
                checks=0 if is_candidate else 1,
                may_stop=is_candidate and step.seed == lab.seeds[0],
            )
            lab.record(run_trial(lab.worker, trial))
            if not is_candidate:
                _say_where_seeds_do_nothing(lab, number, candidate)
        else:
            _measure_best(lab, step)
    return step


def _say_where_seeds_do_nothing(lab: Lab, number: int, files: dict[str, bytes]) -> None:
    """Say it as soon as the files or two runs show it, before the rest of a night goes there."""
    scores = list(lab.history.attempt(number).values().values())
    pins = pins_its_seed(files, lab.settings.workspace.command)
    if (pins and len(scores) == 1) or (not pins and len(scores) == 2 and not are_moved(scores)):
        lab.worker.on_wait("noise_unknown", f"nothing can be kept: {UNKNOWN_NOISE}")


def _measure_best(lab: Lab, step: Measure) -> None:
    """Measure the best beside a candidate that is tested, at a seed that is as new to it."""
    best = lab.history.attempt(step.attempt)
    trial = lab.trial(ATTEMPT, best.number, step.seed, lab.stored_files(best))
    try:
        lab.record(run_trial(lab.worker, trial))
    except BoxLost as error:  # which says nothing of the candidate
        raise SandboxError(error.message, error.hint) from error
    # The holdout is scored from the runs that it was kept for; this one only says how it scores.
    shutil.rmtree(lab.checkpoint(best.number, step.seed), ignore_errors=True)
    outcome = outcome_of(lab.history, trial.key, lab.ledger.get_blob)
    if isinstance(outcome, Failure):
        text = f"the best (attempt {best.number}) failed at seed {step.seed}: {outcome.reason}"
        lab.ledger.append(Noticed(kind="best_failed", explanation=text))
    dethrone(lab)


def _close(lab: Lab, finished: AttemptFinished) -> Attempt:
    """The attempt with its verdict on record, and the best's files in the workspace."""
    number = finished.attempt
    lab.ledger.append(finished)
    log.info("attempt_decided", attempt=number, verdict=finished.verdict, reason=finished.reason)
    advance(lab) if finished.verdict is Verdict.KEPT else drop(lab, number)
    attempt = lab.history.attempt(number)
    lab.observer.attempt_finished(attempt)
    return attempt


def advance(lab: Lab) -> None:
    """Keep the checkpoints of the baseline and of the last attempts that stand, and no others.

    A best may be dethroned, and then the one before it is scored on holdout.
    """
    standing = [attempt.number for attempt in lab.history.standing]
    going_on = (attempt.number for attempt in lab.history.open)
    lab.forget_checkpoints_but({*standing[:1], *standing[-CHECKPOINTS_KEPT:], *going_on})


def dethrone(lab: Lab) -> bool:
    """Take the best away if a score of it was refused; whether it was.

    Called after whatever scores the best again. Between attempts the workspace holds the files of
    the best from then on; an open attempt's close puts them there.
    """
    event = dethroned(lab.history)
    if event is None:
        return False
    lab.ledger.append(event)
    log.warning("best_dethroned", attempt=event.attempt, reason=event.reason, best=event.best)
    lab.observer.dethroned(event)
    if not lab.history.open:
        drop(lab, event.attempt)
    return True


def drop(lab: Lab, number: int) -> None:
    """Put the best's files back into the workspace and forget the attempt's checkpoints."""
    lab.forget_checkpoints(number)
    best = lab.history.best or lab.history.baseline
    if best is not None:
        lab.workspace.restore(lab.stored_files(best))


def score_on_holdout(lab: Lab, attempt: Attempt) -> None:
    """Score an attempt's kept checkpoints on the holdout split, once for each seed, ever.

    Where none is left, one training more makes one: whoever is the best again after others were
    dethroned may have been followed by too many to keep them all.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    scored = {score.seed for score in attempt.scores if score.split == "holdout"}
    seeds, files = sorted(attempt.values().keys() - scored), lab.stored_files(attempt)
    left = {seed: path for seed in seeds if (path := lab.kept_checkpoint(attempt.number, seed))}
    for seed in left or ([] if scored else seeds[:1]):
        trial = lab.trial(ATTEMPT, attempt.number, seed, files, splits=("holdout",))
        steps = score_again(lab.worker, trial, left[seed]) if left else run_trial(lab.worker, trial)
        lab.record(steps)


def _attempt_started(
    lab: Lab,
    number: int,
    kind: AttemptKind,
    hypothesis: str,
    researcher: str,
    candidate: dict[str, bytes],
) -> AttemptStarted:
    best = lab.history.best
    diff = None if best is None else unified_diff(lab.stored_files(best), candidate)
    return AttemptStarted(
        attempt=number,
        kind=kind,
        hypothesis=hypothesis,
        researcher=researcher,
        files={name: lab.ledger.put_blob(content) for name, content in candidate.items()},
        diff=None if diff is None else lab.ledger.put_blob(diff),
        parent=None if best is None else best.number,
        seeds=lab.seeds if kind == "baseline" else (lab.seeds[0], *_fresh_seeds(lab)),
    )


def _fresh_seeds(lab: Lab) -> tuple[int, ...]:
    """Seeds for a test that neither a researcher nor any file before can know."""
    used = {seed for attempt in lab.history.attempts for seed in attempt.started.seeds}
    return lab.worker.draw_seeds(lab.settings.noise.max_repeats, used | {*lab.seeds})
