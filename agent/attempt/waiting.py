"""Waits of a night: heeds person and clock.

The engine can be restarted, the model's service can be away for hours, others can have the GPUs.
None of that ends a night by itself. What ends it meanwhile is what ends it otherwise: the person's
stop, or the session's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from agent.attempt.budget import time_is_over
from agent.attempt.lab import Lab
from agent.attempt.steering import is_asked_to_pause, is_asked_to_stop
from agent.record.events import Noticed, StopReason
from agent.record.history import TRIES
from sandbox.contract.errors import NightlabError, SandboxError

LOOK_AGAIN_SECONDS = 1.0
FAULT_PAUSE_SECONDS = 5.0
"""Pause after the first sandbox fault, doubled after each further one."""

T = TypeVar("T")


class SessionOver(NightlabError):
    """What was waited for did not come before the session had to end.

    Args:
        reason: how the session ends.
        message: in words.
    """

    usual_hint = "Go on with `nightlab resume`."

    def __init__(self, reason: StopReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_paused(lab: Lab) -> bool:
    """Whether the person wants the session to wait; a pause and its end go on record.

    A pause costs no hours, so it lasts until the person ends it.

    Raises:
        SessionOver: the person asked to stop.
    """
    session = lab.ledger.directory  # a look at the machine has a scratch directory of its own
    is_stopped = is_asked_to_stop(session)
    paused = is_asked_to_pause(session) and not is_stopped
    if paused != lab.ledger.history.is_paused:
        words = "the person asked for a pause" if paused else "the pause is over"
        kind = "paused" if paused else "continued"
        lab.ledger.append(Noticed(kind=kind, explanation=words))
    if is_stopped:
        raise SessionOver(StopReason.STOPPED, "the person asked to stop")
    return paused


def wait_while_paused(lab: Lab) -> None:
    """Return once the person lets the session work.

    Raises:
        SessionOver: the person asked to stop.
    """
    while is_paused(lab):
        lab.sleep(LOOK_AGAIN_SECONDS)


def stand_by(lab: Lab) -> None:
    """Return, in the middle of a wait, as long as it still makes sense.

    Raises:
        SessionOver: the person asked to stop, or the session's time is over.
    """
    if not lab.is_night:
        return
    wait_while_paused(lab)
    history = lab.ledger.history
    idle = lab.ledger.now() - datetime.fromisoformat(history.last_at)
    ending = time_is_over(history, lab.settings.session, idle_seconds=idle.total_seconds())
    if ending is not None:
        raise SessionOver(*ending)


def patiently(lab: Lab, work: Callable[[], T]) -> T:
    """Do work that needs the engine, again when the sandbox failed, once the engine answers.

    Args:
        lab: of the session.
        work: what is tried.

    Raises:
        SandboxError: it failed `TRIES` times in a row.
        SessionOver: the session had to end while it waited.
        KeyboardInterrupt: passed on.
    """
    for faults in range(TRIES - 1):
        try:
            return work()
        except SandboxError as error:
            _wait(lab, FAULT_PAUSE_SECONDS * 2**faults)
            _wait_for_engine(lab, error)
    return work()


def _wait(lab: Lab, seconds: float) -> None:
    for _ in range(math.ceil(seconds / LOOK_AGAIN_SECONDS)):
        stand_by(lab)
        lab.sleep(LOOK_AGAIN_SECONDS)


def _wait_for_engine(lab: Lab, error: SandboxError) -> None:
    """Return once the engine answers; it may be away for as long as the session may last."""
    if lab.executor.answers():
        return
    lab.tell_waiting("engine_away", f"waiting for the container engine: {error.message}")
    while not lab.executor.answers():
        stand_by(lab)
        lab.sleep(LOOK_AGAIN_SECONDS)
    lab.tell_waiting("engine_back", "the container engine answers again")
