"""Says when a session has to stop.

Pure functions of the history and the limits. The loop asks them before each step.
"""

from datetime import datetime, timedelta

from agent.record.events import Reserve, StopReason
from agent.record.history import History, refused_scores
from agent.settings import SessionLimits

Ending = tuple[StopReason, str]
NOTHING = Reserve(calls=0, tokens=0, usd=0.0)
"""What a step reserves that asks no paid model."""


def reason_to_stop(
    history: History, limits: SessionLimits, *, reserve: Reserve = NOTHING
) -> Ending | None:
    """Why the session must not go on, if the next step uses `reserve` at worst."""
    if over := work_is_done(history, limits) or time_is_over(history, limits):
        return over
    if not reserve.calls:  # who asks no paid model needs no money
        return None
    return reason_for_no_call(history, limits, reserve)


def seconds_left(history: History, limits: SessionLimits, *, idle_seconds: float = 0.0) -> float:
    """Seconds until the session's time is over, never negative; the last event was idle ago."""
    left = limits.hours * 3600 - history.time.active_seconds
    if limits.until is not None and history.time.last_at:
        stop = stop_time(limits.until, history.time.working_since)
        left = min(left, (stop - datetime.fromisoformat(history.time.last_at)).total_seconds())
    return max(0.0, left - idle_seconds)


def time_is_over(
    history: History, limits: SessionLimits, *, idle_seconds: float = 0.0
) -> Ending | None:
    """How a session ends whose time is over, if it is; see `seconds_left`."""
    if seconds_left(history, limits, idle_seconds=idle_seconds) > 0:
        return None
    if history.time.active_seconds + idle_seconds >= limits.hours * 3600:
        return StopReason.HOURS, f"{limits.hours:g} hours are over"
    return StopReason.STOP_TIME, f"it is {limits.until}"


def stop_time(until: str, since: str) -> datetime:
    """The first local time `until` after `since`, whatever a change of clocks lies between."""
    begun = datetime.fromisoformat(since).astimezone().replace(tzinfo=None)
    hour, minute = map(int, until.split(":"))
    stop = begun.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (stop if stop > begun else stop + timedelta(days=1)).astimezone()


def work_is_done(history: History, limits: SessionLimits) -> Ending | None:
    """How a session ends whose attempts are used up, or lead nowhere."""
    if history.baseline is not None and history.best is None:
        refusal = history.refusals.of(history.baseline.number)
        why = refusal.reason if refusal else "no attempt is left that stands"
        text = f"the baseline was refused ({why}): nothing is left to compare with"
        return StopReason.BASELINE_FAILED, text
    if len(history.completed) >= limits.attempts:
        return StopReason.ATTEMPTS, f"{limits.attempts} attempts are done"
    failures, discards = history.failures_in_a_row, history.discards_in_a_row
    if failures >= limits.max_failures_in_a_row:
        text = f"the last {failures} attempts failed or were invalid"
        return StopReason.FAILURES_IN_A_ROW, text
    if limits.max_discards_in_a_row is not None and discards >= limits.max_discards_in_a_row:
        return StopReason.DISCARDS_IN_A_ROW, f"none of the last {discards} attempts was kept"
    return None


def is_refused_too_often(history: History, limits: SessionLimits, researcher: str) -> Ending | None:
    """How the part of a researcher ends whose scores were refused for what no honest model does."""
    refused = refused_scores(history, researcher)
    if refused < limits.max_refused_scores:
        return None
    text = f"{refused} scores of {researcher} were refused for what no honest model does"
    return StopReason.REFUSED_SCORES, f"{text}: see score.md and its attempts before it goes on"


def reason_for_no_call(history: History, limits: SessionLimits, reserve: Reserve) -> Ending | None:
    """Why not even one more call can be made, after what the session has spent."""
    usd = limits.usd
    return _calls_are_out(history, limits, reserve) or money_is_out(history, usd, reserve.usd)


def _calls_are_out(history: History, limits: SessionLimits, reserve: Reserve) -> Ending | None:
    if limits.calls is not None and history.spend.calls + reserve.calls > limits.calls:
        return StopReason.CALLS, f"{history.spend.calls} of {limits.calls} calls are made"
    used = history.spend.input_tokens + history.spend.output_tokens
    if limits.tokens is not None and used + reserve.tokens > limits.tokens:
        could = f"the next call could need {reserve.tokens}"
        return StopReason.TOKENS, f"{used} of {limits.tokens} tokens are used and {could}"
    return None


def money_is_out(
    history: History, limit_usd: float | None, reserve_usd: float | None
) -> Ending | None:
    """How a session ends whose money could not pay for the next call."""
    if limit_usd is None:
        return None
    # Without a price the money cannot be counted, and a limit that cannot be kept is none.
    if reserve_usd is None or history.spend.unpriced_calls:
        return StopReason.MONEY, "a call has no known price, so a money limit cannot be kept"
    if history.spend.usd + reserve_usd > limit_usd:
        spent = f"${history.spend.usd:.2f} of ${limit_usd:.2f} are spent"
        return StopReason.MONEY, f"{spent} and the next call could cost ${reserve_usd:.2f}"
    return None
