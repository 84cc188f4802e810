"""Measures the best again, to see whether the machine changed.

A night is long: fans fail, clocks fall, a neighbour moves in. After so many attempts the best is
trained once more at a seed that it has. Beyond noise it is done twice; if both differ the same
way, the machine is not what it was, and from then on the new measurement is what candidates are
compared with. See docs/decisions/0010.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from statistics import fmean

from agent.attempt.judge import (
    drift_purposes,
    drift_tolerance,
    has_drifted,
    is_beyond,
    pooled_noise,
)
from agent.attempt.lab import Lab, fresh_directory, stored_files
from agent.attempt.measurement import measure_aside
from agent.record.events import DriftChecked, LaterRun, RunFinished
from agent.record.history import Attempt, History
from agent.settings import Settings
from sandbox.contract.errors import SandboxError

SCRATCH = "drift"
REST_AFTER_A_VAIN_LOOK = 3
"""Attempts before the next look, once more of them for each look in a row without a result."""


def is_due(history: History, settings: Settings) -> bool:
    """Whether enough attempts were judged since the last result, or the machine is another one.

    A look without a result is repeated after a few attempts, not before each.
    """
    every = settings.noise.check_best_every
    if every == 0 or history.best is None or not history.repeats():
        return False
    if history.judged_since_look < min(every, REST_AFTER_A_VAIN_LOOK * history.looks_in_vain):
        return False
    return history.is_on_another_machine or history.judged_since_check >= every


def check_for_drift(lab: Lab) -> None:
    """Measure the best again if it is time, and put on record what that says of the machine.

    Raises:
        KeyboardInterrupt: passed on; nothing was decided.
    """
    history = lab.ledger.history
    if not is_due(history, lab.settings):
        return
    assert history.best is not None
    check = len(history.drift_checks) + 1
    found = _looked(lab, history.best, check)
    lab.ledger.append(found)
    lab.observer.drift_checked(found)


def _looked(lab: Lab, best: Attempt, check: int) -> DriftChecked:
    seed, recorded = next(iter(best.values().items()))
    noise = pooled_noise(lab.ledger.history.repeats())
    tolerance = drift_tolerance(noise, lab.settings.noise.confidence)
    today: list[float] = []
    problem = ""
    for purpose in drift_purposes(check):
        value, problem = _measured(lab, best, seed, purpose)
        if value is None:
            today.clear()
            break
        today.append(value)
        if not is_beyond(recorded, value, tolerance):
            break
    changed = has_drifted(recorded, today, tolerance)
    return DriftChecked(
        check=check,
        attempt=best.number,
        seed=seed,
        recorded=recorded,
        today=tuple(today),
        tolerance=tolerance,
        changed=changed,
        explanation=_in_words(best.number, recorded, today, tolerance, changed=changed)
        if today
        else f"the best (attempt {best.number}) could not be measured again: {problem}",
    )


def _measured(lab: Lab, best: Attempt, seed: int, purpose: str) -> tuple[float | None, str]:
    """A score, or why there is none: a look that fails must not cost the night."""
    scratch = fresh_directory(lab.directory / SCRATCH)
    bench = replace(lab, directory=scratch)
    try:
        value, _, failure = measure_aside(
            bench, purpose, best.number, seed, stored_files(lab, best), ("val",)
        )
    except SandboxError as error:
        return None, error.message
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if value is not None and _was_disturbed(lab, purpose):
        return None, "others used the machine, or heat held it back, meanwhile"
    return value, failure.explanation if failure else ""


def _was_disturbed(lab: Lab, purpose: str) -> bool:
    """Whether the training that a look's score stands on was unfair to it.

    A baseline is measured on a machine that is never quiet, too; but what passes is no change.
    """
    for entry in reversed(lab.ledger.entries):
        run = entry.event.run if isinstance(entry.event, LaterRun) else None
        if isinstance(run, RunFinished) and run.result.box == "train":
            assert isinstance(entry.event, LaterRun)
            assert entry.event.purpose == purpose
            noise = run.disturbance
            return run.result.was_throttled or (noise is not None and noise.disturbed)
    return False


def _in_words(
    number: int, recorded: float, today: list[float], tolerance: float, *, changed: bool
) -> str:
    told = (
        f"the best (attempt {number}) had {recorded:.4f} and has {fmean(today):.4f} now; "
        f"up to {tolerance:.4f} is noise"
    )
    if changed:
        return f"the machine changed: {told}; from here on the new measurement counts"
    return f"the machine is as it was: {told}"
