"""A strict Messages API on loopback, for tests.

Real HTTP and server-sent events. Requests are checked against a schema closed from the SDK's own
types and against the service's documented rules; whatever the real service would answer with an
error is answered with it here, and fails the test unless the script planned it. Thinking blocks
are signed over everything before them, so an edited history is found out. Tokens are counted, the
prompt cache is simulated on a clock of the test's, and every call is billed by a price list that
is not the product's own.

Not promised: tokens are a quarter of the bytes, so the numbers are consistent, not the service's.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import hmac
import itertools
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self

from anthropic.types import RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import TypeAdapter

from agent.researcher.prompt import FIRST_QUESTION

API_VERSION = "2026-10-21"
MAX_BODY_BYTES = 32 * 2**20
MAX_OUTPUT_TOKENS = 128_000
CONTEXT_TOKENS = 1_000_000
MIN_CACHED_TOKENS = 512
LOOKBACK_BLOCKS = 20
MAX_BREAKPOINTS = 4
TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}
DELTA_CHARACTERS = 24
RECORDED_PIECE_BYTES = 61
SECRET = b"what only the service knows"
UNPRICED = "claude-unpriced-9-9"
PRICES_USD = {
    # Per million tokens: input, output, one-hour write, five-minute write, cache read.
    "claude-sonnet-5-5": (2.0, 10.0, 4.0, 2.5, 0.10),
    "claude-opus-5-5": (4.0, 20.0, 8.0, 5.0, 0.20),
    UNPRICED: (0.0, 0.0, 0.0, 0.0, 0.0),
}

CATALOGUE: dict[str, dict[str, Any]] = {
    name: {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": "2026-09-01T00:00:00Z",
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "max_input_tokens": CONTEXT_TOKENS,
        "max_tokens": MAX_OUTPUT_TOKENS,
    }
    for name in PRICES_USD
}

REFUSED_BLOCKS = {
    "user": ("tool_use", "thinking", "redacted_thinking"),
    "assistant": ("tool_result", "document", "image"),
}

KNOB = re.compile(
    r"^\s*\d+\s+([A-Z][A-Z0-9_]*) = (\d+(?:\.\d+)?(?:e-?\d+)?)(?= |$)(.*)$", re.MULTILINE
)
"""A module-level number and what stands behind it, in the numbered lines that `read` gives."""
CHOICES = re.compile(r"\{([^{}]+)\}\s*$")
RANGE = re.compile(r"\[([0-9.e-]+)\.\.([0-9.e-]+)(?: log)?\]\s*$")
VERDICT = re.compile(r'^\{"attempt":\d+,.*?"verdict":"(\w+)"')

Request = dict[str, Any]
Block = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """An answer that is an HTTP error."""

    code: int
    type: str = "api_error"
    message: str = "planned by the test"
    error_code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The error as the service words it."""
        error: dict[str, Any] = {"type": self.type, "message": self.message}
        if self.error_code is not None:
            error["details"] = {"error_code": self.error_code, "error_visibility": "user_facing"}
        return json.dumps({"type": "error", "error": error}).encode()


@dataclass(frozen=True)
class Cut:
    """What happens to a stream after that many of its events."""

    after: int
    how: Literal["error", "reset", "fin", "end", "stall", "pings", "bad_json"]
    error_type: str = "overloaded_error"


@dataclass(frozen=True)
class Turn:
    """One answer: its blocks, why it ends, and what goes wrong on the way."""

    blocks: tuple[Block, ...]
    stop_reason: str | None = None
    """By default `tool_use` with a tool, else `end_turn`."""
    stop_details: dict[str, Any] | None = None
    cut: Cut | None = None
    cut_tool_input: int | None = None
    """Only that many characters of the last tool's input come, as after `max_tokens`."""
    odd: bool = False
    """Holds things the SDK's types do not know."""
    bend: Callable[[list[dict[str, Any]]], list[dict[str, Any] | str]] | None = None
    """What a server of other habits makes of the stream's events; a text is sent as it is."""


@dataclass(frozen=True)
class Raw:
    """An answer in a server's own words."""

    code: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """An answer that somebody else recorded, byte for byte; it is not billed."""

    body: bytes


Answer = Turn | Status | Recorded | Raw
Entry = Answer | Callable[[Request], Answer]


@dataclass(frozen=True)
class Billed:
    """What one call cost."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    usd: float
    whole: bool


@dataclass(frozen=True)
class Problem:
    """Why a request is refused."""

    code: int
    type: str
    message: str


def say(*blocks: Block, cut: Cut | None = None) -> Turn:
    """A usual answer."""
    return Turn(blocks, cut=cut)


def text(words: str) -> Block:
    return {"type": "text", "text": words}


def thinking(words: str) -> Block:
    """A thinking block; the server signs it."""
    return {"type": "thinking", "thinking": words, "signature": ""}


def tool(name: str, **arguments: Any) -> Block:
    """A call of a tool; the server gives it an id."""
    return {"type": "tool_use", "id": "", "name": name, "input": arguments}


def tinker(request: Request) -> Turn:
    """A researcher without a mind: knob by knob through train.py, in the file's order.

    A step down, and where that is not kept a step up; what is kept is followed in the same
    direction; then comes the next knob. Steps respect the ranges in the file's comments.
    """
    shown = KNOB.findall("\n".join(_results(request["messages"][-1])))
    knobs = [(name, value, said) for name, value, said in shown if "fixed" not in said]
    if not knobs:
        return say(text("I look at the file first."), tool("read", file_path="train.py"))
    for place, up in _places(request):
        name, value, said = knobs[place % len(knobs)]
        if (changed := stepped(value, said, up=up)) != value:
            break
    return say(
        thinking(f"{name} may not be at its best."),
        tool(
            "edit",
            file_path="train.py",
            old_string=f"\n{name} = {value}",
            new_string=f"\n{name} = {changed}",
        ),
        tool("run", hypothesis=f"{name} from {value} to {changed}"),
    )


def stepped(value: str, said: str, *, up: bool) -> str:
    """The next value up or down, as far as the comment allows."""
    if choices := CHOICES.search(said):
        values = [choice.strip() for choice in choices[1].split(",")]
        place = values.index(value) if value in values else 0
        return values[min(max(place + (1 if up else -1), 0), len(values) - 1)]
    if "." not in value and "e" not in value:
        return str(int(value) * 2 if up else max(1, int(value) // 2))
    number = float(value) * (1.4 if up else 0.7)
    if limits := RANGE.search(said):
        number = min(max(number, float(limits[1])), float(limits[2]))
    changed = f"{number:.4g}"
    return changed if re.search(r"[.e]", changed) else f"{changed}.0"


def _places(request: Request) -> Iterator[tuple[int, bool]]:
    """The knob and the direction that are next, after everything that was tried; then the rest."""
    place, up, followed = 0, False, False
    tried = (result for message in request["messages"] for result in _results(message))
    for verdict in [VERDICT.search(result) for result in tried]:
        if verdict is None:
            continue
        if verdict[1] == "kept":
            followed = True
            continue
        place, up = (place, True) if not up and not followed else (place + 1, False)
        followed = False
    yield place, up
    yield from ((place + n // 2, bool(n % 2)) for n in range(1, 200))


def _results(message: dict[str, Any]) -> list[str]:
    results = (block for block in _blocks(message) if block["type"] == "tool_result")
    return [str(block.get("content", "")) for block in results]


class MessagesServer:
    """Answers with the script's entries, one a request; a context manager.

    Args:
        script: what to answer, in order.
        clock: seconds, for the life of cache entries.
        endless: whether the script may hold more than was asked for.
        tolerant: leave the check at the end to the test.
        catalogue: what is told of each model; none for a server that tells nothing.
        key: the only one it knows; none for any.
        helpful: whether it answers the question before a night by itself, beside the script.
    """

    def __init__(
        self,
        script: Iterable[Entry],
        *,
        clock: Callable[[], float] = time.monotonic,
        endless: bool = False,
        tolerant: bool = False,
        port: int = 0,
        catalogue: dict[str, dict[str, Any]] | None = CATALOGUE,
        key: str | None = None,
        helpful: bool = True,
    ) -> None:
        self.first_calls = 0
        self._helpful = helpful
        self.requests: list[Request] = []
        self.bills: list[Billed] = []
        self.unplanned: list[str] = []
        self.waiting = threading.Event()
        """Set while an answer hangs."""
        self.abandoned = threading.Event()
        """Set when a client left a hanging answer."""
        self._script: Iterator[Entry] = iter(script)
        self._endless = endless
        self._tolerant = tolerant
        self._catalogue, self._key = catalogue, key
        self._cache = PromptCache(clock)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._tool_ids = 0
        _schema(), _event_adapter()  # takes a second; not at the expense of the first request
        self._http = _HTTPServer(self, port)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """For `base_url`."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def billed_usd(self) -> float:
        """The account: every call, cut ones too."""
        return sum(bill.usd for bill in self.bills)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        if kind is None and not self._tolerant:
            self.check()

    def check(self) -> None:
        """Fail if the client broke a rule, or did not ask for every answer."""
        assert not self.unplanned, self.unplanned
        left_over = [] if self._endless else list(self._script)
        assert not left_over, f"{len(left_over)} answers of the script were not asked for"

    def forget_prompts(self) -> None:
        """Lose the prompt cache."""
        self._cache.forget()

    def answer(self, handler: _Handler) -> None:
        """Serve one request."""
        with self._lock:
            request, problem = _received(handler)
            answer = self._refusal(problem) if problem else self._next(request)
            if isinstance(answer, Status):
                return handler.send_status(answer)
            if isinstance(answer, Raw):
                return handler.send_json(answer.code, answer.body, "req_raw", answer.headers)
            if isinstance(answer, Recorded):
                return handler.send_recorded(answer.body)
            answer = self._completed(request, answer)
            read, written = self._cache.account(request)
            self.bills.append(self._bill(request, read, written, 1, whole=False))
            number = len(self.bills)
            message_id = f"msg_{number:06d}"
        usage = self._usage(self.bills[number - 1])
        events: list[Any] = list(_events(request, answer, usage, message_id))
        if not answer.odd:
            _check_events(events)
        if answer.bend is not None:
            events = answer.bend(copy.deepcopy(events))
        self._stream(handler, number, request, answer, events, (read, written))
        return None

    def describe(self, handler: _Handler) -> None:
        """Serve what is asked of models: `/v1/models/ID`, and all of them without an ID."""
        name = handler.path.partition("?")[0].removeprefix("/v1/models").strip("/")
        models = self._catalogue
        if self._key not in (None, sent := handler.headers.get("x-api-key")):
            telltale = f"invalid x-api-key {sent or handler.headers.get('authorization')}"
            return handler.send_status(Status(401, "authentication_error", telltale))
        if models is None or (name and name not in models):
            return handler.send_status(Status(404, "not_found_error", f"model: {name}"))
        page = {"data": [*models.values()], "has_more": False, "first_id": None, "last_id": None}
        told = models[name] if name else page
        return handler.send_json(200, json.dumps(told).encode(), "req_facts", {})

    def _refusal(self, problem: Problem) -> Status:
        self.unplanned.append(f"{problem.code}: {problem.message}")
        return Status(problem.code, problem.type, problem.message)

    def _next(self, request: Request) -> Answer:
        if self._helpful and FIRST_QUESTION in json.dumps(request["messages"]):
            self.first_calls += 1
            return say(tool("list"))
        self.requests.append(request)
        entry = next(self._script, None)
        if entry is None:
            return self._refusal(Problem(400, "invalid_request_error", "the script is at its end"))
        return entry(request) if callable(entry) else entry

    def _completed(self, request: Request, turn: Turn) -> Turn:
        """The turn with ids for its calls and signatures for its thinking."""
        blocks: list[Block] = []
        digest = _answer_digest(request)
        for block in copy.deepcopy(turn.blocks):
            if block["type"] == "tool_use" and not block["id"]:
                self._tool_ids += 1
                block["id"] = f"toolu_{self._tool_ids:06d}"
            if block["type"] == "thinking" and not block["signature"]:
                block["signature"] = _signature(digest, block)
            digest.update(_canonical(_plain(block)))
            blocks.append(block)
        usual = "tool_use" if any(b["type"] == "tool_use" for b in blocks) else "end_turn"
        return replace(turn, blocks=tuple(blocks), stop_reason=turn.stop_reason or usual)

    def _stream(
        self,
        handler: _Handler,
        number: int,
        request: Request,
        turn: Turn,
        events: list[Any],
        cached: tuple[int, dict[str, int]],
    ) -> None:
        sent_bytes, whole = 0, turn.cut is None
        end = len(events) if turn.cut is None else turn.cut.after
        handler.begin_stream(number)
        for place, event in enumerate(events[:end], start=1):
            sent_bytes += 0 if isinstance(event, str) else _delta_bytes(event)
            if place == end:
                # Before the client has it all: it may send the next request, or look at the bill.
                output_tokens = _output_tokens(turn) if whole else max(1, _tokens(sent_bytes))
                self.bills[number - 1] = self._bill(request, *cached, output_tokens, whole=whole)
            if isinstance(event, str):
                handler.send_piece(event.encode())
            else:
                handler.send_event(event["type"], json.dumps(event, ensure_ascii=bool(turn.bend)))
        if turn.cut is None:
            return handler.end_stream()
        return self._break(handler, turn.cut)

    def _break(self, handler: _Handler, cut: Cut) -> None:
        match cut.how:
            case "error":
                error = {"type": cut.error_type, "message": "planned by the test"}
                handler.send_event("error", json.dumps({"type": "error", "error": error}))
                handler.end_stream()
            case "bad_json":
                handler.send_event("content_block_delta", '{"type": "content_block_delta", "ind')
                handler.end_stream()
            case "end":
                handler.end_stream()
            case "fin":
                handler.drop(reset=False)
            case "reset":
                handler.drop(reset=True)
            case "stall" | "pings":
                self._hang(handler, pings=cut.how == "pings")

    def _hang(self, handler: _Handler, *, pings: bool) -> None:
        self.waiting.set()
        while not self._stopping.is_set():
            if handler.client_left():
                self.abandoned.set()
                break
            if pings:
                handler.send_event("ping", '{"type": "ping"}')
            self._stopping.wait(0.02)
        self.waiting.clear()
        handler.drop(reset=False)

    def _bill(
        self,
        request: Request,
        read_tokens: int,
        written: dict[str, int],
        output_tokens: int,
        *,
        whole: bool,
    ) -> Billed:
        write_tokens = sum(written.values())
        input_tokens = _request_tokens(request) - read_tokens - write_tokens
        prices = PRICES_USD[request["model"]]
        counts = (input_tokens, output_tokens, written["1h"], written["5m"], read_tokens)
        usd = sum(price * count for price, count in zip(prices, counts, strict=True)) / 1e6
        return Billed(input_tokens, output_tokens, read_tokens, write_tokens, usd, whole)

    def _usage(self, bill: Billed) -> dict[str, Any]:
        return {
            "input_tokens": bill.input_tokens,
            "output_tokens": bill.output_tokens,
            "cache_read_input_tokens": bill.cache_read_tokens,
            "cache_creation_input_tokens": bill.cache_write_tokens,
        }


class PromptCache:
    """Which prefixes are kept, and until when."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._expiry: dict[str, float] = {}

    def forget(self) -> None:
        """Keep nothing."""
        self._expiry.clear()

    def account(self, request: Request) -> tuple[int, dict[str, int]]:
        """Tokens read, and tokens written by lifetime; what was touched lives on."""
        blocks = list(_prefix_blocks(request))
        hashes = _prefix_hashes(blocks)
        sizes = [_tokens(len(_canonical(_plain(block)))) for block in blocks]
        marks = [i for i, block in enumerate(blocks) if block.get("cache_control")]
        now = self._clock()
        hit = self._longest_hit(marks, hashes, now)
        written = {"1h": 0, "5m": 0}
        start = hit + 1
        for mark in marks:
            ttl = blocks[mark]["cache_control"].get("ttl", "5m")
            if sum(sizes[: mark + 1]) < MIN_CACHED_TOKENS:
                continue
            written[ttl] += sum(sizes[start : mark + 1])
            start = max(start, mark + 1)
            self._expiry[hashes[mark]] = now + TTL_SECONDS[ttl]
        if hit >= 0:
            self._expiry[hashes[hit]] = now + TTL_SECONDS["1h"]
        return sum(sizes[: hit + 1]), written

    def _longest_hit(self, marks: list[int], hashes: list[str], now: float) -> int:
        for mark in reversed(marks):
            for index in range(mark, max(-1, mark - LOOKBACK_BLOCKS), -1):
                if self._expiry.get(hashes[index], -1.0) > now:
                    return index
        return -1


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, messages: MessagesServer, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.messages = messages

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; anything else is one of this server's own."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.messages.unplanned.append(f"the server failed: {error!r}")


def _queued(here: str, there: str) -> tuple[int, int]:
    """Bytes that one end of a connection has sent without answer, and received unread."""
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        row = line.split()
        if row[1:3] == [here, there]:
            sent, received = (int(count, 16) for count in row[4].split(":"))
            return sent, received
    return 0, 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small piece waits for the client's acknowledgement
    server: _HTTPServer

    def do_POST(self) -> None:
        self.server.messages.answer(self)

    def do_GET(self) -> None:
        self.server.messages.describe(self)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's name
        """Say nothing."""

    def send_status(self, status: Status) -> None:
        self.send_json(status.code, status.body(), "req_refused", status.headers)

    def send_json(self, code: int, body: bytes, request_id: str, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("request-id", request_id)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self, number: int) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("request-id", f"req_{number:06d}")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def send_event(self, name: str, body: str) -> None:
        self.send_piece(f"event: {name}\ndata: {body}\n\n".encode())

    def send_piece(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()

    def send_recorded(self, body: bytes) -> None:
        """A stream in pieces that respect neither its lines nor its characters."""
        self.begin_stream(0)
        for start in range(0, len(body), RECORDED_PIECE_BYTES):
            piece = body[start : start + RECORDED_PIECE_BYTES]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.end_stream()

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def drop(self, *, reset: bool) -> None:
        """Close in the middle; a reset throws away what was not read."""
        self.close_connection = True
        if reset:
            # A reset overtakes what it follows; the client is to have seen that first.
            give_up = time.monotonic() + 20
            while self._client_has_unread() and time.monotonic() < give_up:
                time.sleep(0.005)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A plain close would wait for the two files that the base class made of the socket.
        os.close(self.connection.detach())

    def _client_has_unread(self) -> bool:
        """Whether something of what was sent still waits in the kernel, at either end."""
        here, there = (
            f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}:{port:04X}"
            for host, port in (self.connection.getsockname(), self.connection.getpeername())
        )
        # Ours first: what is acknowledged has come into the queue at the other end, or left it.
        return _queued(here, there)[0] > 0 or _queued(there, here)[1] > 0

    def client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True


def _received(handler: _Handler) -> tuple[Request, Problem | None]:
    size = int(handler.headers.get("content-length", "0"))
    body = handler.rfile.read(size)
    if handler.path.partition("?")[0] != "/v1/messages":
        return {}, Problem(404, "not_found_error", f"no such path: {handler.path}")
    if size > MAX_BODY_BYTES:
        return {}, Problem(413, "request_too_large", "Request exceeds the maximum size")
    if not (handler.headers.get("x-api-key") or handler.headers.get("authorization")):
        return {}, Problem(401, "authentication_error", "x-api-key header is required")
    if handler.headers.get("anthropic-version") != API_VERSION:
        return {}, _invalid("anthropic-version: not the version this server speaks")
    request = json.loads(body)
    return request, first_problem(request)


def first_problem(request: Request) -> Problem | None:
    """The first rule that a request breaks."""
    message = _shape_problem(request)
    if message is not None:
        return _invalid(message)
    if (unknown := _unknown_model(request)) is not None:
        return unknown
    for rule in RULES:
        message = rule(request)
        if message is not None:
            return _invalid(message)
    return None


def _unknown_model(request: Request) -> Problem | None:
    if request["model"] in PRICES_USD:
        return None
    return Problem(404, "not_found_error", f"model: {request['model']}")


def _invalid(message: str) -> Problem:
    return Problem(400, "invalid_request_error", message)


def _shape_problem(request: Request) -> str | None:
    """What the schema has against a request, part by part: most parts were seen before."""
    problem = _part_problem(json.dumps({**request, "messages": []}))
    if problem is not None or not isinstance(request.get("messages"), list):
        return problem or "messages: not a list"
    frame = {"model": request["model"], "max_tokens": 1, "stream": True}
    for index, message in enumerate(request["messages"]):
        problem = _part_problem(json.dumps({**frame, "messages": [message]}))
        if problem is not None:
            return f"messages.{index}: {problem}"
    return None


@functools.lru_cache(maxsize=2048)
def _part_problem(part: str) -> str | None:
    error = next(_schema().iter_errors(json.loads(part)), None)
    if error is None:
        return None
    place = ".".join(str(step) for step in error.absolute_path)
    return f"{place}: {error.message[:500]}"


@functools.cache
def _schema() -> Draft202012Validator:
    """The SDK's types as a schema that knows no other fields than theirs."""
    schema = TypeAdapter(MessageCreateParamsStreaming).json_schema()
    for name, part in [("", schema), *schema["$defs"].items()]:
        # A tool's own schema is free; it alone may hold what the SDK does not know.
        if "properties" in part and name != "InputSchemaTyped":
            part["additionalProperties"] = False
    return Draft202012Validator(schema)


@functools.cache
def _event_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(RawMessageStreamEvent)


def _check_events(events: list[dict[str, Any]]) -> None:
    """Our own answers are held to the SDK's types as well; it would parse anything."""
    for event in events:
        _event_adapter().validate_python(event, strict=True)


def _limits(request: Request) -> str | None:
    if not 1 <= request["max_tokens"] <= MAX_OUTPUT_TOKENS:
        return f"max_tokens: {request['max_tokens']} is not between 1 and {MAX_OUTPUT_TOKENS}"
    tokens = _request_tokens(request)
    if tokens > CONTEXT_TOKENS:
        return f"prompt is too long: {tokens} tokens > {CONTEXT_TOKENS} maximum"
    return None


def _forced(request: Request) -> str | None:
    choice = request.get("tool_choice")
    if choice is not None and not request.get("tools"):
        return "tool_choice: may only be specified while providing tools"
    if choice is not None and choice["type"] in ("any", "tool"):
        return "tool_choice: forcing a tool is not supported by this model"
    kind = request.get("thinking", {}).get("type")
    if kind in ("enabled", "disabled"):
        return f"thinking.type: {kind} is not supported by this model"
    effort = request.get("output_config", {}).get("effort")
    if kind == "between_tools" and effort in ("xhigh", "max"):
        return f"thinking.type: between_tools is not supported with effort {effort}"
    return None


def _tools(request: Request) -> str | None:
    names = [tool["name"] for tool in request.get("tools", [])]
    for index, definition in enumerate(request.get("tools", [])):
        if not _is_schema(json.dumps(definition["input_schema"])):
            return (
                f"tools.{index}.custom.input_schema: JSON schema is invalid. "
                "It must match JSON Schema draft 2020-12"
            )
    for index, name in enumerate(names):
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", name):
            return f"tools.{index}.custom.name: String should match pattern"
    if len(set(names)) != len(names):
        return "tools: Tool names must be unique."
    return None


@functools.lru_cache(maxsize=256)
def _is_schema(text: str) -> bool:
    try:
        Draft202012Validator.check_schema(json.loads(text))
    except SchemaError:
        return False
    return True


def _roles(request: Request) -> str | None:
    """What may stand in a message depends on whose it is."""
    for index, message in enumerate(request["messages"]):
        role = message["role"]
        for place, block in enumerate(_blocks(message)):
            where, kind = f"messages.{index}.content.{place}", block["type"]
            if kind in REFUSED_BLOCKS.get(role, ()):
                return f"{where}: `{kind}` blocks can not be in `{role}` messages"
            if role == "user" and kind == "text" and block.get("citations"):
                return f"{where}: citations are not allowed on user text"
    return None


def _order(request: Request) -> str | None:
    messages = request["messages"]
    if not messages:
        return "messages: at least one message is required"
    if messages[0]["role"] != "user":
        return "messages: first message must use the user role"
    if messages[-1]["role"] == "assistant":
        return "This model does not support assistant message prefill."
    return None


def _texts(request: Request) -> str | None:
    for index, message in enumerate(request["messages"]):
        if not message["content"]:
            return f"messages.{index}: all messages must have non-empty content"
        for block in _blocks(message):
            if block["type"] == "text" and not block["text"].strip():
                return "messages: text content blocks must be non-empty"
    if any(not block["text"].strip() for block in _system_blocks(request)):
        return "system: text content blocks must be non-empty"
    return None


def _tool_ids(request: Request) -> str | None:
    messages = request["messages"]
    known: set[str] = set()
    for index, message in enumerate(messages):
        asked = [b["id"] for b in _blocks(message) if b["type"] == "tool_use"]
        if len(set(asked)) != len(asked) or known & set(asked):
            return f"messages.{index}: `tool_use` ids must be unique"
        known |= set(asked)
        if odd := [name for name in asked if not re.fullmatch(r"[a-zA-Z0-9_-]+", name)]:
            return f"messages.{index}: tool_use.id: String should match pattern: {odd[0]}"
        following = messages[index + 1] if index + 1 < len(messages) else None
        problem = _unanswered(index, asked, following)
        if problem is None and message["role"] == "user":
            problem = _unasked(index, messages[index - 1] if index else None, message)
        if problem is not None:
            return problem
    return None


def _unanswered(index: int, asked: list[str], following: dict[str, Any] | None) -> str | None:
    if not asked or following is None:
        return None
    results = [b["tool_use_id"] for b in _blocks(following) if b["type"] == "tool_result"]
    if following["role"] != "user" or set(asked) - set(results):
        missing = ", ".join(sorted(set(asked) - set(results)))
        return (
            f"messages.{index}: `tool_use` ids were found without `tool_result` blocks "
            f"immediately after: {missing}"
        )
    return None


def _unasked(index: int, before: dict[str, Any] | None, message: dict[str, Any]) -> str | None:
    kinds = [block["type"] == "tool_result" for block in _blocks(message)]
    results = [b["tool_use_id"] for b in _blocks(message) if b["type"] == "tool_result"]
    asked = {b["id"] for b in _blocks(before or {"content": []}) if b["type"] == "tool_use"}
    if set(results) - asked:
        return f"messages.{index}: unexpected `tool_use_id` found in `tool_result` blocks"
    if len(set(results)) != len(results):
        return f"messages.{index}: each tool_use must have a single result"
    if kinds != sorted(kinds, reverse=True):
        return f"messages.{index}: `tool_result` blocks must come first"
    return None


def _breakpoints(request: Request) -> str | None:
    marks = [b["cache_control"] for b in _prefix_blocks(request) if b.get("cache_control")]
    if len(marks) > MAX_BREAKPOINTS:
        return f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided."
    lifetimes = [TTL_SECONDS[mark.get("ttl", "5m")] for mark in marks]
    if lifetimes != sorted(lifetimes, reverse=True):
        return "cache_control: a ttl='1h' block must not come after a ttl='5m' block"
    return None


def _thinking(request: Request) -> str | None:
    digest = _opening_digest(request)
    for index, message in enumerate(request["messages"]):
        digest.update(message["role"].encode())
        for place, block in enumerate(_blocks(message)):
            if block["type"] == "thinking" and block["signature"] != _signature(digest, block):
                return (
                    f"messages.{index}.content.{place}: this `thinking` block is bound to a "
                    "different conversation"
                )
            digest.update(_canonical(_plain(block)))
    return None


RULES: tuple[Callable[[Request], str | None], ...] = (
    _limits,
    _forced,
    _tools,
    _order,
    _roles,
    _texts,
    _tool_ids,
    _breakpoints,
    _thinking,
)


def _opening_digest(request: Request) -> hashlib._Hash:
    """Over what comes before the first message; where the cache ends is no part of it."""
    opening = [_system_blocks(request), request.get("tools", [])]
    return hashlib.sha256(_canonical(_plain(opening)))


def _answer_digest(request: Request) -> hashlib._Hash:
    """Over everything that an answer follows."""
    digest = _opening_digest(request)
    for message in request["messages"]:
        digest.update(message["role"].encode())
        for block in _blocks(message):
            digest.update(_canonical(_plain(block)))
    digest.update(b"assistant")
    return digest


def _signature(before: hashlib._Hash, block: Block) -> str:
    """Binds a thinking block to everything before it."""
    return hmac.new(SECRET, before.digest() + block["thinking"].encode(), "sha256").hexdigest()


def _blocks(message: dict[str, Any]) -> list[Block]:
    """A message's blocks; a string is shorthand for one of text."""
    content = message["content"]
    return [text(content)] if isinstance(content, str) else content


def _system_blocks(request: Request) -> list[Block]:
    system = request.get("system", [])
    return [text(system)] if isinstance(system, str) else system


def _prefix_blocks(request: Request) -> Iterator[Block]:
    """What the cache sees, in its order."""
    yield from request.get("tools", [])
    yield from _system_blocks(request)
    for message in request["messages"]:
        yield from _blocks(message)


def _prefix_hashes(blocks: list[Block]) -> list[str]:
    hashes: list[str] = []
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(_canonical(_plain(block)) + b"\n")
        hashes.append(digest.hexdigest())
    return hashes


def _plain(value: Any) -> Any:
    """The value without its cache breakpoints."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "cache_control"}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def _tokens(size_bytes: int) -> int:
    return -(-size_bytes // 4)


def _request_tokens(request: Request) -> int:
    return sum(_tokens(len(_canonical(_plain(block)))) for block in _prefix_blocks(request))


def _output_tokens(turn: Turn) -> int:
    return max(1, _tokens(sum(len(_payload(turn, block).encode()) for block in turn.blocks)))


def _payload(turn: Turn, block: Block) -> str:
    """What comes of a block in pieces."""
    match block["type"]:
        case "text":
            return str(block["text"])
        case "thinking":
            return str(block["thinking"])
        case "tool_use":
            whole = json.dumps(block["input"], ensure_ascii=False)
            return whole[: turn.cut_tool_input] if block is turn.blocks[-1] else whole
        case _:
            return ""


def _events(
    request: Request,
    turn: Turn,
    usage: dict[str, Any],
    message_id: str,
) -> Iterator[dict[str, Any]]:
    """The stream of one answer."""
    message = {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    yield {"type": "message_start", "message": message}
    for index, block in enumerate(turn.blocks):
        yield from _block_events(turn, index, block)
    delta: dict[str, Any] = {"stop_reason": turn.stop_reason, "stop_sequence": None}
    if turn.stop_details is not None:
        delta["stop_details"] = turn.stop_details
    counted = {**usage, "output_tokens": _output_tokens(turn)}
    yield {"type": "message_delta", "delta": delta, "usage": counted}
    yield {"type": "message_stop"}


def _block_events(turn: Turn, index: int, block: Block) -> Iterator[dict[str, Any]]:
    kind = block["type"]
    empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
    start = {**block, **empty.get(kind, {})} if kind != "tool_use" else {**block, "input": {}}
    yield {"type": "content_block_start", "index": index, "content_block": start}
    name, key = {
        "text": ("text_delta", "text"),
        "thinking": ("thinking_delta", "thinking"),
        "tool_use": ("input_json_delta", "partial_json"),
    }.get(kind, ("", ""))
    payload = _payload(turn, block)
    for at in range(0, len(payload), DELTA_CHARACTERS):
        delta = {"type": name, key: payload[at : at + DELTA_CHARACTERS]}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    if kind == "thinking":
        delta = {"type": "signature_delta", "signature": block["signature"]}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def _delta_bytes(event: dict[str, Any]) -> int:
    delta = event.get("delta", {})
    pieces = (delta.get(key, "") for key in ("text", "thinking", "partial_json"))
    return sum(len(piece.encode(errors="replace")) for piece in pieces)


def main() -> None:
    """Serve `tinker` until Ctrl-C: the whole claude loop, without a key and without a mind."""
    parser = argparse.ArgumentParser(description="A Messages API on this machine, for trying.")
    parser.add_argument("--demo", action="store_true", required=True)
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    with MessagesServer(itertools.repeat(tinker), endless=True, port=port) as server:
        sys.stdout.write(
            "In another terminal:\n"
            f"  ANTHROPIC_BASE_URL={server.url} ANTHROPIC_API_KEY=none "
            "nightlab run --researcher claude\n"
        )
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.stdout.write(f"billed ${server.billed_usd:.4f} of play money\n")


if __name__ == "__main__":
    main()
