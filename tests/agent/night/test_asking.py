"""A prompt cache that stopped hitting."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.night.asking import cache_miss
from agent.record.events import Entry, ModelCalled, Usage


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
