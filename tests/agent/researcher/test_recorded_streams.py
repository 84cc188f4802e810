"""Streams that the service once sent, as the SDK's own sources ship them.

They are fetched once with pip, at the version that is installed, and kept in pytest's cache: none
of their bytes is ours. What a reply must hold is read from the bytes by a parser of our own.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from agent.researcher.base import Reply
from agent.researcher.wire import CUT_SHORT
from tests.support.claude_calls import Night, ask, claude, reply_of
from tests.support.facilities import missing
from tests.support.messages_server import MessagesServer, Recorded, Status

STREAMS = "tests/lib/streaming/fixtures/"
REFUSALS = "tests/fixtures/fable-fallback/"
CASSETTES = "__inline_snapshot__/"
MADE_BY_HAND = ("tool_use_invalid_json_response", "unknown_events_response")
"""What no service sends; see the tests about them."""
KNOWN_STREAMS = 18
KNOWN_CASSETTES = 6
FETCH_SECONDS = 120


@dataclass
class Told:
    """What a stream says, read without the SDK."""

    text: str = ""
    thinking: str = ""
    inputs: dict[int, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    stop_reason: str | None = None

    @classmethod
    def by(cls, body: bytes) -> Told:
        told = cls()
        for event in events(body):
            told.take(event)
        return told

    def take(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "message_start":
                self.usage |= event["message"]["usage"]
            case "content_block_start":
                self.kinds.append(event["content_block"]["type"])
            case "content_block_delta":
                self.take_delta(event["index"], event["delta"])
            case "message_delta":
                self.usage |= event["usage"]
                self.stop_reason = event["delta"]["stop_reason"]

    def take_delta(self, index: int, delta: dict[str, Any]) -> None:
        self.text += delta.get("text", "")
        self.thinking += delta.get("thinking", "")
        if "partial_json" in delta:
            self.inputs[index] = self.inputs.get(index, "") + delta["partial_json"]


def events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.decode().splitlines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="session")
def sources(pytestconfig: pytest.Config) -> dict[str, bytes]:
    """The SDK's recordings by path."""
    release = version("anthropic")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"anthropic-{release}-sources")
    if not list(folder.glob("*.tar.gz")):
        fetch(pytestconfig, release, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        return {
            member.name.partition("/")[2]: read(archive, member)
            for member in archive
            if member.isfile() and any(p in member.name for p in (STREAMS, REFUSALS, CASSETTES))
        }


def fetch(config: pytest.Config, release: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "anthropic", "--dest", str(folder), f"anthropic=={release}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        missing(config, "recordings", f"pip did not fetch the SDK's sources in {FETCH_SECONDS} s")
        raise
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        missing(config, "recordings", f"pip cannot fetch the SDK's sources: {said[:200]}")


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return (file or io.BytesIO()).read()


@pytest.fixture(scope="session")
def streams(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Every recorded stream by its name."""
    found = {
        Path(path).stem: ended(body)
        for path, body in sources.items()
        if path.startswith((STREAMS, REFUSALS)) and path.endswith((".txt", ".sse"))
    }
    for path, exchanges in cassettes(sources).items():
        for number, exchange in enumerate(exchanges):
            if is_stream(exchange):
                found[f"{Path(path).stem[:8]}-{number}"] = body_of(exchange)
    return found


def ended(body: bytes) -> bytes:
    """The stream with the blank line after its last event, which editors take from files."""
    return body.rstrip(b"\n") + b"\n\n"


def cassettes(sources: dict[str, bytes]) -> dict[str, list[dict[str, Any]]]:
    """Recorded exchanges with the service, by file."""
    files = {p: b for p, b in sources.items() if CASSETTES in p and p.endswith(".json")}
    return {path: [one["response"] for one in json.loads(body)] for path, body in files.items()}


def is_stream(response: dict[str, Any]) -> bool:
    return isinstance(response["body"], str) and "event: message_start" in response["body"]


def body_of(response: dict[str, Any]) -> bytes:
    body = response["body"]
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def whole(streams: dict[str, bytes]) -> dict[str, bytes]:
    return {name: body for name, body in streams.items() if name not in MADE_BY_HAND}


def text_of(reply: Reply, kind: str) -> str:
    return "".join(block[kind] for block in reply.content if block["type"] == kind)


def test_the_recordings_are_the_ones_that_were_looked_at(streams: dict[str, bytes]) -> None:
    assert set(MADE_BY_HAND) < streams.keys()
    assert len(streams) >= KNOWN_STREAMS + KNOWN_CASSETTES


@pytest.fixture(scope="session")
def replies(streams: dict[str, bytes]) -> dict[str, Reply]:
    """What the model makes of every stream that is whole, asked once for each."""
    script = [Recorded(body) for body in whole(streams).values()]
    with MessagesServer(script) as server, claude(server.url) as model:
        return {name: reply_of(model) for name in whole(streams)}


def test_every_recorded_stream_becomes_the_reply_that_its_bytes_tell(
    streams: dict[str, bytes], replies: dict[str, Reply]
) -> None:
    for name, reply in replies.items():
        told = Told.by(streams[name])
        assert (name, told.text) == (name, text_of(reply, "text"))
        assert (name, told.thinking) == (name, text_of(reply, "thinking"))
        assert (name, told.kinds) == (name, [block["type"] for block in reply.content])
        assert (name, told.stop_reason) == (name, reply.stop_reason)
        assert (name, told.usage["input_tokens"]) == (name, reply.usage.input_tokens)
        assert (name, told.usage["output_tokens"]) == (name, reply.usage.output_tokens)
        read_tokens = told.usage.get("cache_read_input_tokens", 0)
        assert (name, read_tokens) == (name, reply.usage.cache_read_tokens)


def test_tools_run_unless_the_recorded_reply_was_cut(
    streams: dict[str, bytes], replies: dict[str, Reply]
) -> None:
    calls = {}
    for name, reply in replies.items():
        told = Told.by(streams[name])
        asked = [told.inputs[i] for i, k in enumerate(told.kinds) if k == "tool_use"]
        if told.stop_reason not in CUT_SHORT:
            calls[name] = [call.input for call in reply.tool_calls]
            assert (name, [*map(json.loads, asked)]) == (name, calls[name])
        else:
            assert (name, []) == (name, reply.tool_calls)
    assert {"location": "Paris"} in calls["tool_use_response"]


def test_a_recorded_input_that_was_cut_by_max_tokens_runs_nothing(
    streams: dict[str, bytes],
) -> None:
    reply, _ = ask(Night(), Recorded(streams["incomplete_partial_json_response"]))

    assert ("max_tokens", []) == (reply.stop_reason, reply.tool_calls)


def test_recorded_refusals_tell_their_category(streams: dict[str, bytes]) -> None:
    reply, _ = ask(Night(), Recorded(streams["refusal_response"]))

    assert "refusal" == reply.stop_reason
    assert "cyber" in reply.explanation


def test_no_recorded_stream_cut_short_is_a_reply(streams: dict[str, bytes]) -> None:
    good = streams["basic_response"]
    cuts = [cut for body in whole(streams).values() for cut in beginnings(body)]
    assert len(cuts) > 100
    night = Night()
    script = [Recorded(body) for cut in cuts for body in (cut, good)]
    with MessagesServer(script) as server, claude(server.url) as model, night.asks(model) as asks:
        for number, cut in enumerate(cuts, start=1):
            reply = asks()
            assert "Hello there!" == text_of(reply, "text")
            assert (number, cut) == (len(night.retries), cut)


def beginnings(body: bytes) -> Iterator[bytes]:
    """Nothing at all, up to some lines' ends, and half of it: before it says why it ended."""
    last = body.index(b"event: message_delta")
    ends = [at + 1 for at in range(last) if body[at : at + 1] == b"\n"]
    for end in sorted({0, *ends[:: max(1, len(ends) // 6)], last // 2, last}):
        yield body[:end]


def test_input_that_is_no_json_is_for_the_tool_to_refuse(streams: dict[str, bytes]) -> None:
    night = Night()
    reply, _ = ask(night, Recorded(streams["tool_use_invalid_json_response"]))

    assert [] == night.retries
    assert [["INVALID_JSON"]] == [[*call.input] for call in reply.tool_calls]


def test_events_of_the_future_are_no_obstacle(streams: dict[str, bytes]) -> None:
    reply, _ = ask(Night(), Recorded(streams["unknown_events_response"]))

    assert ("end_turn", "Hello there!") == (reply.stop_reason, text_of(reply, "text"))


def test_recorded_rate_limits_are_waited_out(sources: dict[str, bytes]) -> None:
    """A cassette whose first answers are the service's own 429s."""
    limited = [
        exchanges
        for exchanges in cassettes(sources).values()
        if exchanges[0]["status_code"] == 429 and is_stream(exchanges[-1])
    ]
    assert limited
    for exchanges in limited:
        night = Night()
        reply, _ = ask(night, *map(as_answer, exchanges))
        assert reply.stop_reason == Told.by(body_of(exchanges[-1])).stop_reason
        assert len(exchanges) - 1 == len(night.retries)
        assert all("429 rate_limit_error" in error for error, _ in night.retries)


def as_answer(response: dict[str, Any]) -> Status | Recorded:
    if response["status_code"] == 200:
        return Recorded(body_of(response))
    error = response["body"]["error"]
    headers = {k: v for k, v in response["headers"].items() if "retry" in k}
    return Status(response["status_code"], error["type"], error["message"], headers=headers)
