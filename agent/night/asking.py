"""Asks a model until it answers, or time is over.

What passes by itself (an overload, a cut stream, hours without the service) ends no night: see
docs/decisions/0016. Every try that is paid for is on record before it is made, so that a crash in
the middle of it is charged as well.
"""

import math
import random
from collections.abc import Iterable
from datetime import datetime

from agent.attempt.lab import Lab, SessionOver
from agent.night.budget import reason_to_stop, seconds_left
from agent.night.waiting import CHECK_AGAIN_SECONDS, stand_by
from agent.record.chain import request_sha
from agent.record.events import Entry, ModelAsked, ModelCalled, Noticed, Reserve, RetryWaited
from agent.researcher.base import CallFailed, Model, Reply
from agent.researcher.conversation import Conversation
from sandbox.contract.log import log

LONGEST_BACKOFF_SECONDS = 120.0
CACHE_SECONDS = 3600.0
LEAST_CACHED_TOKENS = 4096
"""Below this a miss is too cheap to speak of, and a model may not cache at all."""


def ask(lab: Lab, model: Model, conversation: Conversation, reserve: Reserve) -> Reply:
    """The model's reply, on record, however long it takes to get one.

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
    reply = _first_reply(lab, model, conversation, reserve)
    ledger = lab.ledger
    ledger.append(
        ModelCalled(
            conversation=conversation.number,
            model=reply.model,
            request_id=reply.request_id,
            stop_reason=reply.stop_reason,
            usage=reply.usage,
            cost_usd=reply.cost_usd,
            seconds=reply.seconds,
            request=request_sha(conversation.shas),
            reply=conversation.store_reply(reply.content),
        )
    )
    if odd := cache_miss(reversed(ledger.entries)):
        ledger.append(Noticed(kind="cache_miss", explanation=odd))
    return reply


def _first_reply(lab: Lab, model: Model, conversation: Conversation, reserve: Reserve) -> Reply:
    ledger, tries = lab.ledger, 0
    while True:
        if reserve.calls:
            asked = ModelAsked(conversation=conversation.number, model=model.name, reserve=reserve)
            ledger.append(asked)
        try:
            return model.reply(conversation.prompt, _seconds_left(lab))
        except CallFailed as failed:
            if (lost := failed.lost) is not None:
                ledger.append(
                    ModelCalled.lost(
                        conversation.number,
                        lost.model,
                        lost.usage,
                        lost.cost_usd,
                        request_id=lost.request_id,
                        seconds=lost.seconds,
                    )
                )
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


def cache_miss(entries: Iterable[Entry]) -> str | None:
    """What is odd about the last call's cache, if it should have hit and did not.

    Args:
        entries: of the ledger, newest first; only as many are read as it takes.
    """
    calls = ((e.at, e.event) for e in entries if isinstance(e.event, ModelCalled))
    newest, before = next(calls, None), next(calls, None)
    if newest is None or before is None:
        return None
    (at, call), (at_before, call_before) = newest, before
    kept = call_before.usage.cache_read_tokens + call_before.usage.cache_write_tokens
    apart = datetime.fromisoformat(at) - datetime.fromisoformat(at_before)
    if (
        call.conversation != call_before.conversation
        or call.model != call_before.model
        or "lost" in (call.stop_reason, call_before.stop_reason)
        or kept < LEAST_CACHED_TOKENS
        or apart.total_seconds() > CACHE_SECONDS
        or call.usage.cache_read_tokens >= kept / 2
    ):
        return None
    return (
        f"{call.usage.cache_read_tokens} of {kept} tokens came from the prompt cache, "
        f"{apart.total_seconds():.0f} s after they were put there"
    )
