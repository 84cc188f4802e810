"""A researcher that goes in circles, and a cache that stopped hitting."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.night.circles import Act, CircleWatch, act, cache_miss, circle
from agent.record.events import Entry, ModelCalled, Usage

READ = act("read", {"file_path": "train.py"}, "1 X = 1", is_error=False)
LIST = act("list", {}, "train.py", is_error=False)
BAD_EDIT = act("edit", {"old_string": "a"}, "not there", is_error=True)


def other(number: int) -> Act:
    return act("search", {"pattern": str(number)}, "", is_error=False)


def test_the_same_call_with_the_same_result_is_a_circle_the_fourth_time() -> None:
    acts = [READ, other(1), READ, other(2), READ, other(3)]
    assert circle(acts) is None
    assert "read was called 4 times" in str(circle([*acts, READ]))


def test_the_same_call_with_another_result_is_none() -> None:
    reads = [act("read", {}, f"version {n}", is_error=False) for n in range(9)]
    assert circle(reads) is None


def test_a_failing_edit_is_a_circle_the_third_time_whatever_the_error_says() -> None:
    again = act("edit", {"old_string": "a"}, "not there either", is_error=True)
    assert circle([BAD_EDIT, other(1), again]) is None
    assert "edit failed 3 times" in str(circle([BAD_EDIT, other(1), again, BAD_EDIT]))


def test_two_calls_that_take_turns_are_a_circle() -> None:
    assert circle([READ, LIST, READ]) is None
    assert "took turns" in str(circle([READ, LIST, READ, LIST]))


def test_an_attempt_ends_every_circle() -> None:
    watch = CircleWatch()
    assert watch.circle([READ, READ, READ], attempts=0) is None
    assert watch.circle([READ], attempts=1) is None
    assert watch.circle([READ, READ, READ], attempts=1) is None
    assert watch.circle([READ], attempts=1) is not None
    assert 1 == watch.warnings


def called(seconds: float, read: int, write: int, **changes: Any) -> Entry:
    usage = Usage(
        input_tokens=10, output_tokens=5, cache_read_tokens=read, cache_write_tokens=write
    )
    event = ModelCalled(
        conversation=changes.get("conversation", 1),
        model="claude-sonnet-5-5",
        request_id="r",
        stop_reason=changes.get("stop_reason", "tool_use"),
        usage=usage,
        cost_usd=0.1,
        seconds=1.0,
    )
    at = datetime(2026, 3, 7, tzinfo=UTC) + timedelta(seconds=seconds)
    return Entry(seq=0, at=at.isoformat(), previous="0" * 64, hash="0" * 64, event=event)


FIRST = called(0, 0, 20_000)


@pytest.mark.parametrize(
    ("second", "is_odd"),
    [
        (called(300, 20_000, 500), False),
        (called(300, 0, 20_500), True),
        (called(300, 4_000, 16_500), True),
        (called(3700, 0, 20_500), False),
        (called(300, 0, 20_500, conversation=2), False),
        (called(300, 0, 20_500, stop_reason="lost"), False),
    ],
    ids=["hit", "miss", "half_a_miss", "expired", "new_conversation", "cut_stream"],
)
def test_a_cache_that_should_have_hit_is_noticed(second: Entry, is_odd: bool) -> None:
    assert is_odd == (cache_miss([second, FIRST]) is not None)


def test_a_server_without_a_cache_raises_no_alarm() -> None:
    assert cache_miss([called(300, 0, 0), called(0, 0, 0)]) is None
