"""Says when a session has to stop, before each call and each run."""

from __future__ import annotations

from typing import Protocol

from agent.history import History
from agent.records import StopReason


class SessionLimits(Protocol):
    """The settings that bound a session; see `[session]` in program.md."""

    @property
    def attempts(self) -> int: ...
    @property
    def hours(self) -> float: ...
    @property
    def usd(self) -> float | None: ...
    @property
    def max_failures_in_a_row(self) -> int: ...


def reason_to_stop(
    history: History, limits: SessionLimits, *, reserve_usd: float | None = 0.0
) -> tuple[StopReason, str] | None:
    """Why the session must not go on, if it must not.

    Args:
        history: what happened so far.
        limits: what the person allowed.
        reserve_usd: the worst that the next step can cost; `None` when it cannot be known,
            which a money limit refuses.
    """
    if len(history.completed) >= limits.attempts:
        return StopReason.ATTEMPTS, f"{limits.attempts} attempts are done"
    if history.active_seconds >= limits.hours * 3600:
        return StopReason.HOURS, f"{limits.hours:g} hours are over"
    if history.failures_in_a_row >= limits.max_failures_in_a_row:
        return (
            StopReason.FAILURES_IN_A_ROW,
            f"the last {history.failures_in_a_row} attempts failed or were invalid",
        )
    return _money_is_out(history, limits.usd, reserve_usd)


def seconds_left(history: History, limits: SessionLimits) -> float:
    """Seconds until the session's time is over, never negative."""
    return max(0.0, limits.hours * 3600 - history.active_seconds)


def _money_is_out(
    history: History, limit_usd: float | None, reserve_usd: float | None
) -> tuple[StopReason, str] | None:
    if limit_usd is None:
        return None
    if reserve_usd is None or history.unpriced_calls:
        return StopReason.MONEY, "a call has no known price, so a money limit cannot be kept"
    if history.spent_usd + reserve_usd > limit_usd:
        return (
            StopReason.MONEY,
            f"${history.spent_usd:.2f} of ${limit_usd:.2f} are spent and the next call could cost "
            f"${reserve_usd:.2f}",
        )
    return None
