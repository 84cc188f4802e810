"""Measures the best again, to see whether the machine changed.

A night is long: fans fail, clocks fall, a neighbour moves in. After so many attempts the best is
trained once more at a seed that it has. Beyond noise it is done twice; if both differ the same
way, the machine is not what it was, and from then on the new measurement is what candidates are
compared with. See docs/decisions/0010.
"""

from agent.attempt.decide import DID_NOT_HOLD, Failure, drift_checked, outcome_of, retakes_due
from agent.attempt.disturbance import Usual, was_disturbed
from agent.attempt.experiment import dethrone
from agent.attempt.judge import drift_purposes, drift_tolerance, is_beyond
from agent.attempt.lab import Lab
from agent.attempt.trial import run_trial, sampled
from agent.record.attempts import Attempt
from agent.record.events import ATTEMPT, DriftChecked, Noticed
from agent.record.history import NOT_RETAKEN, History
from agent.settings import Settings
from sandbox.contract.errors import SandboxError
from sandbox.contract.log import log

NOTHING_USUAL = Usual(cores=0.0, speed=None)
REST_AFTER_A_VAIN_CHECK = 3
"""Attempts before the next check, once more of them for each in a row without a result."""


def is_due(history: History, settings: Settings) -> bool:
    """Whether enough attempts were judged since the last result, or the machine is another one.

    A check without a result is repeated after a few attempts, not before each.
    """
    every, drift = settings.noise.check_best_every, history.drift
    if every == 0 or history.best is None or not history.repeats:
        return False
    if drift.judged_since_check < min(every, REST_AFTER_A_VAIN_CHECK * drift.checks_in_vain):
        return False
    last = history.completed[-1].finished if history.completed else None
    is_doubtful = last is not None and last.reason == DID_NOT_HOLD and drift.judged_since_check > 0
    return drift.is_on_another_machine or is_doubtful or drift.judged_since_result >= every


def check_for_drift(lab: Lab) -> None:
    """Measure the best again if it is time, and put on record what that says of the machine.

    Is its score refused this time, it is the best no more.

    Raises:
        KeyboardInterrupt: passed on; nothing was decided.
    """
    retake_baseline(lab)
    best = lab.history.best
    if best is None or not is_due(lab.history, lab.settings):
        return
    found = _check(lab, best)
    lab.ledger.append(found)
    lab.observer.drift_checked(found)
    log.info("machine_checked", changed=found.changed, problem=found.problem)
    dethrone(lab)


def retake_baseline(lab: Lab) -> None:
    """Measure the baseline again where it was measured beside other work, once that is over.

    Noise and the first gains hang on it. A fault must not cost the night: what is on record counts.
    """
    seeds, baseline = retakes_due(lab.history), lab.history.baseline
    if not seeds or baseline is None or sampled(lab.worker, NOTHING_USUAL).is_beside_others:
        return
    lab.worker.on_wait("baseline_retaken", "the machine is quiet: the baseline is measured again")
    for seed in seeds:
        files = lab.stored_files(baseline)
        try:
            lab.record(run_trial(lab.worker, lab.trial(ATTEMPT, baseline.number, seed, files)))
        except SandboxError as error:
            lab.ledger.append(Noticed(kind=NOT_RETAKEN, explanation=error.message))
            break
    dethrone(lab)


def _check(lab: Lab, best: Attempt) -> DriftChecked:
    """One trial, and another one where the first is beyond noise."""
    history = lab.history
    seed, recorded = next(iter(best.values().items()))
    noise = history.repeats.noise()
    assert noise is not None
    tolerance = drift_tolerance(noise)
    for purpose in drift_purposes(len(history.drift.checks) + 1):
        value = _measure(lab, best, seed, purpose)
        if isinstance(value, str):
            return drift_checked(history, seed, value)
        if not is_beyond(recorded, value, tolerance):
            break
    return drift_checked(history, seed, "")


def _measure(lab: Lab, best: Attempt, seed: int, purpose: str) -> float | str:
    """A score, or why there is none: a check that fails must not cost the night."""
    trial = lab.trial(purpose, best.number, seed, lab.stored_files(best))
    try:
        lab.record(run_trial(lab.worker, trial))
    except SandboxError as error:
        return error.message
    training = lab.history.trial(trial.key).training
    # A baseline is measured on a machine that is never quiet, too; but what passes is no change.
    if training is not None and was_disturbed(training):
        return "others used the machine, or heat held it back, meanwhile"
    outcome = outcome_of(lab.history, trial.key, lab.ledger.get_blob)
    assert outcome is not None
    return outcome.explanation if isinstance(outcome, Failure) else outcome
