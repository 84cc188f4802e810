"""Decides recorded events again, by the night's own functions.

An event holds what was measured and what follows from it. Here the second is computed again from
the first and from the record before it, with the functions that the night used, so the audit needs
no rules of its own. See docs/decisions/0018.
"""

import math
from collections.abc import Iterator
from typing import Any

from agent.attempt.decide import (
    Decision,
    Measure,
    dethroned,
    drift_checked,
    is_noise_known,
    literals_read,
    lost,
    next_step,
    over_budget_seconds,
    scored_by_boxes,
    scored_by_itself,
    smoke_finished,
)
from agent.attempt.disturbance import decided, idle_cores, usual_of
from agent.attempt.lab import budget_of
from agent.attempt.sheet import free_pace_of, left_seconds_of
from agent.morning.replay import replayed
from agent.record.attempts import TrialKey
from agent.record.chain import GetBlob
from agent.record.curves import mfu_of, said_tokens, unpacked
from agent.record.events import (
    AttemptFinished,
    Dethroned,
    Disturbance,
    DriftChecked,
    Event,
    LiteralsRead,
    ReplayFinished,
    ReviewStarted,
    RunFinished,
    Scored,
    SmokeFinished,
)
from agent.record.history import BOX_LOST, History
from agent.record.logs import excerpt, unpacked_log
from agent.record.reported import MAX_FILE_BYTES
from sandbox.contract.record import Record

Decided = (
    LiteralsRead
    | RunFinished
    | Scored
    | SmokeFinished
    | AttemptFinished
    | DriftChecked
    | Dethroned
    | ReviewStarted
    | ReplayFinished
)


def derive(history: History, event: Event, get_blob: GetBlob) -> Event | None:
    """The event as the record before it demands it; None for one that decides nothing.

    `history` is the one before the event.

    Raises:
        LedgerError: a blob is lost.
        ValueError: the record does not hold what the event would follow from; says what.
    """
    match event:
        case LiteralsRead():
            return literals_read(history, event.attempt, get_blob)
        case RunFinished():
            return _run(history, event, get_blob)
        case Scored():
            return _score(history, event, get_blob)
        case SmokeFinished():
            smoke, settings = history.smokes[event.smoke], history.in_force
            if not smoke.runs:
                raise ValueError("it stands on no run")
            return smoke_finished(smoke, settings, answered=event.answered, seconds=event.seconds)
        case AttemptFinished():
            return _verdict(history, event, get_blob)
        case DriftChecked():
            return _drift(history, event)
        case Dethroned():
            if (due := dethroned(history)) is None:
                raise ValueError(
                    f"no score of attempt {event.attempt} was refused while it was the best"
                )
            return due
        case ReviewStarted():
            heeds = is_noise_known(history, get_blob)
            return event.model_copy(update={"heeds_seeds": heeds})
        case ReplayFinished():
            return replayed(history, event.attempt, get_blob)
        case _:
            return None


def _drift(history: History, event: DriftChecked) -> DriftChecked:
    if history.best is None or event.seed not in history.best.values():
        raise ValueError("it is about no score of the best")
    if not history.repeats:
        raise ValueError("the machine was checked before noise was known")
    return drift_checked(history, event.seed, event.problem)


def _run(history: History, event: RunFinished, get_blob: GetBlob) -> RunFinished:
    session, settings = history.session, history.in_force
    assert session is not None
    try:
        log = excerpt(unpacked_log(get_blob(event.log)))
        curve = unpacked(get_blob(event.curve)) if event.curve else []
    except ValueError as error:
        raise ValueError("its log is no log, or its curve is no curve") from error
    noise, peaks = event.disturbance, session.image.get("peak_flops") or {}
    budget = budget_of(settings, event.purpose)
    changes: dict[str, Any] = {
        "result": event.result.model_copy(update={"log": log}),
        "disturbance": None if noise is None else _disturbance(history, event, noise),
        "over_budget_seconds": over_budget_seconds(event.purpose, event.result, budget),
        "said_tokens": said_tokens(curve),
        "mfu": mfu_of(peaks, session.machine.get("cpu"), event.result, curve),
    }
    return event.model_copy(update=changes)


def _disturbance(history: History, event: RunFinished, noise: Disturbance) -> Disturbance:
    """The same measurement, held against what it had to be held against."""
    settings = history.in_force
    usual = usual_of(history, TrialKey(event.purpose, event.attempt, event.seed))
    limits = {
        "limit_cores": settings.disturbance.max_other_cores,
        "min_speed": settings.disturbance.min_speed,
        "idle_cores": idle_cores(settings.limits.cpus, history.drift.cores),
        "usual_cores": usual.cores,
        "usual_speed": usual.speed,
    }
    return decided(noise.model_copy(update=limits))


def _score(history: History, event: Scored, get_blob: GetBlob) -> Scored:
    key = TrialKey(event.purpose, event.attempt, event.seed)
    trial, goal = history.trial(key), history.in_force.goal
    if goal.is_reported:
        if trial.training is None:
            raise ValueError("it was reported without a training")
        left = {file.name: file for file in trial.training.result.output}
        file = left.get(goal.file or "")
        due = file.sha256 if file is not None and file.bytes <= MAX_FILE_BYTES else None
        if event.sheet != due:
            raise ValueError("the file that it was read from is none that its training left")
        content = None if event.sheet is None else get_blob(event.sheet)
        return scored_by_itself(key, unpacked_log(get_blob(trial.training.log)), goal, content)
    sheet = None if event.sheet is None else get_blob(event.sheet)
    models = [run.result for run in trial.boxes_of_score if run.result.box == "model"]
    try:
        left_seconds = left_seconds_of(trial.training, history.in_force.budget)
        free = free_pace_of(history)
        noises = [run.disturbance for run in trial.boxes_of_score if run.result.box == "scorer"]
        noise = noises[-1] if noises else None
        return scored_by_boxes(key, event.split, sheet, models, noise, free, left_seconds)
    except ValueError as error:
        raise ValueError("its sheet is no score sheet") from error


def _verdict(history: History, event: AttemptFinished, get_blob: GetBlob) -> AttemptFinished:
    attempt = history.attempt(event.attempt)
    if event.reason == BOX_LOST and (decision := lost(history, event.attempt)) is not None:
        return decision.finished(event.attempt, event.seconds)
    if attempt.started.kind == "candidate" and attempt.started.parent is None:
        raise ValueError("it was judged before there were a best and its noise")
    step = next_step(history, event.attempt, get_blob)
    if not isinstance(step, Decision):
        what = "measured" if isinstance(step, Measure) else "scored again"
        raise ValueError(
            f"it is {event.verdict} ({event.reason}), and attempt {step.attempt} was still to be "
            f"{what} at seed {step.seed}"
        )
    return step.finished(event.attempt, event.seconds)


def differences(event: Event, due: Event) -> Iterator[str]:
    """What of an event is not what it must be, a sentence for each field."""
    for name in type(event).model_fields:
        recorded, right = getattr(event, name), getattr(due, name)
        if not is_same(recorded, right):
            yield f"its {name} is not what the record comes to{_in_words(recorded, right)}"


def is_same(one: object, other: object) -> bool:
    """Equal but for the last digits, in which another machine's mathematics may differ."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, Record) and type(one) is type(other):
        return all(is_same(getattr(one, k), getattr(other, k)) for k in type(one).model_fields)
    return one == other


def _in_words(recorded: object, right: object) -> str:
    """Both, where they are short enough to be read; the parts that differ of larger ones."""
    if isinstance(recorded, Record) and type(recorded) is type(right):
        names = type(recorded).model_fields
        apart = [n for n in names if not is_same(getattr(recorded, n), getattr(right, n))]
        parts = (f"{n} {getattr(recorded, n)}, not {getattr(right, n)}" for n in apart)
        return f": {'; '.join(parts)}"[:300]
    return f": {recorded}, not {right}"[:300]
