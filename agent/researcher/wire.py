"""The Messages API's form: requests out, streams in.

What a request holds depends on nothing but its prompt: the service's cache and its check of
replayed thinking both live on identical bytes.
"""

import re
from collections.abc import Callable
from typing import Any

from anthropic.lib.streaming import AsyncMessageStream

from agent.record.events import Usage
from agent.researcher.api_errors import StreamBroken
from agent.researcher.base import Prompt, ToolCall

RECEIVED_BYTES_PER_TOKEN = 4
"""Estimates what a cut stream had generated; English and code lie near it."""
THOUGHT_TOKENS_PER_SECOND = 250
"""Estimates what a cut stream had thought, of which only a summary arrives: no model of this
family writes faster."""
CACHE_CONTROL = {"type": "ephemeral", "ttl": "1h"}
"""A training outlives the five-minute cache."""


def thinks_adaptively(model: str) -> bool:
    """Whether the model takes adaptive thinking and an effort: 4.6 and later."""
    found = re.search(r"claude-[a-z]+-(\d+)(?:-(\d{1,2}))?(?!\d)", model)
    return found is not None and (int(found[1]), int(found[2] or 0)) >= (4, 6)


def request_of(prompt: Prompt, model: str, max_output_tokens: int, effort: str) -> dict[str, Any]:
    """What is sent for a prompt."""
    request: dict[str, Any] = {
        "model": model,
        "max_tokens": max_output_tokens,
        # Tools come before the system prompt in the cached prefix, so this covers both.
        "system": [{"type": "text", "text": prompt.system, "cache_control": CACHE_CONTROL}],
        "messages": _with_breakpoints(_without_blanks(prompt.messages)),
    }
    if prompt.tools:
        request["tools"] = prompt.tools
        request["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": False}
    if thinks_adaptively(model):
        # Unless asked for, the summary is omitted and the record has no reasons in it.
        request["thinking"] = {"type": "adaptive", "display": "summarized"}
        request["output_config"] = {"effort": effort}
    return request


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


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return {**message, "content": [*blocks[:-1], {**blocks[-1], "cache_control": CACHE_CONTROL}]}


def _without_blanks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without text that has no word: models write it, the API refuses to read it."""
    sent = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            blocks = [b for b in content if b["type"] != "text" or b["text"].strip()]
            message = {**message, "content": blocks}
        if message["content"]:
            sent.append(message)
    return sent


class Arrival:
    """What has come of one stream so far.

    Args:
        clock: monotonic seconds.
    """

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
        # Bedrock's header has another name than the one that the SDK looks for.
        self.request_id = stream.request_id or stream.response.headers.get("x-amzn-requestid")
        try:
            async for event in stream:
                self._take(event, stream)
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            # Bad JSON, half an event, events out of order: the SDK has no error of its own.
            raise StreamBroken(f"the stream could not be read ({type(error).__name__})") from error

    def message(self) -> Any:
        """The whole message.

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
        counted = usage_of(self._snapshot)
        if self._stopped:
            return counted
        received = -(-self._received_bytes // RECEIVED_BYTES_PER_TOKEN)
        thought = int(self._thought_seconds * THOUGHT_TOKENS_PER_SECOND)
        # What arrives of the thoughts is a part of them: only what it leaves out comes on top.
        left_out = max(0, thought - self._summary_bytes // RECEIVED_BYTES_PER_TOKEN)
        output_tokens = max(counted.output_tokens, min(most_tokens, received + left_out))
        return counted.model_copy(update={"output_tokens": output_tokens})

    def _take(self, event: Any, stream: AsyncMessageStream[None]) -> None:
        match event.type:
            case "message_start":
                self._snapshot = stream.current_message_snapshot
            case "content_block_start":
                self._stop_thinking()
                if event.content_block.type in ("thinking", "redacted_thinking"):
                    self._thinks_since = self._clock()
            case "content_block_delta":
                self._received_bytes += _delta_bytes(event.delta)
                self._summary_bytes += len((getattr(event.delta, "thinking", None) or "").encode())
            case "content_block_stop":
                self._stop_thinking()
            case "message_stop":
                self._stopped = True

    def _stop_thinking(self) -> None:
        if self._thinks_since is not None:
            self._thought_seconds += self._clock() - self._thinks_since
        self._thinks_since = None


def _delta_bytes(delta: Any) -> int:
    parts = (getattr(delta, name, None) for name in ("text", "thinking", "partial_json"))
    return sum(len(part.encode()) for part in parts if isinstance(part, str))


def tool_calls(content: list[dict[str, Any]]) -> list[ToolCall]:
    """The calls among a reply's blocks.

    Raises:
        StreamBroken: one takes something that is no object.
    """
    calls = [block for block in content if block["type"] == "tool_use"]
    if not all(isinstance(call.get("input"), dict) for call in calls):
        raise StreamBroken("a tool's input is not an object")
    return [ToolCall(call["id"], call["name"], call["input"]) for call in calls]


def require_names(content: list[dict[str, Any]]) -> None:
    """Refuse tool calls that nobody could answer, however the reply ended."""
    calls = [block for block in content if block["type"] == "tool_use"]
    names = [call.get(key) for call in calls for key in ("id", "name")]
    if not all(isinstance(name, str) and name for name in names):
        raise StreamBroken("a tool call has no id or no name")


def usage_of(message: Any) -> Usage:
    """The service's count; compatible servers leave fields out."""
    counted = message.usage
    return Usage(
        input_tokens=getattr(counted, "input_tokens", None) or 0,
        output_tokens=getattr(counted, "output_tokens", None) or 0,
        cache_read_tokens=getattr(counted, "cache_read_input_tokens", None) or 0,
        cache_write_tokens=getattr(counted, "cache_creation_input_tokens", None) or 0,
    )
