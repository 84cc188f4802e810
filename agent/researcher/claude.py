"""The Messages API: one reply, waited for and priced.

With `api_errors` the only module that knows the SDK. An attempt is a stream that was opened and
read to its end with a stop reason; everything less is repeated until the session's deadline, never
past it. What a prompt contains must not depend on anything but the call's arguments: the service's
cache and its check of replayed thinking both live on identical bytes.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import httpx2
from anthropic import (
    APIConnectionError,
    APIError,
    AsyncAnthropic,
    AsyncAnthropicBedrock,
    AsyncAnthropicVertex,
    AuthenticationError,
    NotFoundError,
)
from anthropic.lib.streaming import AsyncMessageStream
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from agent.record.events import Reserve, StopReason, Usage
from agent.researcher.api_errors import (
    ERROR_CHARACTERS,
    CredentialsFailed,
    StreamBroken,
    credential_errors,
    credentials_failed,
    describe,
    final_error,
    is_transient,
    unreachable,
    wait_seconds,
)
from agent.researcher.base import (
    WITHOUT_A_KEY,
    LostCall,
    ModelError,
    Provider,
    Reply,
    ToolCall,
    cost_usd,
)
from agent.text import one_line

CONNECT_SECONDS = 5.0
READ_SECONDS = 120.0
"""Silence after which a stream counts as stalled."""
FACTS_TIMEOUT = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
NOBODY_THERE = (httpx2.ConnectError, httpx2.UnsupportedProtocol)
"""Errors of an address where no service is: no such name, or a port that refuses."""
ATTEMPT_SECONDS = 1800.0
"""Longest call: a stream that only pings is never silent, and never ends."""
OFFERED_MODELS = 20
RECEIVED_BYTES_PER_TOKEN = 4
"""Estimates what a cut stream had generated; English and code lie near it."""
THOUGHT_TOKENS_PER_SECOND = 250
"""Estimates what a cut stream had thought, of which only a summary arrives: no model of this
family writes faster."""
RESERVED_BYTES_PER_TOKEN = 2
"""Estimates a request from above: real text has more bytes per token than this."""
CACHE_CONTROL = {"type": "ephemeral", "ttl": "1h"}
"""A training outlives the five-minute cache."""


def thinks_adaptively(model: str) -> bool:
    """Whether the model takes adaptive thinking and an effort: 4.6 and later."""
    found = re.search(r"claude-[a-z]+-(\d+)(?:-(\d{1,2}))?(?!\d)", model)
    return found is not None and (int(found[1]), int(found[2] or 0)) >= (4, 6)


class ClaudeModel:
    """A model behind the Messages API or a compatible server.

    Args:
        model: its id.
        max_output_tokens: most tokens of one reply, thinking included.
        effort: how much the model thinks, for models that can be told.
        api_key: goes into `x-api-key`.
        auth_token: goes into `Authorization`, when there is no key.
        base_url: of a compatible server; None for the SDK's own choice.
        provider: whose service it is; a cloud finds its own credentials.
        deadline: seconds that are left of the session.
        on_retry: told what failed and for how many seconds it is waited now.
        on_lost: told of every paid stream without a reply; may raise to stop.
        sleep: waits that many seconds.
        clock: monotonic seconds.
        read_seconds: silence after which a stream counts as stalled.
        attempt_seconds: longest single call.
    """

    def __init__(
        self,
        *,
        model: str,
        max_output_tokens: int,
        effort: str,
        api_key: str | None,
        auth_token: str | None,
        base_url: str | None,
        deadline: Callable[[], float],
        on_retry: Callable[[str, float], None],
        on_lost: Callable[[LostCall], None],
        provider: Provider = "anthropic",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        read_seconds: float = READ_SECONDS,
        attempt_seconds: float = ATTEMPT_SECONDS,
    ) -> None:
        self._model = model
        self._max_output_tokens = max_output_tokens
        self._effort = effort
        self._deadline = deadline
        self._on_retry = on_retry
        self._on_lost = on_lost
        self._sleep = sleep
        self._clock = clock
        self._attempt_seconds = attempt_seconds
        self._provider = provider
        self._runner = asyncio.Runner()
        self._closed = False
        self._tells_of_models = False
        self._last_message_id: str | None = None
        try:
            self._client = _client(provider, api_key, auth_token, base_url, read_seconds)
        except ValueError as error:  # a cloud's client that finds no region or project
            said = one_line(str(error), ERROR_CHARACTERS)
            raise ModelError(StopReason.API_REFUSED, said, WITHOUT_A_KEY) from error

    @property
    def name(self) -> str:
        """The model's id."""
        return self._model

    def reply(
        self, system: str, tools: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> Reply:
        """Answer the conversation, waiting out what passes by itself.

        Raises:
            ModelError: the service refused for good, or the deadline came first.
            KeyboardInterrupt: at once on Ctrl-C; the stream is closed and the model with it.
        """
        request = self._request(system, tools, messages)
        try:
            # Without a context of its own, every call would belong to the first one's span.
            return self._runner.run(self._ask(request), context=contextvars.copy_context())
        except (APIError, httpx2.HTTPError, StreamBroken, CredentialsFailed) as error:
            raise final_error(error, self._provider) from error
        except (KeyboardInterrupt, SystemExit):
            # A handler of our caller's own may have left the call half done in the loop.
            self.close()
            raise

    def worst_case(
        self, system: str, tools: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> Reserve:
        """The most that one call can use: nothing cached, all written, the longest answer."""
        return self._reserve(self._request(system, tools, messages))

    def facts(self, *, must_be_there: bool = False) -> dict[str, Any] | None:
        """What the service says of the model, such as its limits and when it retires.

        None where the service does not answer that question: compatible servers need not, and a
        session does not depend on it.

        Args:
            must_be_there: whether a service that cannot be reached at all is an error.

        Raises:
            ModelError: the service has no such model, or no longer, does not know the key, or is
                not there.
        """
        if self._closed or not isinstance(self._client, AsyncAnthropic):
            return None
        try:
            facts, offered = self._runner.run(_ask_facts(self._client, self._model))
        except AuthenticationError as error:
            raise final_error(error, self._provider) from error
        except APIConnectionError as error:
            if must_be_there and isinstance(error.__cause__, NOBODY_THERE):
                raise unreachable(error, self._client.base_url.host, self._provider) from error
            return None
        except (APIError, httpx2.HTTPError, ValueError):
            return None
        if facts is None and (not offered or self._model in offered):
            return None
        if facts is None or facts.get("lifecycle") == "retired":
            raise _unavailable(self._model, offered, retired=facts is not None)
        if isinstance(most := facts.get("max_tokens"), int) and most > 0:
            self._max_output_tokens = min(self._max_output_tokens, most)
        self._tells_of_models = "lifecycle" in facts
        return facts

    def close(self) -> None:
        """Close connections and the event loop."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(
        self, system: str, tools: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self._model,
            "max_tokens": self._max_output_tokens,
            # Tools come before the system prompt in the cached prefix, so this covers both.
            "system": [{"type": "text", "text": system, "cache_control": CACHE_CONTROL}],
            "messages": _with_breakpoints(_without_blanks(messages)),
        }
        if tools:
            request["tools"] = tools
            request["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": False}
        if thinks_adaptively(self._model):
            # Unless asked for, the summary is omitted and the record has no reasons in it.
            request["thinking"] = {"type": "adaptive", "display": "summarized"}
            request["output_config"] = {"effort": self._effort}
        if self._tells_of_models:
            # Only the service itself: a compatible server may refuse what it does not know.
            previous = self._last_message_id if len(messages) > 1 else None
            request["diagnostics"] = {"previous_message_id": previous}
        return request

    def _reserve(self, request: dict[str, Any]) -> Reserve:
        size_bytes = len(json.dumps(request, ensure_ascii=False).encode())
        worst = Usage(
            input_tokens=0,
            output_tokens=self._max_output_tokens,
            cache_read_tokens=0,
            cache_write_tokens=-(-size_bytes // RESERVED_BYTES_PER_TOKEN),
        )
        tokens = worst.output_tokens + worst.cache_write_tokens
        return Reserve(calls=1, tokens=tokens, usd=self._cost_usd(worst), usage=worst)

    def _cost_usd(self, usage: Usage, model: str | None = None) -> float | None:
        """What `usage` costs with the model that answered, or with the one that was asked."""
        priced = None if model is None else cost_usd(model, usage, provider=self._provider)
        return cost_usd(self._model, usage, provider=self._provider) if priced is None else priced

    async def _ask(self, request: dict[str, Any]) -> Reply:
        retrying = AsyncRetrying(
            sleep=self._sleep,
            retry=retry_if_exception(is_transient),
            wait=wait_seconds,
            stop=lambda state: state.upcoming_sleep >= self._deadline(),
            before_sleep=self._report,
            reraise=True,
        )
        return await retrying(self._attempt, request)

    def _report(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        self._on_retry(describe(state.outcome.exception()), state.upcoming_sleep)

    async def _attempt(self, request: dict[str, Any]) -> Reply:
        arrival = _Arrival(self._clock)
        started, seconds_left = self._clock(), self._deadline()
        try:
            async with (
                asyncio.timeout(max(0.0, min(self._attempt_seconds, seconds_left))),
                self._client.messages.stream(**request) as stream,
            ):
                await arrival.read(stream)
            return self._whole(arrival, self._clock() - started)
        except BaseException as error:
            self._charge(arrival, describe(error), self._clock() - started, request)
            if isinstance(error, TimeoutError):
                raise self._timed_out(seconds_left) from error
            if isinstance(error, credential_errors(self._provider)):
                raise credentials_failed(error) from error
            raise

    def _timed_out(self, seconds_left: float) -> Exception:
        if seconds_left > self._attempt_seconds:
            return StreamBroken(f"the reply did not end in {self._attempt_seconds:.0f} s")
        return ModelError(StopReason.HOURS, "the session's time ended during a model call", "")

    def _whole(self, arrival: _Arrival, seconds: float) -> Reply:
        message = arrival.whole_message()
        usage = _usage(message.usage)
        content = [block.to_dict() for block in message.content]
        _require_names(content)
        details = message.stop_details
        self._last_message_id = message.id
        return Reply(
            content=content,
            tool_calls=_tool_calls(content) if message.stop_reason == "tool_use" else [],
            stop_reason=str(message.stop_reason),
            model=message.model or self._model,
            usage=usage,
            cost_usd=self._cost_usd(usage, message.model),
            request_id=arrival.request_id,
            seconds=seconds,
            explanation="" if details is None else _explained(details),
            cache_diagnosis=_diagnosis(message),
        )

    def _charge(
        self, arrival: _Arrival, error: str, seconds: float, request: dict[str, Any]
    ) -> None:
        usage = arrival.lost_usage(self._max_output_tokens)
        if usage is None:
            return
        self._on_lost(
            LostCall(
                error,
                self._model,
                arrival.request_id,
                usage,
                self._cost_usd(usage),
                seconds,
                asking_again=self._reserve(request),
            )
        )


def _client(
    provider: Provider,
    api_key: str | None,
    auth_token: str | None,
    base_url: str | None,
    read_seconds: float,
) -> AsyncAnthropic | AsyncAnthropicBedrock | AsyncAnthropicVertex:
    timeout = httpx2.Timeout(read_seconds, connect=CONNECT_SECONDS)
    # No retries of the SDK's own: it obeys `retry-after` without a limit, and never repeats a
    # stream that was cut.
    if provider == "bedrock":
        return AsyncAnthropicBedrock(base_url=base_url, max_retries=0, timeout=timeout)
    if provider == "vertex":
        return AsyncAnthropicVertex(base_url=base_url, max_retries=0, timeout=timeout)
    return AsyncAnthropic(
        api_key=api_key,
        # Both at once are an error; the key wins, as in the SDK.
        auth_token=None if api_key else auth_token,
        base_url=base_url,
        max_retries=0,
        timeout=timeout,
    )


async def _ask_facts(client: AsyncAnthropic, model: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What the service says of a model, and what it offers instead if that one is not there."""
    try:
        found = await client.models.retrieve(model, timeout=FACTS_TIMEOUT)
    except NotFoundError:
        return None, await _offered(client)
    facts: dict[str, Any] = json.loads(found.to_json())
    return facts, await _offered(client) if facts.get("lifecycle") == "retired" else []


async def _offered(client: AsyncAnthropic) -> list[str]:
    """Models that the service offers; none where it has no such list."""
    try:
        page = await client.models.list(limit=1000, timeout=FACTS_TIMEOUT)
    except NotFoundError:
        return []
    return [one_line(str(one.id), 60) for one in page.data if one.lifecycle != "retired"]


def _unavailable(model: str, offered: list[str], *, retired: bool) -> ModelError:
    what = f"{model} is retired" if retired else f"the model's service knows no {model}"
    names = f"It offers {', '.join(offered[:OFFERED_MODELS])}. " if offered else ""
    hint = f"{names}Change the model in program.md and start a new session. {WITHOUT_A_KEY}"
    return ModelError(StopReason.API_REFUSED, one_line(what, ERROR_CHARACTERS), hint)


class _Arrival:
    """What has come of one stream so far."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.request_id: str | None = None
        self._clock = clock
        self._snapshot: Any = None
        self._received_bytes = self._summary_bytes = 0
        self._thought_seconds = 0.0
        self._thinks_since: float | None = None
        self._stopped = False

    async def read(self, stream: AsyncMessageStream[None]) -> None:
        """Take every event.

        Raises:
            StreamBroken: an event could not be understood.
        """
        self.request_id = stream.request_id or stream.response.headers.get("x-amzn-requestid")
        try:
            async for event in stream:
                self._take(event, stream)
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            # Bad JSON, half an event, events out of order: the SDK has no error of its own.
            raise StreamBroken(f"the stream could not be read ({type(error).__name__})") from error

    def whole_message(self) -> Any:
        """The message.

        Raises:
            StreamBroken: it is not whole.
        """
        if not self._stopped or self._snapshot.stop_reason is None:
            # A clean early end raises nothing and leaves tool inputs that look complete.
            raise StreamBroken("the stream ended before its reply did")
        return self._snapshot

    def lost_usage(self, most_tokens: int) -> Usage | None:
        """What a cut stream cost; None when the service had not begun to answer.

        Args:
            most_tokens: what the whole reply could have had.
        """
        if self._snapshot is None:
            return None
        self._stop_thinking()
        counted = _usage(self._snapshot.usage)
        if self._stopped:
            return counted
        received = -(-self._received_bytes // RECEIVED_BYTES_PER_TOKEN)
        thought = int(self._thought_seconds * THOUGHT_TOKENS_PER_SECOND)
        # What arrives of the thoughts is a part of them: only what it leaves out comes on top.
        left_out = max(0, thought - self._summary_bytes // RECEIVED_BYTES_PER_TOKEN)
        output_tokens = max(counted.output_tokens, min(most_tokens, received + left_out))
        return counted.model_copy(update={"output_tokens": output_tokens})

    def _take(self, event: Any, stream: AsyncMessageStream[None]) -> None:
        if event.type == "message_start":
            self._snapshot = stream.current_message_snapshot
        elif event.type == "content_block_start":
            self._stop_thinking()
            if event.content_block.type in ("thinking", "redacted_thinking"):
                self._thinks_since = self._clock()
        elif event.type == "content_block_delta":
            self._received_bytes += _delta_bytes(event.delta)
            self._summary_bytes += len((getattr(event.delta, "thinking", None) or "").encode())
        elif event.type == "content_block_stop":
            self._stop_thinking()
        elif event.type == "message_stop":
            self._stopped = True

    def _stop_thinking(self) -> None:
        if self._thinks_since is not None:
            self._thought_seconds += self._clock() - self._thinks_since
        self._thinks_since = None


def _with_breakpoints(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the cache told where to end; the caller's own stays untouched.

    The last message is what the next call will read. The user message before it is what the
    call before wrote: marking it too finds it however many blocks lie between.
    """
    marked = list(messages)
    user_messages = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for index in user_messages[-2:]:
        marked[index] = _marked(messages[index])
    return marked


def _without_blanks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without text that has no word: models write it, the API refuses to read it."""
    sent = []
    for message in messages:
        if message["role"] == "assistant":
            blocks = [block for block in message["content"] if not _is_blank(block)]
            message = {**message, "content": blocks}
        if message["content"]:
            sent.append(message)
    return sent


def _is_blank(block: dict[str, Any]) -> bool:
    return block["type"] == "text" and not block["text"].strip()


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return {**message, "content": [*blocks[:-1], {**blocks[-1], "cache_control": CACHE_CONTROL}]}


def _tool_calls(content: list[dict[str, Any]]) -> list[ToolCall]:
    calls = [block for block in content if block["type"] == "tool_use"]
    if not all(isinstance(call.get("input"), dict) for call in calls):
        raise StreamBroken("a tool's input is not an object")
    return [ToolCall(call["id"], call["name"], call["input"]) for call in calls]


def _require_names(content: list[dict[str, Any]]) -> None:
    """Refuse tool calls that nobody could answer, however the reply ended."""
    calls = [block for block in content if block["type"] == "tool_use"]
    names = [call.get(key) for call in calls for key in ("id", "name")]
    if not all(isinstance(name, str) and name for name in names):
        raise StreamBroken("a tool call has no id or no name")


def _usage(counted: Any) -> Usage:
    """The service's count; compatible servers leave fields out."""
    return Usage(
        input_tokens=getattr(counted, "input_tokens", None) or 0,
        output_tokens=getattr(counted, "output_tokens", None) or 0,
        cache_read_tokens=getattr(counted, "cache_read_input_tokens", None) or 0,
        cache_write_tokens=getattr(counted, "cache_creation_input_tokens", None) or 0,
    )


def _explained(details: Any) -> str:
    return one_line(json.dumps(details.to_dict(), ensure_ascii=False), ERROR_CHARACTERS)


def _diagnosis(message: Any) -> str:
    """What the service says of a cache that it could not use; empty when it says nothing."""
    reason = getattr(getattr(message, "diagnostics", None), "cache_miss_reason", None)
    if reason is None:
        return ""
    missed = getattr(reason, "cache_missed_input_tokens", None)
    return one_line(f"{reason.type}" + (f", {missed} tokens" if missed else ""), 100)


def _delta_bytes(delta: Any) -> int:
    parts = (getattr(delta, name, None) for name in ("text", "thinking", "partial_json"))
    return sum(len(part.encode()) for part in parts if isinstance(part, str))
