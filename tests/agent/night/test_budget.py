"""When a session has to stop."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.night.budget import NOTHING, reason_to_stop, seconds_left, stop_time
from agent.record.events import Reserve, StopReason
from agent.record.history import History
from agent.record.usage import WorkingTime
from agent.settings import SessionLimits
from tests.support.histories import night


def limits(**changes: Any) -> SessionLimits:
    """No limit but those given."""
    generous = {"attempts": 1000, "hours": 1000.0, "max_failures_in_a_row": 1000}
    return SessionLimits.model_validate(generous | changes)


@pytest.fixture(scope="module")
def history() -> History:
    return night(8).history


def test_nothing_stops_a_session_within_its_limits(history: History) -> None:
    assert reason_to_stop(history, limits()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attempts": 8}, StopReason.ATTEMPTS),
        ({"hours": 0.01}, StopReason.HOURS),
        ({"calls": 1}, StopReason.CALLS),
        ({"tokens": 1}, StopReason.TOKENS),
        ({"usd": 0.0001}, StopReason.MONEY),
        ({"max_discards_in_a_row": 1, "attempts": 9}, StopReason.DISCARDS_IN_A_ROW),
    ],
)
def test_each_limit_has_its_reason(
    history: History, changes: dict[str, Any], reason: StopReason
) -> None:
    reserve = Reserve(calls=1, tokens=0, usd=0.0)
    stop = reason_to_stop(history, limits(**changes), reserve=reserve)
    assert stop is not None
    assert reason is stop[0]


def test_whoever_asks_no_paid_model_needs_neither_money_nor_calls(history: History) -> None:
    assert reason_to_stop(history, limits(usd=0.0001, calls=1, tokens=1), reserve=NOTHING) is None


def test_the_next_step_is_reserved_for_before_it_is_made(history: History) -> None:
    used = history.spend.input_tokens + history.spend.output_tokens
    within = limits(tokens=used + 1000, calls=history.spend.calls + 1, usd=history.spend.usd + 0.5)

    def stop(tokens: int = 0, usd: float | None = 0.0, calls: int = 1) -> StopReason | None:
        found = reason_to_stop(
            history, within, reserve=Reserve(calls=calls, tokens=tokens, usd=usd)
        )
        return found and found[0]

    assert stop() is None
    assert stop(tokens=1001) is StopReason.TOKENS
    assert stop(usd=0.51) is StopReason.MONEY
    assert stop(usd=None) is StopReason.MONEY
    assert stop(calls=2) is StopReason.CALLS
    assert reason_to_stop(history, within, reserve=NOTHING) is None


def local(hour: int, minute: int) -> str:
    return datetime(2026, 6, 10, hour, minute).astimezone().astimezone(UTC).isoformat()


@pytest.mark.parametrize(
    ("since", "until", "hours"),
    [((22, 0), "07:30", 9.5), ((6, 0), "07:30", 1.5), ((7, 30), "07:30", 24.0)],
)
def test_the_stop_time_is_the_next_one_on_the_persons_clock(
    since: tuple[int, int], until: str, hours: float
) -> None:
    begun = datetime.fromisoformat(local(*since))
    assert timedelta(hours=hours) == stop_time(until, begun.isoformat()) - begun


def test_the_stop_time_counts_from_the_last_resume_and_bounds_what_is_left() -> None:
    history = History(time=WorkingTime(last_at=local(7, 0), working_since=local(6, 0)))
    assert 1800.0 == seconds_left(history, limits(until="07:30"))
    late = History(time=WorkingTime(last_at=local(7, 31), working_since=local(6, 0)))
    stop = reason_to_stop(late, limits(until="07:30"))
    assert (StopReason.STOP_TIME, "it is 07:30") == stop
