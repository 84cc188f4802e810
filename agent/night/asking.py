"""Asks a model until it answers, or time is over.

What passes by itself (an overload, a cut stream, hours without the service) ends no night: see
docs/decisions/0016. Every try that is paid for is on record before it is made, so that a crash in
the middle of it is charged as well.
"""

from __future__ import annotations

import math
import random
from datetime import datetime

from agent.attempt.lab import Lab, SessionOver
from agent.night.budget import reason_to_stop, seconds_left
from agent.night.waiting import CHECK_AGAIN_SECONDS, stand_by
from agent.record.events import ModelAsked, ModelCalled, Reserve, RetryWaited
from agent.researcher.base import CallFailed, LostCall, Model, Reply
from agent.researcher.conversation import Conversation
from sandbox.contract.log import log

LONGEST_BACKOFF_SECONDS = 120.0


def ask(lab: Lab, model: Model, conversation: Conversation, reserve: Reserve) -> Reply:
    """The model's reply, however long it takes to get one.

    Args:
        lab: of the session.
        model: who is asked.
        conversation: what is asked.
        reserve: the most that one call can use; limits hold before each.

    Raises:
        ModelError: asking again does not help, or would take longer than the session.
        SessionOver: the person asked to stop, or a limit would be broken.
        KeyboardInterrupt: passed on, with the call that it broke off on the bill.
    """
    ledger, tries = lab.ledger, 0
    while True:
        if reserve.calls:
            asked = ModelAsked(conversation=conversation.number, model=model.name, reserve=reserve)
            ledger.append(asked)
        try:
            return model.reply(conversation.prompt, _seconds_left(lab))
        except CallFailed as failed:
            if failed.lost is not None:
                ledger.append(_lost(conversation, failed.lost))
            wait_seconds = _backoff_seconds(tries, failed.retry_after_seconds)
            if wait_seconds >= _seconds_left(lab):
                raise failed.final from failed
            error, tries = failed.error, tries + 1
        if stop := reason_to_stop(ledger.history, lab.settings.session, reserve=reserve):
            raise SessionOver(*stop)
        ledger.append(
            RetryWaited(conversation=conversation.number, error=error, wait_seconds=wait_seconds)
        )
        log.info("model_retried", wait_seconds=round(wait_seconds, 1), error=error)
        lab.observer.waiting(f"waiting {wait_seconds:.0f} s for the service: {error}")
        for _ in range(math.ceil(wait_seconds / CHECK_AGAIN_SECONDS)):
            stand_by(lab)
            lab.worker.sleep(CHECK_AGAIN_SECONDS)


def _seconds_left(lab: Lab) -> float:
    history = lab.ledger.history
    idle = lab.ledger.now() - datetime.fromisoformat(history.time.last_at)
    return seconds_left(history, lab.settings.session, idle_seconds=idle.total_seconds())


def _backoff_seconds(tries: int, retry_after_seconds: float | None) -> float:
    """Longer each time, and at least as long as the service asks; for ever if that is no use."""
    if retry_after_seconds is None:
        return math.inf
    # A little at random: sessions that an outage stopped together must not come back together.
    backoff = min(2.0 ** min(tries, 10) + random.random(), LONGEST_BACKOFF_SECONDS)
    return max(backoff, retry_after_seconds)


def _lost(conversation: Conversation, lost: LostCall) -> ModelCalled:
    return ModelCalled.lost(
        conversation.number,
        lost.model,
        lost.usage,
        lost.cost_usd,
        request_id=lost.request_id,
        seconds=lost.seconds,
    )
