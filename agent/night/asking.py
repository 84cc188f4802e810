"""Asks a model until it answers, or time is over.

What passes by itself (an overload, a cut stream, hours without the service) ends no night: see
docs/decisions/0016. Every try that is paid for is on record before it is made, so that a crash in
the middle of it is charged as well.
"""

import math
import random

from agent.attempt.lab import Lab, SessionOver
from agent.night.budget import reason_to_stop, seconds_left
from agent.night.waiting import CHECK_AGAIN_SECONDS, idle_seconds, stand_by
from agent.record.chain import request_sha
from agent.record.events import (
    Event,
    ModelAsked,
    ModelCalled,
    Noticed,
    Reserve,
    RetryWaited,
    StopReason,
)
from agent.researcher.base import CallFailed, Model, ModelError, Reply
from agent.researcher.conversation import Conversation
from sandbox.contract.log import log

USAGE_UNKNOWN = "usage_unknown"
LONGEST_BACKOFF_SECONDS = 120.0
MOST_UNUSABLE_ANSWERS = 5
"""In a row and in one conversation: asked word for word, the sixth would be no better."""


def ask(
    lab: Lab,
    model: Model,
    conversation: Conversation,
    reserve: Reserve,
    patience_seconds: float = math.inf,
) -> Reply:
    """The model's reply, on record, however long it takes to get one.

    Limits hold before each try, which may use `reserve` at most. Of an outage no more than
    `patience_seconds` are waited out.

    Raises:
        ModelError: asking again does not help, or would take longer than the session.
        SessionOver: the person asked to stop, or a limit would be broken.
        KeyboardInterrupt: passed on, with the call that it broke off on the bill.
    """
    reply = _first_reply(lab, model, conversation, reserve, patience_seconds)
    ledger = lab.ledger
    stored = {
        "request": request_sha(conversation.shas),
        "reply": conversation.store_reply(reply.content),
    }
    ledger.append(called(conversation.number, reply).model_copy(update=stored))
    if reply.usage.estimated and not any(_is_usage_unknown(e.event) for e in ledger.entries):
        text = f"{model.name}'s service counts no tokens: they are estimated, and have no price"
        ledger.append(Noticed(kind=USAGE_UNKNOWN, explanation=text))
    return reply


def called(conversation: int, reply: Reply) -> ModelCalled:
    """The call that brought a reply, for the bill."""
    return ModelCalled(
        conversation=conversation,
        model=reply.model,
        request_id=reply.request_id,
        stop_reason=reply.stop_reason,
        usage=reply.usage,
        cost_usd=reply.cost_usd,
        seconds=reply.seconds,
    )


def _is_usage_unknown(event: Event) -> bool:
    """Whether it says that the service does not count."""
    return isinstance(event, Noticed) and event.kind == USAGE_UNKNOWN


def _first_reply(
    lab: Lab,
    model: Model,
    conversation: Conversation,
    reserve: Reserve,
    patience_seconds: float,
) -> Reply:
    ledger, tries, unusable = lab.ledger, 0, 0
    while True:
        if reserve.calls:
            asked = ModelAsked(conversation=conversation.number, model=model.name, reserve=reserve)
            ledger.append(asked)
        try:
            return model.reply(conversation.prompt, _seconds_left(lab))
        except CallFailed as failed:
            if failed.lost is not None:
                ledger.append(ModelCalled.lost(conversation.number, **vars(failed.lost)))
            may_pass = failed.retry_after_seconds is not None
            if isinstance(final := failed.final, ModelError) and may_pass:
                final.reason = StopReason.API_OUTAGE  # it could be used before the night
            wait_seconds = _backoff_seconds(tries, failed.retry_after_seconds)
            if wait_seconds >= min(_seconds_left(lab), patience_seconds):
                raise final from failed
            unusable = unusable + 1 if failed.may_be_ours and len(conversation.messages) > 1 else 0
            if unusable >= MOST_UNUSABLE_ANSWERS and isinstance(final, ModelError):
                final.history_rejected = True
                raise final from failed
            error, tries = failed.error, tries + 1
            patience_seconds -= wait_seconds
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
    return seconds_left(lab.history, lab.settings.session, idle_seconds=idle_seconds(lab))


def _backoff_seconds(tries: int, retry_after_seconds: float | None) -> float:
    """Longer each time, and at least as long as the service asks; for ever if that is no use."""
    if retry_after_seconds is None:
        return math.inf
    # A little at random: sessions that an outage stopped together must not come back together.
    backoff = min(2.0 ** min(tries, 10) + random.random(), LONGEST_BACKOFF_SECONDS)
    return max(backoff, retry_after_seconds)
