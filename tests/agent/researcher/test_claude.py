"""The model behind the Messages API, over real HTTP and through the real SDK."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    Span,
    get_current_span,
    use_span,
)

from agent.attempt.lab import SessionOver
from agent.record.events import StopReason, Usage
from agent.researcher.api_errors import ERROR_CHARACTERS, retry_after_seconds
from agent.researcher.base import CallFailed, ModelError, Prompt
from agent.researcher.providers import (
    base_url,
    check_credentials,
    cost_usd,
    price_known,
    retirement,
    unusable_credentials,
)
from agent.researcher.wire import thinks_adaptively
from tests.support.claude_calls import OPENING, SYSTEM, TOOLS, Night, ask, claude, reply_of
from tests.support.messages_server import (
    API_VERSION,
    CATALOGUE,
    MAX_BODY_BYTES,
    UNPRICED,
    Cut,
    MessagesServer,
    Raw,
    Status,
    Turn,
    first_problem,
    say,
    stepped,
    text,
    thinking,
    tinker,
    tool,
)

PROMPT = Prompt(SYSTEM, TOOLS, OPENING)
GOOD = say(
    thinking("A larger step may do."), text("Trying."), tool("run", hypothesis="twice the lr")
)


def refusal_of(night: Night, *script: Any, **changes: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        ask(night, *script, **changes)
    return raised.value


def test_a_reply_holds_the_blocks_byte_for_byte_and_the_calls_in_order() -> None:
    turn = say(text("Both. ✓"), tool("run", hypothesis='quote " and \\'), tool("run", n=0.1))
    reply, _ = ask(Night(), turn)
    assert reply.content == [
        {"type": "text", "text": "Both. ✓"},
        {
            "type": "tool_use",
            "id": "toolu_000001",
            "name": "run",
            "input": {"hypothesis": 'quote " and \\'},
        },
        {"type": "tool_use", "id": "toolu_000002", "name": "run", "input": {"n": 0.1}},
    ]
    assert [call.id for call in reply.tool_calls] == ["toolu_000001", "toolu_000002"]
    assert reply.tool_calls[0].input == {"hypothesis": 'quote " and \\'}
    assert (reply.stop_reason, reply.model) == ("tool_use", "claude-sonnet-5-5")
    assert reply.request_id == "req_000001"


TRANSIENT = {
    "overload": Status(529, "overloaded_error"),
    "rate_limit": Status(429, "rate_limit_error"),
    "ramp_limit": Status(429, "rate_limit_error", error_code="ramp_limit_exceeded"),
    "request_timeout": Status(408, "timeout_error"),
    "conflict": Status(409),
    "bad_gateway": Status(502),
    "internal_error": Status(500),
    "service_says_try_again": Status(400, headers={"x-should-retry": "true"}),
    "truncated_upload": Status(400, message="not valid json: unexpected end of data"),
    "overload_in_a_stream": say(text("half"), cut=Cut(3, "error")),
    "unreadable_error_in_a_stream": say(text("half"), cut=Cut(3, "error", "api_error")),
    "reset": say(text("half"), cut=Cut(3, "reset")),
    "closed_connection": say(text("half"), cut=Cut(3, "fin")),
    "clean_early_end": say(tool("run", hypothesis="half"), cut=Cut(4, "end")),
    "end_before_any_event": say(text("nothing"), cut=Cut(0, "end")),
    "end_before_the_stop_reason": say(tool("run", hypothesis="x"), cut=Cut(4, "end")),
    "stall": say(text("half"), cut=Cut(3, "stall")),
    "bad_json": say(text("half"), cut=Cut(3, "bad_json")),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_what_passes_by_itself_is_asked_again(fault: Turn | Status) -> None:
    night = Night()
    hangs = isinstance(fault, Turn) and fault.cut is not None and fault.cut.how == "stall"
    reply, server = ask(night, fault, GOOD, read_seconds=0.3 if hangs else 10.0)
    assert reply.stop_reason == "tool_use"
    assert len(night.retries) == 1
    assert server.requests[0] == server.requests[1]


FATAL = {
    "enforced_spend_cap": Status(429, error_code="enforced_spend_limit_reached"),
    "contract_spend_cap": Status(429, error_code="contract_spend_limit_reached"),
    "service_says_stop": Status(529, headers={"x-should-retry": "false"}),
    "bad_request": Status(400, "invalid_request_error"),
    "bad_key": Status(401, "authentication_error"),
    "no_credit": Status(402, "billing_error"),
    "forbidden": Status(403, "permission_error"),
    "unknown_model": Status(404, "not_found_error"),
    "too_large": Status(413, "request_too_large"),
    "unprocessable": Status(422, "invalid_request_error"),
    "refused_in_a_stream": say(text("half"), cut=Cut(3, "error", "invalid_request_error")),
}


@pytest.mark.parametrize("fault", FATAL.values(), ids=FATAL.keys())
def test_what_stays_wrong_is_asked_once(fault: Turn | Status) -> None:
    night = Night()
    error = refusal_of(night, fault)
    assert error.reason is StopReason.API_REFUSED
    assert error.hint
    assert night.retries == []


def test_a_refused_history_is_told_from_a_refused_account() -> None:
    bound = Status(400, message="this `thinking` block is bound to a different conversation")
    assert refusal_of(Night(), bound).history_rejected
    assert refusal_of(Night(), Status(413)).history_rejected
    assert not refusal_of(Night(), Status(401)).history_rejected
    assert not refusal_of(Night(), FATAL["enforced_spend_cap"]).history_rejected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({"retry-after": "600"}, 600.0), ({"retry-after-ms": "45000"}, 45.0)],
    ids=["seconds", "milliseconds"],
)
def test_retry_after_is_obeyed(headers: dict[str, str], expected: float) -> None:
    night = Night()
    ask(night, Status(429, "rate_limit_error", headers=headers), GOOD)
    assert night.retries[0][1] == expected


def test_retry_after_past_the_deadline_ends_the_wait_at_once() -> None:
    night = Night(seconds_left=3600.0)
    error = refusal_of(night, Status(429, "rate_limit_error", headers={"retry-after": "7200"}))
    assert error.reason is StopReason.API_OUTAGE
    assert night.seconds_left == 3600.0


def test_an_outage_of_hours_is_waited_out() -> None:
    night = Night(seconds_left=36_000.0)
    reply, _ = ask(night, *[Status(529, "overloaded_error")] * 80, GOOD)
    assert reply.stop_reason == "tool_use"
    assert sum(wait for _, wait in night.retries) > 2 * 3600


def test_an_outage_longer_than_the_session_ends_before_its_deadline() -> None:
    night = Night(seconds_left=600.0)
    server = MessagesServer([Status(529, "overloaded_error")] * 100, endless=True)
    with (
        server,
        claude(server.url) as model,
        night.asks(model) as asks,
        pytest.raises(ModelError) as raised,
    ):
        asks()
    assert raised.value.reason is StopReason.API_OUTAGE
    assert 0 < night.seconds_left < 600.0


def test_the_deadline_ends_a_healthy_call_as_well() -> None:
    night = Night(seconds_left=0.2)
    error = refusal_of(night, say(text("slow"), cut=Cut(3, "pings")))
    assert (error.reason, night.retries) == (StopReason.HOURS, [])


def test_a_stream_that_only_pings_is_given_up() -> None:
    night = Night()
    reply, _ = ask(night, say(text("x"), cut=Cut(2, "pings")), GOOD, call_seconds=0.3)
    assert reply.stop_reason == "tool_use"
    assert night.retries[0][0] == "the reply did not end in 0 s"


def test_every_call_happens_within_the_span_that_surrounds_it() -> None:
    """The SDK's own spans hang from the current one, while a reply arrives as well."""
    seen, spans = list[Span](), list[Span]()

    def clock() -> float:
        seen.append(get_current_span())
        return time.monotonic()

    with MessagesServer([GOOD] * 2) as server, claude(server.url, clock=clock) as model:
        for _ in range(2):
            seen.clear()
            spans.append(NonRecordingSpan(INVALID_SPAN_CONTEXT))
            with use_span(spans[-1]):
                reply_of(model)
            assert len(seen) > 2  # which are before and after the reply
            assert all(span is spans[-1] for span in seen)


def test_a_server_that_is_not_there_is_waited_for() -> None:
    night = Night(seconds_left=30.0)
    with (
        claude("http://127.0.0.1:9") as model,
        night.asks(model) as asks,
        pytest.raises(ModelError) as raised,
    ):
        asks()
    assert raised.value.reason is StopReason.API_OUTAGE
    assert len(night.retries) > 1


ADDRESSES = {
    "": None,
    "http://x/v1": "http://x",
    "http://x:4000/v1/messages/": "http://x:4000",
    "http://x/v1/v1": "http://x",
    "https://x/anthropic/v1": "https://x/anthropic",
    "localhost:11434": "http://localhost:11434",
    "127.0.0.1:4000/": "http://127.0.0.1:4000",
    "[::1]:80": "http://[::1]:80",
    "api.example.com": "https://api.example.com",
    " http://somebody:word@proxy:1 ": "http://somebody:word@proxy:1",
}


@pytest.mark.parametrize(("told", "meant"), ADDRESSES.items())
def test_an_address_is_tidied(told: str, meant: str | None) -> None:
    assert meant == base_url({"ANTHROPIC_BASE_URL": told})


@pytest.mark.parametrize(
    "told",
    ["ftp://secret", "http://", "::1", "http://a secret", "http://x:secret", "http://x?secret"],
)
def test_an_address_that_is_none_is_refused_by_name_and_not_shown(told: str) -> None:
    with pytest.raises(ModelError, match="ANTHROPIC_BASE_URL") as raised, claude(told):
        pass
    assert "secret" not in raised.value.message


def test_half_a_tool_call_is_not_a_tool_call() -> None:
    cut_short = Turn((tool("run", hypothesis="long"),), "max_tokens", cut_tool_input=16)
    reply, _ = ask(Night(), cut_short)
    assert (reply.stop_reason, reply.tool_calls) == ("max_tokens", [])


def test_a_refusal_is_a_reply_with_its_reason() -> None:
    details = {"type": "refusal", "category": "frontier_llm", "explanation": "It may compete."}
    reply, _ = ask(Night(), Turn((text("I"),), "refusal", details))
    assert (reply.stop_reason, reply.tool_calls) == ("refusal", [])
    assert "frontier_llm" in reply.explanation
    assert "It may compete." in reply.explanation


def test_an_empty_reply_is_a_reply() -> None:
    reply, _ = ask(Night(), Turn((), "end_turn"))
    assert (reply.stop_reason, reply.content) == ("end_turn", [])


def test_what_a_reply_holds_counts_more_than_how_it_says_it_ended() -> None:
    reply, _ = ask(Night(), Turn((tool("run", hypothesis="x"),), "tea_break", odd=True))
    assert reply.stop_reason == "tea_break"
    assert [call.name for call in reply.tool_calls] == ["run"]


def test_an_unknown_block_passes_through_unchanged() -> None:
    block = {"type": "hologram", "shape": {"sides": 6}, "text": None}
    reply, _ = ask(Night(), Turn((block, tool("run", hypothesis="x")), odd=True))
    assert reply.content[0] == block
    assert [call.name for call in reply.tool_calls] == ["run"]


def converse(server: MessagesServer, rounds: int) -> list[dict[str, Any]]:
    """Answer every call of so many replies; the conversation as it is on record."""
    messages = copy.deepcopy(OPENING)
    with claude(server.url) as model:
        for _ in range(rounds):
            reply = reply_of(model, messages)
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "{}"}
                for call in reply.tool_calls
            ]
            messages += [
                {"role": "assistant", "content": reply.content},
                {"role": "user", "content": results},
            ]
    return messages


def test_replayed_thinking_is_accepted() -> None:
    with MessagesServer([GOOD] * 5) as server:
        messages = converse(server, 5)
    assert sum(message["role"] == "assistant" for message in messages) == 5


def test_blank_text_in_a_reply_is_not_sent_back() -> None:
    turn = say(text("\n"), text("Why not."), tool("run", hypothesis="x"))
    with MessagesServer([turn, GOOD]) as server:
        messages = converse(server, 2)
    assert ["text", "text", "tool_use"] == [block["type"] for block in messages[1]["content"]]
    sent = server.requests[1]["messages"][1]["content"]
    assert ["text", "tool_use"] == [block["type"] for block in sent]


def test_a_reply_of_nothing_but_blank_text_is_not_sent_back() -> None:
    with MessagesServer([say(text("\n")), GOOD]) as server, claude(server.url) as model:
        blank = {"role": "assistant", "content": reply_of(model).content}
        again = {"role": "user", "content": [{"type": "text", "text": "Go on."}]}
        reply_of(model, [*OPENING, blank, again])
    (sent,) = server.requests[1]["messages"]
    assert ["Begin.", "Go on."] == [block["text"] for block in sent["content"]]


def test_an_edited_history_is_refused_as_the_service_does() -> None:
    with MessagesServer([GOOD] * 2) as server:
        messages = converse(server, 2)
    messages[0]["content"][0]["text"] = "Begin!"
    server = MessagesServer([GOOD], tolerant=True)
    with server, claude(server.url) as model, pytest.raises(CallFailed) as failed:
        reply_of(model, messages)
    assert isinstance(failed.value.final, ModelError)
    assert failed.value.final.history_rejected
    with pytest.raises(AssertionError, match="bound to a different conversation"):
        server.check()


def test_a_request_leaves_the_stored_conversation_alone() -> None:
    go_on = [{"type": "text", "text": "Go on."}]
    messages: list[dict[str, Any]] = [*OPENING, {"role": "user", "content": go_on}]
    before = copy.deepcopy(messages)
    with MessagesServer([GOOD]) as server, claude(server.url) as model:
        reply_of(model, messages)
    assert messages == before
    assert server.requests[0]["messages"][0]["content"][1]["cache_control"]["ttl"] == "1h"


def test_all_but_the_newest_message_comes_from_the_cache() -> None:
    with MessagesServer([GOOD] * 4) as server:
        converse(server, 4)
    for before, after in zip(server.bills, server.bills[1:], strict=False):
        assert after.cache_read_tokens == before.cache_read_tokens + before.cache_write_tokens
        assert after.input_tokens == 0


def test_the_cache_outlives_a_training_and_dies_after_an_hour() -> None:
    now = 1000.0
    server = MessagesServer([GOOD] * 3, clock=lambda: now)
    with server, claude(server.url) as model:
        for pause_seconds in (0.0, 1200.0, 3601.0):
            now += pause_seconds
            reply_of(model)
    assert [bill.cache_read_tokens > 0 for bill in server.bills] == [False, True, False]


def test_costs_equal_the_servers_account_cut_streams_included() -> None:
    night = Night()
    cuts = [say(text("half of it " * 20), cut=Cut(after, "fin")) for after in (1, 4, 9)]
    costs = 0.0
    server = MessagesServer([GOOD, *cuts, GOOD, cuts[0], GOOD])
    with server, claude(server.url) as model, night.asks(model) as asks:
        for _ in range(3):
            costs += asks().cost_usd or 0.0
    assert len(night.lost) == 4
    assert server.billed_usd == pytest.approx(costs + night.lost_usd, abs=1e-9)


@pytest.mark.parametrize(
    ("after", "expected"),
    [(2, 250 * 80), (9, 250 * 40)],  # the clock is looked at once more when a stream ends
    ids=["while it thinks", "once it has thought"],
)
def test_a_cut_reply_is_charged_for_the_time_that_it_thought(after: int, expected: int) -> None:
    """Only a summary of the thoughts arrives, but all of them are paid for."""
    night, looks = Night(), itertools.count()
    cut = say(thinking("Hm."), text("Half of it."), cut=Cut(after, "fin"))
    ask(night, cut, GOOD, clock=lambda: 40.0 * next(looks))
    (lost,) = night.lost
    assert expected <= lost.usage.output_tokens < expected + 50


def test_a_cut_reply_is_charged_no_more_than_a_whole_one_could_cost() -> None:
    night, looks = Night(), itertools.count()
    cut = say(thinking("Hm."), cut=Cut(2, "fin"))
    ask(night, cut, GOOD, clock=lambda: 400.0 * next(looks), call_seconds=1e6)
    (lost,) = night.lost
    assert 32_000 == lost.usage.output_tokens
    assert lost.cost_usd is not None
    with claude("http://127.0.0.1:9") as model:
        worst_usd = model.worst_case(PROMPT).usd
    assert worst_usd is not None
    assert lost.cost_usd <= worst_usd


def test_a_time_without_a_thought_costs_nothing() -> None:
    night, looks = Night(), itertools.count()
    cut = say(text("Half of it."), cut=Cut(3, "fin"))
    ask(night, cut, GOOD, clock=lambda: 40.0 * next(looks))
    assert night.lost[0].usage.output_tokens < 50


def test_a_call_that_was_lost_and_paid_for_can_end_the_session() -> None:
    night = Night(usd=0.34)
    cut = say(text("half of it " * 200), cut=Cut(30, "reset"))
    server = MessagesServer([cut] * 99, endless=True)
    with (
        server,
        claude(server.url) as model,
        night.asks(model) as asks,
        pytest.raises(SessionOver) as over,
    ):
        asks()
    assert over.value.reason is StopReason.MONEY
    assert 0 < server.billed_usd <= night.lost_usd < 0.34


def test_no_call_costs_more_than_was_reserved() -> None:
    long = say(text("words and more words " * 400))
    with MessagesServer([long]) as server, claude(server.url) as model:
        reserved = model.worst_case(PROMPT).usd
        reply = reply_of(model)
    assert reserved is not None
    assert reply.cost_usd is not None
    assert 0 < reply.cost_usd < reserved


def test_a_model_without_a_price_has_no_cost_and_no_worst_case() -> None:
    assert not price_known(UNPRICED)
    assert price_known("claude-sonnet-5-5")
    with MessagesServer([GOOD]) as server, claude(server.url, model=UNPRICED) as model:
        assert model.worst_case(PROMPT).usd is None
        assert reply_of(model).cost_usd is None


def test_a_one_hour_write_costs_twice_the_input() -> None:
    usage = Usage(
        input_tokens=0, output_tokens=0, cache_read_tokens=0, cache_write_tokens=1_000_000
    )
    assert cost_usd("claude-sonnet-5-5", usage) == 4.0


@pytest.mark.parametrize("kind", ["stall", "pings"])
def test_ctrl_c_interrupts_a_call_closes_the_stream_and_charges_it(kind: Any) -> None:
    night = Night()
    server = MessagesServer([say(text("slow"), cut=Cut(3, kind))])
    with server:
        press_ctrl_c_when(server.waiting)
        with (
            claude(server.url) as model,
            night.asks(model) as asks,
            pytest.raises(KeyboardInterrupt),
        ):
            asks()
        assert server.abandoned.wait(2.0)
    assert len(night.lost) == 1
    assert server.billed_usd == pytest.approx(night.lost_usd)


def test_ctrl_c_interrupts_a_call_under_a_handler_of_the_callers_own() -> None:
    night = Night()
    server = MessagesServer([say(text("slow"), cut=Cut(3, "stall"))])
    with server, own_handler():
        press_ctrl_c_when(server.waiting)
        with (
            claude(server.url) as model,
            night.asks(model) as asks,
            pytest.raises(KeyboardInterrupt),
        ):
            asks()
        assert server.abandoned.wait(2.0)
    assert len(night.lost) == 1


@contextmanager
def own_handler() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press_ctrl_c_when(event: threading.Event) -> None:
    def press() -> None:
        if event.wait(10.0):
            time.sleep(0.2)  # until the event loop waits for what will not come
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def test_ctrl_c_interrupts_the_wait_between_two_calls() -> None:
    asked = threading.Event()
    night = Night(sleep=time.sleep)

    def answer(request: dict[str, Any]) -> Status:
        asked.set()
        return Status(429, "rate_limit_error", headers={"retry-after": "3000"})

    with MessagesServer([answer]) as server:
        press_ctrl_c_when(asked)
        with (
            claude(server.url) as model,
            night.asks(model) as asks,
            pytest.raises(KeyboardInterrupt),
        ):
            asks()


def test_the_services_words_reach_the_record_on_one_bounded_line() -> None:
    error = refusal_of(Night(), Status(400, message="\x1b[31mred\n" + "long " * 500))
    assert "\x1b" not in error.message
    assert "\n" not in error.message
    assert len(error.message) < ERROR_CHARACTERS + 100


def test_missing_credentials_are_named() -> None:
    sentence = check_credentials({"ANTHROPIC_API_KEY": ""})
    assert sentence is not None
    assert "ANTHROPIC_API_KEY" in sentence


@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_either_credential_is_enough(name: str) -> None:
    assert check_credentials({name: "something"}) is None


@pytest.mark.parametrize("kind", ["text/html", "text/event-stream"])
def test_no_part_of_a_key_is_in_an_answer_that_cannot_be_read(kind: str) -> None:
    """A page that repeats the headers; wherever its text is cut, half a key is a secret too."""
    key = "sk-ant-not-a-real-key-0123456789abcdef"
    pages = [f"{'x' * before} x-api-key: {key} {'y' * 400}" for before in range(90, 330, 3)]
    event = "event: message_start\ndata: {{{}\n\n"
    bodies = [page if kind == "text/html" else event.format(page) for page in pages]
    answers = [Raw(200, body.encode(), {"content-type": kind}) for body in bodies]
    with MessagesServer(answers) as server, claude(server.url, ANTHROPIC_API_KEY=key) as model:
        for _ in answers:
            with pytest.raises(CallFailed) as failed:
                reply_of(model)
            told = f"{failed.value.error} {failed.value.final}"
            assert "xxx" in told
            assert "sk-an" not in told


@pytest.mark.parametrize("value", ["sk-a b", "sk-ab\n", "sk-\u201cab\u201d", "sk-\x1b"])
@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_a_key_that_no_header_can_carry_is_named_and_not_shown(name: str, value: str) -> None:
    sentence = unusable_credentials({name: value})
    assert sentence is not None
    assert name in sentence
    assert "sk-" not in sentence
    assert unusable_credentials({name: "sk-ant-api03_x-Y"}) is None
    assert unusable_credentials({name: value}, provider="bedrock") is None


def test_a_token_is_sent_when_there_is_no_key() -> None:
    reply, _ = ask(Night(), GOOD, ANTHROPIC_API_KEY="", ANTHROPIC_AUTH_TOKEN="a-token")
    assert reply.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("claude-sonnet-5-5", True),
        ("claude-sonnet-5", True),
        ("claude-opus-4-6", True),
        ("claude-opus-4-5-20251101", False),
        ("claude-opus-4-20250514", False),
        ("claude-mythos-preview", False),
        ("some-other-model", False),
        ("us.anthropic.claude-opus-4-6-20260101-v1:0", True),
        ("claude-sonnet-5-5@20260901", True),
        ("my-claude-sonnet-5-5", False),
        ("openrouter/claude-sonnet-5-5:free", False),
    ],
)
def test_thinking_is_asked_of_models_that_know_it(model: str, expected: bool) -> None:
    assert thinks_adaptively(model) == expected


def test_thinking_can_be_switched_off_with_its_effort() -> None:
    _, server = ask(Night(), GOOD, thinking="off")
    assert not {"thinking", "output_config"} & server.requests[0].keys()


def test_a_price_of_ones_own_goes_before_any_list() -> None:
    reply, server = ask(Night(), GOOD, price_usd_per_million=[100.0, 1000.0])
    (bill,) = server.bills
    inputs = bill.input_tokens + bill.cache_read_tokens + bill.cache_write_tokens
    assert reply.cost_usd == pytest.approx((100 * inputs + 1000 * bill.output_tokens) / 1e6)
    usage = Usage(input_tokens=1, output_tokens=10, cache_read_tokens=100, cache_write_tokens=1000)
    assert cost_usd("mine", usage, own=[1.0, 2.0, 3.0, 4.0]) == pytest.approx(4321e-6)
    assert price_known("mine", own=[0.0, 0.0])


ODD_CATALOGUES: list[Any] = [None, [], 7, {}, {"id": None}, {"data": None}, {"data": [7]}]


@pytest.mark.parametrize("odd", ODD_CATALOGUES)
def test_a_catalogue_of_another_form_decides_nothing(odd: Any) -> None:
    catalogue = dict.fromkeys(CATALOGUE, odd)
    with MessagesServer([], catalogue=catalogue) as server, claude(server.url) as model:
        assert model.facts() is None
    openai = {"id": "some", "object": "model", "max_tokens": 5}
    with MessagesServer([], catalogue={"some": openai}) as server:
        for name in ("some", "unlisted"):
            with claude(server.url, model=name) as model:
                assert model.facts() is None


def test_thinking_is_summarised_so_that_the_record_has_reasons() -> None:
    _, server = ask(Night(), GOOD)
    assert server.requests[0]["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert server.requests[0]["output_config"] == {"effort": "high"}


NOW = datetime(2026, 11, 23, 1, 0, 0, tzinfo=UTC)


def test_retry_after_as_a_date_counts_from_now() -> None:
    headers = {"retry-after": "Mon, 23 Nov 2026 01:02:00 GMT"}
    assert retry_after_seconds(headers, NOW) == 120.0


@given(st.text(max_size=40))
def test_no_retry_after_is_negative_or_without_end(value: str) -> None:
    assert 0.0 <= retry_after_seconds({"retry-after": value}, NOW) < float("inf")


PLAIN_DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "x"},
}
CITATION = {
    "type": "char_location",
    "cited_text": "x",
    "document_index": 0,
    "document_title": None,
    "start_char_index": 0,
    "end_char_index": 1,
}
RULES_BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "temperature": lambda r: r.update(temperature=0.5),
    "unknown_key_in_a_result": lambda r: r["messages"].append(
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": "", "extra": 1}],
        }
    ),
    "no_messages": lambda r: r.update(messages=[]),
    "first_message_of_the_assistant": lambda r: r["messages"].insert(
        0, {"role": "assistant", "content": "Hello"}
    ),
    "prefill": lambda r: r["messages"].append({"role": "assistant", "content": "I will"}),
    "empty_text": lambda r: r["messages"].append({"role": "user", "content": " "}),
    "empty_content": lambda r: r["messages"].append({"role": "user", "content": []}),
    "forced_tool": lambda r: r.update(tool_choice={"type": "any"}),
    "thinking_by_budget": lambda r: r.update(thinking={"type": "enabled", "budget_tokens": 2000}),
    "bad_tool_name": lambda r: r["tools"].append({**TOOLS[0], "name": "a b"}),
    "tool_name_twice": lambda r: r["tools"].append(TOOLS[0]),
    "result_of_no_call": lambda r: r["messages"].append(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}
    ),
    "call_without_result": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**tool("run"), "id": "a"}]},
            {"role": "user", "content": "And?"},
        ]
    ),
    "text_before_results": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**tool("run"), "id": "a"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See:"},
                    {"type": "tool_result", "tool_use_id": "a", "content": "x"},
                ],
            },
        ]
    ),
    "too_many_breakpoints": lambda r: r["messages"].append(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
                for _ in range(5)
            ],
        }
    ),
    "short_lifetime_first": lambda r: r.update(
        system=[
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "5m"}},
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]
    ),
    "document_of_the_assistant": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [PLAIN_DOCUMENT]},
            {"role": "user", "content": "And?"},
        ]
    ),
    "citations_on_user_text": lambda r: r["messages"].append(
        {"role": "user", "content": [{"type": "text", "text": "x", "citations": [CITATION]}]}
    ),
    "call_of_the_user": lambda r: r["messages"].append(
        {"role": "user", "content": [{**tool("run"), "id": "a"}]}
    ),
    "odd_call_id": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**tool("run"), "id": "a b"}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a b", "content": "x"}],
            },
        ]
    ),
    "call_id_twice": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**tool("run"), "id": "a"}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}],
            },
        ]
        * 2
    ),
    "two_results_of_one_call": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**tool("run"), "id": "a"}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}] * 2,
            },
        ]
    ),
    "thinking_always_off": lambda r: r.update(thinking={"type": "disabled"}),
    "most_effort_between_tools": lambda r: r.update(
        thinking={"type": "between_tools"}, output_config={"effort": "max"}
    ),
    "choice_without_tools": lambda r: (r.pop("tools"), r.update(tool_choice={"type": "auto"})),
    "schema_that_is_none": lambda r: r["tools"].append(
        {"name": "x", "input_schema": {"type": "object", "properties": {"a": {"type": "number!"}}}}
    ),
    "empty_system": lambda r: r.update(system=[{"type": "text", "text": ""}]),
    "no_tokens_asked": lambda r: r.update(max_tokens=0),
    "too_many_tokens_asked": lambda r: r.update(max_tokens=200_000),
    "window_exceeded": lambda r: r["messages"].append({"role": "user", "content": "x" * 4_100_000}),
    "unsigned_thinking": lambda r: r["messages"].extend(
        [
            {"role": "assistant", "content": [{**thinking("mine"), "signature": "forged"}]},
            {"role": "user", "content": "And?"},
        ]
    ),
}


@pytest.mark.parametrize("broken", RULES_BROKEN.values(), ids=RULES_BROKEN.keys())
def test_the_test_server_refuses(broken: Callable[[dict[str, Any]], Any]) -> None:
    request = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 1000,
        "stream": True,
        "tools": copy.deepcopy(TOOLS),
        "messages": copy.deepcopy(OPENING),
    }
    assert first_problem(request) is None
    broken(request)
    problem = first_problem(request)
    assert problem is not None
    assert problem.code == 400


def post(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    """What the server answers to a request that no client of ours would make."""
    usual = {"x-api-key": "k", "anthropic-version": API_VERSION} | headers
    sent = {name.replace("_", "-"): value for name, value in usual.items() if value}
    answer = httpx2.post(url, content=body, headers=sent, timeout=20)
    return answer.status_code, answer.json()["error"]["type"]


def test_the_test_server_refuses_what_is_wrong_around_a_request() -> None:
    body = json.dumps(
        {"model": "claude-sonnet-5-5", "max_tokens": 1, "stream": True, "messages": OPENING}
    ).encode()
    with MessagesServer([], tolerant=True) as server:
        url = f"{server.url}/v1/messages"
        assert (401, "authentication_error") == post(url, body, **{"x-api-key": ""})
        assert (400, "invalid_request_error") == post(url, body, anthropic_version="2023-06-01")
        assert (404, "not_found_error") == post(f"{server.url}/v1/complete", body)
        assert (404, "not_found_error") == post(url, body.replace(b"sonnet", b"sonet"))
        assert (413, "request_too_large") == post(url, b" " * (MAX_BODY_BYTES + 1))
        assert 5 == len(server.unplanned)
        assert not server.requests


def test_the_test_server_notices_answers_nobody_asked_for() -> None:
    with pytest.raises(AssertionError, match="1 answers"), MessagesServer([GOOD]):
        pass


SHOWN = """train.py: 6 lines, sha 0
     1\tDEPTH = 4  # blocks {1, 2, 4, 6}
     2\tHEADS = 2  # fixed
     3\tLR = 0.02  # of Muon [0.01..0.08 log]
     4\tBASE = 10_000.0
     5\tROWS = 3
     6\tSHARE = 0.05"""


def tinkered(*verdicts: str) -> list[str]:
    """What the stand-in tries, each time at the same file."""
    opening: dict[str, Any] = {"messages": copy.deepcopy(OPENING)}
    assert ["text", "tool_use"] == [block["type"] for block in tinker(opening).blocks]
    messages: list[dict[str, Any]] = []
    tried = []
    for verdict in [*verdicts, ""]:
        shown = [{"type": "tool_result", "tool_use_id": "a", "content": SHOWN}]
        edit, run = tinker({"messages": [*messages, {"role": "user", "content": shown}]}).blocks[1:]
        assert "run" == run["name"]
        assert SHOWN.replace("\t", "\n").count(edit["input"]["old_string"]) == 1
        tried.append(run["input"]["hypothesis"])
        answer = json.dumps({"attempt": 1, "verdict": verdict}, separators=(",", ":"))
        told = [{"type": "tool_result", "tool_use_id": "b", "content": answer}]
        messages.append({"role": "user", "content": told})
    return tried


def test_the_stand_in_turns_knob_after_knob_down_then_up() -> None:
    assert [
        "DEPTH from 4 to 2",
        "DEPTH from 4 to 6",
        "LR from 0.02 to 0.014",
        "LR from 0.02 to 0.028",
        "ROWS from 3 to 1",
    ] == tinkered("discarded", "failed", "invalid", "discarded")


def test_the_stand_in_follows_what_was_kept() -> None:
    assert [
        "DEPTH from 4 to 2",
        "DEPTH from 4 to 2",
        "DEPTH from 4 to 2",
        "LR from 0.02 to 0.014",
    ] == tinkered("kept", "kept", "discarded")


@pytest.mark.parametrize(
    ("value", "said", "up", "expected"),
    [
        ("6", "  # {1, 2, 4, 6}", True, "6"),
        ("0", "  # {0, 8192}", True, "8192"),
        ("0.01", "  # [0.01..0.08 log]", False, "0.01"),
        ("0.07", "  # [0.01..0.08 log]", True, "0.08"),
        ("1.0", "", True, "1.4"),
        ("10.0", "", False, "7.0"),
        ("1", "", False, "1"),
    ],
)
def test_the_stand_in_stays_within_the_files_ranges(
    value: str, said: str, up: bool, expected: str
) -> None:
    assert expected == stepped(value, said, up=up)


def test_facts_of_a_model_bound_its_replies() -> None:
    with MessagesServer([]) as server, claude(server.url) as model:
        facts = model.facts()
    assert facts is not None
    assert (128_000, 1_000_000) == (facts["max_tokens"], facts["max_input_tokens"])


@pytest.mark.parametrize("address", ["server", "http://127.0.0.1:9"])
def test_a_server_that_knows_no_facts_is_no_obstacle(address: str) -> None:
    with MessagesServer([GOOD], catalogue=None, endless=True) as server:
        url = server.url if address == "server" else address
        with claude(url) as model:
            assert model.facts() is None
            if address == "server":
                reply_of(model)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nobody.invalid"])
def test_an_address_where_nobody_is_is_found_at_the_start(url: str) -> None:
    with claude(url) as model, pytest.raises(ModelError) as caught:
        model.facts(must_be_there=True)
    assert f"nobody answers at {url.split('/')[2].split(':')[0]}" in caught.value.message
    assert "ANTHROPIC_BASE_URL" in caught.value.hint


def test_a_service_that_is_overloaded_at_the_start_is_there() -> None:
    answers = MessagesServer([Status(529, "overloaded_error")], catalogue=None, endless=True)
    with answers as server, claude(server.url) as model:
        assert model.facts(must_be_there=True) is None


def refused_at_the_start(name: str, catalogue: dict[str, dict[str, Any]]) -> ModelError:
    server = MessagesServer([], catalogue=catalogue)
    with server, claude(server.url, model=name) as model:
        with pytest.raises(ModelError) as caught:
            model.facts()
        return caught.value


def test_a_model_that_the_service_does_not_have_is_refused_with_those_it_has() -> None:
    error = refused_at_the_start("claude-sonet-5-5", CATALOGUE)
    assert StopReason.API_REFUSED is error.reason
    assert "claude-sonet-5-5" in error.message
    assert "claude-sonnet-5-5" in error.hint


def test_a_retired_model_is_refused_and_no_retired_one_is_offered() -> None:
    gone = CATALOGUE["claude-opus-5-5"] | {"lifecycle": "retired"}
    error = refused_at_the_start("claude-opus-5-5", CATALOGUE | {"claude-opus-5-5": gone})
    assert "claude-opus-5-5 is retired" == error.message
    assert "claude-sonnet-5-5" in error.hint
    assert "claude-opus-5-5" not in error.hint


def test_a_key_that_the_service_does_not_know_is_found_at_the_start() -> None:
    with MessagesServer([], key="another") as server, claude(server.url) as model:
        with pytest.raises(ModelError, match="401 authentication_error") as caught:
            model.facts()
        assert "ANTHROPIC_API_KEY" in caught.value.hint


EVENING = datetime(2026, 11, 23, 21, 0, tzinfo=UTC)
LIFE: dict[str, tuple[dict[str, Any], str | None]] = {
    "active": ({"lifecycle": "active", "retires_at": None}, None),
    "tonight": (
        {"lifecycle": "deprecated", "retires_at": "2026-11-24T04:00:00Z"},
        "m retires at 2026-11-24 04:00 UTC, before this session has to end",
    ),
    "overdue": (
        {"lifecycle": "deprecated", "retires_at": "2026-11-01T00:00:00Z"},
        "m retires at 2026-11-01 00:00 UTC, before this session has to end",
    ),
    "next_week": (
        {"lifecycle": "deprecated", "retires_at": "2026-11-30T00:00:00Z"},
        "m is deprecated and retires on 2026-11-30: choose another model soon",
    ),
    "some_day": (
        {"lifecycle": "deprecated", "retires_at": None},
        "m is deprecated: choose another model soon",
    ),
    "after_tonight": ({"lifecycle": "active", "retires_at": "2026-12-24T00:00:00Z"}, None),
    "nothing_said": ({}, None),
    "no_date": ({"retires_at": "soon"}, None),
    "nonsense": ({"retires_at": 10**30, "lifecycle": ["deprecated"]}, None),
}


@pytest.mark.parametrize(("facts", "expected"), LIFE.values(), ids=LIFE.keys())
def test_a_person_hears_of_a_model_on_its_way_out(
    facts: dict[str, Any], expected: str | None
) -> None:
    assert expected == retirement({"id": "m", **facts}, EVENING + timedelta(hours=10))


def test_a_cloud_needs_a_region_no_key_and_has_a_price_list_of_its_own() -> None:
    assert "AWS_REGION" in str(check_credentials({}, provider="bedrock"))
    assert "CLOUD_ML_REGION" in str(check_credentials({}, provider="vertex"))
    assert price_known("anthropic.claude-sonnet-5-5", provider="bedrock")
    assert price_known("claude-sonnet-5-5", provider="vertex")
    assert not price_known("some-other-model", provider="bedrock")
