"""The Messages API's form: requests out, streams in.

What a request holds depends on nothing but its prompt: the service's cache and its check of
replayed thinking both live on identical bytes.
"""

import itertools
import json
import re
from collections.abc import Callable, Container, Iterable
from typing import Any

from anthropic import AsyncStream

from agent.record.events import Usage
from agent.researcher.api_errors import StreamBroken
from agent.researcher.arguments import INVALID_JSON
from agent.researcher.base import Prompt, ToolCall

RECEIVED_BYTES_PER_TOKEN = 4
"""Estimates what a cut stream had generated; English and code lie near it."""
THOUGHT_TOKENS_PER_SECOND = 250
"""Estimates what a cut stream had thought, of which only a summary arrives: no model of this
family writes faster."""
ESTIMATED_BYTES_PER_TOKEN = 3
"""Estimates a call that the service did not count: rather more tokens than fewer."""
INVALID_JSON_CHARACTERS = 2000
CUT_SHORT = frozenset({"max_tokens", "refusal", "model_context_window_exceeded"})
"""Ends of replies whose tool calls are not done: the last one may be half a call."""
CACHE_CONTROL = {"type": "ephemeral", "ttl": "1h"}
"""A training outlives the five-minute cache."""


MODEL_ID = re.compile(
    r"(?:[a-z]{2,6}\.)?(?:anthropic\.)?"  # of a cloud
    r"claude-[a-z]+-(\d+)(?:-(\d{1,2}))?(?:[-@]\d{8})?(?:-v\d+(?::\d+)?)?"
)
"""Of this family; a name of somebody's own that only holds such an id may be any model."""


def thinks_adaptively(model: str) -> bool:
    """Whether the model takes adaptive thinking and an effort: 4.6 and later."""
    found = MODEL_ID.fullmatch(model)
    return found is not None and (int(found[1]), int(found[2] or 0)) >= (4, 6)


def request_of(
    prompt: Prompt, model: str, max_output_tokens: int, effort: str | None
) -> dict[str, Any]:
    """What is sent for a prompt; no effort asks for no thinking."""
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
    if effort is not None and thinks_adaptively(model):
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
    """The messages without text that has no word, which models write and the API refuses to read.

    What is left of a neighbour with the same role is one message.
    """
    sent: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            blocks = [b for b in content if b["type"] != "text" or b["text"].strip()]
            message = {**message, "content": blocks}
        if not message["content"]:
            continue
        if sent and sent[-1]["role"] == message["role"]:  # which some servers' templates refuse
            message = {**message, "content": [*sent.pop()["content"], *message["content"]]}
        sent.append(message)
    return sent


class Arrival:
    """What has come of one stream so far.

    Read here and not by the SDK, which takes half a tool's input for a whole one.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.request_id: str | None = None
        self.model: str | None = None
        self.stop_details: dict[str, Any] | None = None
        self._clock = clock
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[Any, dict[str, Any]] = {}
        """Blocks that have not ended, by the number that the service gives them."""
        self._inputs: dict[int, str] = {}
        """What came of tools' inputs, by the identity of their blocks."""
        self._counts: dict[str, int] = {}
        self._stop_reason: str | None = None
        self._received_bytes = self._summary_bytes = 0
        self._thought_seconds = 0.0
        self._thinks_since: float | None = None
        self._begun = self._stopped = False

    async def read(self, stream: AsyncStream[Any]) -> None:
        """Take every event, or the whole message of a server that does not stream.

        Raises:
            StreamBroken: what came could not be understood.
        """
        headers = stream.response.headers
        # Bedrock's header has another name than the service's own.
        self.request_id = headers.get("request-id") or headers.get("x-amzn-requestid")
        told: Any = None
        try:
            if headers.get("content-type", "").startswith(("text/html", "application/json")):
                return self._take_body(await stream.response.aread())
            async for event in stream:
                told = event
                self._take(event.to_dict(warnings=False))
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            # Bad JSON, half an event, a number for a text: the SDK has no error of its own.
            seen = error.doc if isinstance(error, json.JSONDecodeError) else str(told)
            kind = type(error).__name__
            raise StreamBroken(f"the stream could not be read ({kind}): {seen}") from error

    def content(self, known: Iterable[str] = ()) -> list[dict[str, Any]]:
        """The blocks of the whole message, each tool call with an input, a name and an id.

        Args:
            known: ids of tool calls that the conversation holds already.

        Raises:
            StreamBroken: it is not whole.
        """
        self._require_whole()
        ids = set(known)
        blocks = []
        for block in self._blocks:
            if block["type"] == "tool_use":
                block = self._answerable(block, ids)
                ids.add(block["id"])
            blocks.append(_without_half_characters(block))
        return blocks

    @property
    def stop_reason(self) -> str:
        """Why the message ended; by what it holds where the service does not say."""
        calls = any(block["type"] == "tool_use" for block in self._blocks)
        return self._stop_reason or ("tool_use" if calls else "end_turn")

    def usage(self, sent_bytes: int) -> Usage:
        """The service's count of a whole message, or an estimate where it has none."""
        told = self._counted()
        if told.input_tokens + told.cache_read_tokens + told.cache_write_tokens > 0:
            if told.output_tokens or not self._received_bytes:
                return told
            output_tokens = -(-self._received_bytes // ESTIMATED_BYTES_PER_TOKEN)
            return told.model_copy(update={"output_tokens": output_tokens, "estimated": True})
        received = -(-self._received_bytes // ESTIMATED_BYTES_PER_TOKEN)
        sent = -(-sent_bytes // ESTIMATED_BYTES_PER_TOKEN)
        counts = {"input_tokens": sent, "output_tokens": max(told.output_tokens, received)}
        return told.model_copy(update={**counts, "estimated": True})

    def lost_usage(self, worst: Usage) -> Usage | None:
        """What a cut stream cost; None when the service had not begun to answer.

        Args:
            worst: what the whole call could have used.
        """
        if not self._begun:
            return None
        self._stop_thinking()
        counted = self._counted()
        if not counted.input_tokens + counted.cache_read_tokens + counted.cache_write_tokens:
            # Many servers count at the end: what they would have said is not known.
            written = {"cache_write_tokens": worst.cache_write_tokens}
            counted = counted.model_copy(update=written)
        if self._stopped:
            return counted
        received = -(-self._received_bytes // RECEIVED_BYTES_PER_TOKEN)
        thought = int(self._thought_seconds * THOUGHT_TOKENS_PER_SECOND)
        # What arrives of the thoughts is a part of them: only what it leaves out comes on top.
        left_out = max(0, thought - self._summary_bytes // RECEIVED_BYTES_PER_TOKEN)
        output_tokens = max(counted.output_tokens, min(worst.output_tokens, received + left_out))
        return counted.model_copy(update={"output_tokens": output_tokens})

    def _require_whole(self) -> None:
        # A clean early end raises nothing and leaves tool inputs that look complete.
        if not self._begun:
            raise StreamBroken("the stream ended, and nothing in it was a message")
        if not self._stopped and (self._stop_reason is None or self._open):
            raise StreamBroken("the stream ended before its reply did")

    def _take_body(self, body: bytes) -> None:
        """Take a message that came as a whole."""
        try:
            message = json.loads(body)
            is_message = message["type"] == "message" and isinstance(message["content"], list)
        except (ValueError, LookupError, TypeError):
            is_message = False
        if not is_message:
            text = body.decode(errors="replace").strip()
            raise StreamBroken(f"it answers with no message: {text or 'nothing at all'}")
        self._take({"type": "message_start", "message": {**message, "usage": None}})
        for index, block in enumerate(message["content"]):
            self._take({"type": "content_block_start", "index": index, "content_block": block})
            self._received_bytes += len(json.dumps(block))
        self._take({"type": "message_delta", "delta": message, "usage": message.get("usage")})
        self._take({"type": "message_stop"})

    def _take(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "message_start":
                self._begun, self.model = True, event["message"].get("model")
                self._count(event["message"].get("usage"))
            case "content_block_start":
                self._begin_block(event.get("index"), event["content_block"])
            case "content_block_delta":
                self._add(self._open[event.get("index")], event["delta"])
            case "content_block_stop":
                self._stop_thinking()
                self._open.pop(event.get("index"), None)
            case "message_delta":
                self._stop_reason = event["delta"].get("stop_reason") or self._stop_reason
                self.stop_details = event["delta"].get("stop_details")
                self._count(event.get("usage"))
            case "message_stop":
                self._stopped = True

    def _begin_block(self, index: Any, block: dict[str, Any]) -> None:
        if not isinstance(block.get("type"), str):
            raise TypeError("a block without a type")
        self._stop_thinking()
        self._open[index] = dict(block)
        self._blocks.append(self._open[index])
        if block["type"] in ("thinking", "redacted_thinking"):
            self._thinks_since = self._clock()

    def _add(self, block: dict[str, Any], delta: dict[str, Any]) -> None:
        match delta["type"]:
            case "text_delta" if block["type"] == "text":
                block["text"] = (block.get("text") or "") + delta["text"]
            case "thinking_delta" if block["type"] == "thinking":
                block["thinking"] = (block.get("thinking") or "") + delta["thinking"]
                self._summary_bytes += _size(delta["thinking"])
            case "signature_delta" if block["type"] == "thinking":
                block["signature"] = delta["signature"]
            case "citations_delta" if block["type"] == "text":
                block["citations"] = [*(block.get("citations") or []), delta["citation"]]
            case "input_json_delta":
                text = self._inputs.get(id(block), "") + delta["partial_json"]
                self._inputs[id(block)] = text
        parts = (delta.get(name) for name in ("text", "thinking", "partial_json"))
        self._received_bytes += sum(_size(part) for part in parts if isinstance(part, str))

    def _answerable(self, block: dict[str, Any], ids: Container[str]) -> dict[str, Any]:
        """A tool call that can be done or answered: servers repeat ids, or leave them out."""
        told, name = block.get("id"), block.get("name")
        wanted = told if isinstance(told, str) and told else "call"
        places = itertools.count(2)
        unique = wanted
        while unique in ids:
            unique = f"{wanted}-{next(places)}"
        text = self._inputs.get(id(block), "")
        given = block.get("input")
        if text.strip():
            given = _parsed(text)
        elif given in (None, ""):
            given = {}
        if not isinstance(given, dict):
            given = {INVALID_JSON: (text or str(given))[:INVALID_JSON_CHARACTERS]}
        name = name if isinstance(name, str) and name else "unnamed"
        return {**block, "id": unique, "name": name, "input": given}

    def _count(self, told: Any) -> None:
        """Take counts; the last total holds, and what a server leaves out says nothing."""
        for name, value in (told if isinstance(told, dict) else {}).items():
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                before = 0 if name == "output_tokens" else self._counts.get(name, 0)
                self._counts[name] = value or before

    def _counted(self) -> Usage:
        return Usage(
            input_tokens=self._counts.get("input_tokens", 0),
            output_tokens=self._counts.get("output_tokens", 0),
            cache_read_tokens=self._counts.get("cache_read_input_tokens", 0),
            cache_write_tokens=self._counts.get("cache_creation_input_tokens", 0),
        )

    def _stop_thinking(self) -> None:
        if self._thinks_since is not None:
            self._thought_seconds += self._clock() - self._thinks_since
        self._thinks_since = None


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _parsed(text: str) -> Any:
    """What a tool's input says; None where it is not one JSON value of finite numbers."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return {} if value is None else value


def _without_half_characters(value: Any) -> Any:
    """The value with halves of characters put together, or replaced where one is missing."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        plain = _without_half_characters
        return {plain(key): plain(item) for key, item in value.items()}
    return [_without_half_characters(one) for one in value] if isinstance(value, list) else value


def tool_calls(content: list[dict[str, Any]], stop_reason: str) -> list[ToolCall]:
    """The calls of a whole reply, whatever it says it ended with; none of one that was cut."""
    if stop_reason in CUT_SHORT:
        return []
    calls = [block for block in content if block["type"] == "tool_use"]
    return [ToolCall(call["id"], call["name"], call["input"]) for call in calls]


def tool_ids(messages: list[dict[str, Any]]) -> set[str]:
    """Ids of the tool calls of a conversation."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return {block["id"] for content in replies for block in content if block["type"] == "tool_use"}
