"""Waits of a night: heeds the person and the clock.

The engine can be restarted, the model's service can be away for hours, others can have the GPUs.
None of that ends a night by itself. What ends it meanwhile is what ends it otherwise: the person's
stop, or the session's time. See docs/decisions/0016.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from agent.attempt.experiment import run_attempt
from agent.attempt.lab import Lab, SessionOver
from agent.night.budget import time_is_over
from agent.record.attempts import Attempt
from agent.record.events import AttemptKind, Noticed, StopReason
from agent.record.history import TRIES
from sandbox.contract.errors import SandboxError
from sandbox.contract.log import log

CHECK_AGAIN_SECONDS = 1.0
FAULT_PAUSE_SECONDS = 5.0
"""Pause after the first sandbox fault, doubled after each further one."""
STOP, PAUSE = "stop", "pause"
"""Files that a person's commands leave in the session's directory."""

T = TypeVar("T")


def ask_to_stop(session: Path) -> None:
    """Let the session end after the attempt that it is at."""
    (session / STOP).touch()


def ask_to_pause(session: Path) -> None:
    """Let the session wait after the attempt that it is at."""
    (session / PAUSE).touch()


def ask_to_continue(session: Path) -> bool:
    """Take back what `ask_to_pause` asked for; whether there was anything to take back."""
    was_paused = is_asked_to_pause(session)
    (session / PAUSE).unlink(missing_ok=True)
    return was_paused


def is_asked_to_stop(session: Path) -> bool:
    return (session / STOP).exists()


def is_asked_to_pause(session: Path) -> bool:
    return (session / PAUSE).exists()


def forget_wishes(session: Path) -> None:
    """Begin without the wishes of an earlier evening: who resumes a session wants it to run."""
    for name in (STOP, PAUSE):
        (session / name).unlink(missing_ok=True)


def for_the_night(lab: Lab) -> Lab:
    """The same lab, whose waits heed the session's limits and the person, and are on record.

    A review's do neither: the person sits before it.
    """

    def on_wait(kind: str, text: str) -> None:
        lab.ledger.append(Noticed(kind=kind, explanation=text))
        lab.observer.waiting(text)
        log.info("wait_noticed", kind=kind)

    return replace(lab, worker=replace(lab.worker, stand_by=lambda: stand_by(lab), on_wait=on_wait))


def is_paused(lab: Lab) -> bool:
    """Whether the person wants the session to wait; a pause and its end go on record.

    A pause costs no hours, so it lasts until the person ends it.

    Raises:
        SessionOver: the person asked to stop.
    """
    session = lab.ledger.directory
    is_stopped = is_asked_to_stop(session)
    paused = is_asked_to_pause(session) and not is_stopped
    if paused != lab.history.time.is_paused:
        text = "the person asked for a pause" if paused else "the pause is over"
        kind = "paused" if paused else "continued"
        lab.ledger.append(Noticed(kind=kind, explanation=text))
        lab.observer.waiting(
            f"{text}; go on with: nightlab continue {lab.session}" if paused else text
        )
    if is_stopped:
        raise SessionOver(StopReason.STOPPED, "the person asked to stop")
    return paused


def wait_while_paused(lab: Lab) -> None:
    """Return once the person lets the session work.

    Raises:
        SessionOver: the person asked to stop.
    """
    while is_paused(lab):
        lab.worker.sleep(CHECK_AGAIN_SECONDS)


def stand_by(lab: Lab) -> None:
    """Return, in the middle of a wait, as long as it still makes sense.

    Raises:
        SessionOver: the person asked to stop, or the session's time is over.
    """
    wait_while_paused(lab)
    if ending := time_is_over(lab.history, lab.settings.session, idle_seconds=idle_seconds(lab)):
        raise SessionOver(*ending)


def idle_seconds(lab: Lab) -> float:
    """How long ago the last event was."""
    last = datetime.fromisoformat(lab.history.time.last_at)
    return (lab.ledger.now() - last).total_seconds()


def run_with_retries(lab: Lab, kind: AttemptKind, hypothesis: str, researcher: str) -> Attempt:
    """`run_attempt`, tried again with the same files as `with_retries` has it."""
    candidate, attributes = lab.workspace.candidate(), {"nightlab.kind": kind}

    def work() -> Attempt:
        lab.workspace.restore(candidate)
        return run_attempt(lab, kind, hypothesis, researcher)

    with lab.worker.tracer.start_as_current_span("nightlab.attempt", attributes=attributes):
        return with_retries(lab, work)


def with_retries(lab: Lab, work: Callable[[], T]) -> T:
    """Do work that needs the engine, again when the sandbox failed, once the engine answers.

    Raises:
        SandboxError: it failed `TRIES` times in a row.
        SessionOver: the session had to end while it waited.
        KeyboardInterrupt: passed on.
    """
    for faults in range(TRIES - 1):
        try:
            return work()
        except SandboxError as error:
            log.warning("sandbox_retried", tries=faults + 1, error=error.message)
            _wait(lab, FAULT_PAUSE_SECONDS * 2**faults)
            _wait_for_engine(lab, error)
    return work()


def _wait(lab: Lab, seconds: float) -> None:
    for _ in range(math.ceil(seconds / CHECK_AGAIN_SECONDS)):
        lab.worker.stand_by()
        lab.worker.sleep(CHECK_AGAIN_SECONDS)


def _wait_for_engine(lab: Lab, error: SandboxError) -> None:
    """Return once the engine answers; it may be away for as long as the session may last."""
    worker = lab.worker
    if worker.executor.answers():
        return
    worker.on_wait("engine_away", f"waiting for the container engine: {error.message}")
    while not worker.executor.answers():
        worker.stand_by()
        worker.sleep(CHECK_AGAIN_SECONDS)
    worker.on_wait("engine_back", "the container engine answers again")
