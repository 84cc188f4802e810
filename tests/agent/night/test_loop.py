"""A whole simulated night: outage, rate limits, cut streams, refusals, crashes."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import pytest

from agent.morning.audit import audit
from agent.record.chain import read_blob, read_ledger
from agent.record.events import (
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ConversationOpened,
    Entry,
    ModelCalled,
    Noticed,
    RetryWaited,
    SessionEnded,
    StopReason,
)
from agent.record.history import History, fold
from agent.report.report import MARKDOWN_NAME, REPORT_NAME, write_report
from agent.report.summary import summary
from agent.report.tables import spend_by_model
from tests.support.messages_server import (
    Cut,
    MessagesServer,
    Request,
    Status,
    Turn,
    text,
)
from tests.support.minds import DETAILS, Mind, work_with_claude
from tests.support.nights import Crash, CrashingLedger, Place

ATTEMPTS = 112
OUTAGE_SECONDS = 90 * 60.0
CALL_SECONDS = 15.0
CUTS = ("error", "reset", "fin", "end", "bad_json")


@dataclass
class Weather:
    """What goes wrong at which call, on the way from a mind to its client."""

    place: Place
    mind: Mind
    chance: random.Random
    happened: Counter[str] = field(default_factory=Counter)

    def script(self) -> Iterator[Any]:
        calls = self.chance.sample(range(5, 230), 36)
        cut, refused, limited, outage = calls[:20], calls[20:25], calls[25:35], calls[35]
        for call in range(10_000):
            if call == outage:
                yield from self._outage()
            if call in limited:
                self.happened["rate_limit"] += 1
                yield Status(429, "rate_limit_error", headers={"retry-after": "40"})
            if call in cut:
                self.happened["cut"] += 1
                yield self._cut
            elif call in refused:
                self.happened["refusal"] += 1
                yield self._refused
            yield self._answered

    def _outage(self) -> Iterator[Status]:
        end = self.place.clock.seconds + OUTAGE_SECONDS
        while self.place.clock.seconds < end:
            self.happened["outage"] += 1
            yield Status(529, "overloaded_error")

    def _answered(self, request: Request) -> Turn:
        self.place.clock.advance(CALL_SECONDS)
        return self.mind.answer(request)

    def _cut(self, request: Request) -> Turn:
        how: Any = self.chance.choice(CUTS)
        cut = Cut(self.chance.randint(3, 12), how)
        return dataclasses.replace(self._answered(request), cut=cut)

    def _refused(self, request: Request) -> Turn:
        return Turn((text("I"),), "refusal", DETAILS)


def work_through_crashes(
    place: Place, server: MessagesServer, crashes: list[tuple[int, bool]]
) -> SessionEnded:
    """As many lives as it takes: each crash is at an event's number, before or after its write."""
    lab = place.begin("claude")
    for crash_at, after_writing in crashes:
        assert isinstance(lab.ledger, CrashingLedger)
        lab.ledger.crash_at, lab.ledger.crash_after_writing = crash_at, after_writing
        with pytest.raises(Crash):
            work_with_claude(lab, place, server)
        lab = place.resume()
    return work_with_claude(lab, place, server)


@dataclass
class Past:
    """A night that is over."""

    place: Place
    server: MessagesServer
    weather: Weather
    ended: SessionEnded
    entries: list[Entry]
    processor_seconds: float

    @property
    def history(self) -> History:
        return fold(self.entries)

    def events(self, kind: type) -> list[Any]:
        return [entry.event for entry in self.entries if isinstance(entry.event, kind)]

    def notices(self, kind: str) -> list[str]:
        return [event.explanation for event in self.events(Noticed) if event.kind == kind]


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    changes: dict[str, dict[str, Any]] = {
        "session": {"attempts": ATTEMPTS, "hours": 12.0, "usd": 20.0, "max_failures_in_a_row": 10},
        "researcher": {"max_conversation_tokens": 16_000, "then": []},
    }
    place = Place(tmp_path_factory.mktemp("simulated"), changes=changes)
    weather = Weather(place, Mind(random.Random(1)), random.Random(2))
    server = MessagesServer(weather.script(), clock=place.clock.monotonic, endless=True)
    chance = random.Random(3)
    crashes = [(base + chance.randrange(500), chance.random() < 0.5) for base in (300, 1200, 2400)]
    started = time.process_time()
    with server:
        ended = work_through_crashes(place, server, crashes)
    seconds = time.process_time() - started
    return Past(place, server, weather, ended, read_ledger(place.directory), seconds)


def test_the_night_ends_by_itself_with_a_typed_reason(past: Past) -> None:
    assert past.ended.reason is StopReason.ATTEMPTS
    assert past.entries[-1].event == past.ended
    assert 9.0 < past.history.time.active_seconds / 3600 < 12.0


def test_ten_hours_take_less_than_three_minutes_of_a_processor(past: Past) -> None:
    assert past.processor_seconds < 180


def test_all_of_the_weather_came_and_none_of_it_was_forgotten(past: Past) -> None:
    assert past.weather.happened["cut"] >= 15  # the night ends before the last of them
    assert past.weather.happened["refusal"] == 5
    assert past.weather.happened["rate_limit"] == 10
    assert past.weather.happened["outage"] > 30
    waited = sum(event.wait_seconds for event in past.events(RetryWaited))
    assert waited > OUTAGE_SECONDS
    assert 3 == past.history.resumes
    assert 5 == len(past.notices("refusal"))


def test_no_request_was_one_that_the_service_refuses(past: Past) -> None:
    assert [] == past.server.unplanned


def test_every_attempt_is_on_record_once(past: Past) -> None:
    started = [event.attempt for event in past.events(AttemptStarted)]
    closed = [e.attempt for e in past.events(AttemptFinished) + past.events(AttemptInterrupted)]
    assert list(range(len(started))) == started
    assert started == sorted(closed)
    assert ATTEMPTS == len(past.history.completed)


def test_the_researcher_never_changes_hands_over_single_refusals(past: Past) -> None:
    assert {"claude-sonnet-5-5"} == {e.researcher for e in past.events(ConversationOpened)}


def test_the_token_ceiling_was_reached_often_and_opened_new_conversations(past: Past) -> None:
    reasons = Counter(event.reason for event in past.events(ConversationOpened))
    assert reasons["the conversation reached its token ceiling"] >= 4


def test_the_bill_is_the_services_own_to_the_cent(past: Past) -> None:
    calls = past.events(ModelCalled)
    recorded = {call.request_id: call.cost_usd for call in calls if call.request_id}
    billed = {f"req_{n:06d}": bill.usd for n, bill in enumerate(past.server.bills, start=1)}
    assert recorded == pytest.approx({number: billed[number] for number in recorded})
    cut_off = sum(usd for number, usd in billed.items() if number not in recorded)
    charged_for_them = sum(call.cost_usd for call in calls if call.request_id is None)
    assert cut_off <= charged_for_them
    told = summary(past.entries).spent_usd
    assert round(past.server.billed_usd - cut_off, 2) == round(told - charged_for_them, 2)


def test_the_report_counts_what_the_service_counted(past: Past, tmp_path: Path) -> None:
    """Cache reads, writes and misses of every call that was answered or cut, not just their sum."""
    calls = [call for call in past.events(ModelCalled) if call.request_id]
    bills = [past.server.bills[int(call.request_id.removeprefix("req_")) - 1] for call in calls]
    for name in ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens"):
        assert [getattr(bill, name) for bill in bills] == [getattr(c.usage, name) for c in calls]
    (row,) = spend_by_model(past.entries)
    directory = past.place.directory
    write_report(directory, past.entries, lambda sha: read_blob(directory, sha))
    read, cached = row.usage.input_tokens, row.usage.cache_read_tokens
    assert (
        f"tokens read anew {read:,}, from cache {cached:,}, "
        in (directory / MARKDOWN_NAME).read_text()
    )


def test_the_audit_of_the_whole_night_finds_nothing(past: Past) -> None:
    assert [] == audit(past.place.directory, past.entries)


def test_the_money_limit_holds(past: Past) -> None:
    assert past.server.billed_usd <= past.history.spend.usd + 1e-9
    assert past.history.spend.usd <= 20.0


def test_input_tokens_per_attempt_stay_flat(past: Past) -> None:
    tokens = input_tokens_per_attempt(past.entries)
    assert len(tokens) >= ATTEMPTS
    trend = linear_regression(range(10, len(tokens)), tokens[10:])
    growth = trend.slope * (len(tokens) - 10)
    assert abs(growth) < 0.15 * fmean(tokens[10:])
    assert max(tokens[10:]) < 5 * 16_000


def test_the_cache_never_stopped_hitting(past: Past) -> None:
    read = sum(call.usage.cache_read_tokens for call in past.events(ModelCalled))
    assert read > 0.6 * past.history.spend.input_tokens


def test_the_report_tells_what_the_night_cost(past: Past, tmp_path: Path) -> None:
    directory = past.place.directory
    write_report(directory, past.entries, lambda sha: read_blob(directory, sha))
    assert f"{past.history.spend.usd:.2f}" in (directory / REPORT_NAME).read_text()


def input_tokens_per_attempt(entries: list[Entry]) -> list[int]:
    tokens, spent = [], 0
    for entry in entries:
        if isinstance(entry.event, ModelCalled) and entry.event.request_id:
            usage = entry.event.usage
            spent += usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
        elif isinstance(entry.event, AttemptStarted) and entry.event.kind == "candidate":
            tokens.append(spent)
            spent = 0
    return tokens
