"""The same model through a cloud: their wire, their credentials, their errors.

The SDK's own clients speak to a server on loopback that frames its answers as the clouds document:
Bedrock in Amazon's binary event stream, Vertex in server-sent events.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.record.events import StopReason
from agent.researcher.base import ModelError, Reply
from agent.researcher.providers import Provider
from tests.support.claude_calls import Night, claude

REGION, PROJECT = "eu-west-9", "a-project"
MODELS: dict[Provider, str] = {
    "bedrock": "anthropic.claude-sonnet-5-5",
    "vertex": "claude-sonnet-5-5",
}
PATHS: dict[Provider, str] = {
    "bedrock": f"/model/{MODELS['bedrock']}/invoke-with-response-stream",
    "vertex": f"/projects/{PROJECT}/locations/{REGION}/publishers/anthropic/models/"
    f"{MODELS['vertex']}:streamRawPredict",
}
EVENTS: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-5-5",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 30, "output_tokens": 1, "cache_read_input_tokens": 900},
        },
    },
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {}},
    },
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "input_json_delta", "partial_json": '{"hypothesis": "ß"}'},
    },
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 40},
    },
    {"type": "message_stop"},
]


@dataclass(frozen=True)
class Answer:
    """An answer of a cloud: its status, its headers, its body."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Cloud(ThreadingHTTPServer):
    """Gives its answers in order, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, list[Asked]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Cloud

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = json.loads(body) if headers["content-type"] == "application/json" else {}
        self.server.asked.append(Asked(self.path, headers, request))
        answer = self.server.answers.pop(0)
        self.send_response(answer.status)
        for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's name
        """Say nothing."""


def frame(headers: dict[str, str], payload: bytes) -> bytes:
    """One message of `application/vnd.amazon.eventstream`."""
    packed = b"".join(
        struct.pack("!B", len(name))
        + name.encode()
        + struct.pack("!BH", 7, len(value.encode()))
        + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(packed) + len(payload), len(packed))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + packed + payload
    return message + struct.pack("!I", zlib.crc32(message))


def chunk(event: dict[str, Any]) -> bytes:
    kind = {":message-type": "event", ":event-type": "chunk", ":content-type": "application/json"}
    inner = base64.b64encode(json.dumps(event).encode()).decode()
    return frame(kind, json.dumps({"bytes": inner}).encode())


def exception(name: str, message: str) -> bytes:
    kind = {":message-type": "exception", ":exception-type": name}
    return frame(kind, json.dumps({"message": message}).encode())


def streamed(provider: Provider, events: list[dict[str, Any]], after: bytes = b"") -> Answer:
    if provider == "bedrock":
        kind = {"content-type": "application/vnd.amazon.eventstream"}
        return Answer(b"".join(map(chunk, events)) + after, headers=kind)
    lines = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)
    return Answer(lines.encode() + after, headers={"content-type": "text/event-stream"})


@pytest.fixture(scope="session")
def service_account() -> dict[str, str]:
    """A Google service account of nobody's; where its tokens come from is left open."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": "1",
        "private_key": private.decode(),
        "client_email": "nobody@example.com",
    }


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's, and no way to anybody's."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "CLOUD_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "CLOUD_ML_REGION": REGION,
        "ANTHROPIC_VERTEX_PROJECT_ID": PROJECT,
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def google(tmp_path: Path, service_account: dict[str, str]) -> Iterator[Cloud]:
    """Where the service account gets its token."""
    with Cloud([]) as server, serving(server):
        account = service_account | {"token_uri": f"{server.url}/token"}
        (tmp_path / "account.json").write_text(json.dumps(account))
        yield server


@contextmanager
def serving(server: Cloud) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def ask_cloud(
    provider: Provider, *answers: Answer, night: Night | None = None
) -> tuple[Reply, list[Asked]]:
    night = night or Night()
    with Cloud(list(answers)) as server, serving(server), pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"ANTHROPIC_{provider.upper()}_BASE_URL", server.url)
        with (
            claude("", provider=provider, model=MODELS[provider]) as model,
            night.asks(model) as asks,
        ):
            try:
                return asks(), server.asked
            finally:
                assert [] == server.answers


def refusal_of(provider: Provider, *answers: Answer, night: Night | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ask_cloud(provider, *answers, night=night)
    return caught.value


TOKEN = Answer(
    b'{"access_token": "a-token", "expires_in": 3600, "token_type": "Bearer"}',
    headers={"content-type": "application/json"},
)
PROVIDERS = pytest.mark.parametrize("provider", ["bedrock", "vertex"])


@PROVIDERS
def test_a_reply_comes_through_a_cloud(provider: Provider, google: Cloud) -> None:
    google.answers = [TOKEN] if provider == "vertex" else []
    reply, (asked,) = ask_cloud(provider, streamed(provider, EVENTS))

    assert [{"hypothesis": "ß"}] == [call.input for call in reply.tool_calls]
    assert ("tool_use", 30, 40, 900) == (
        reply.stop_reason,
        reply.usage.input_tokens,
        reply.usage.output_tokens,
        reply.usage.cache_read_tokens,
    )
    assert reply.cost_usd is not None
    assert 0 < reply.cost_usd < 0.01
    assert PATHS[provider] == asked.path
    assert "model" not in asked.body
    assert "2026-10-21" == asked.body["anthropic_version"]
    assert (provider == "vertex") == asked.body.get("stream", False)
    assert "1h" == asked.body["system"][0]["cache_control"]["ttl"]
    assert {"type": "adaptive", "display": "summarized"} == asked.body["thinking"]


def test_bedrock_requests_are_signed_over_their_body() -> None:
    _, (asked,) = ask_cloud("bedrock", streamed("bedrock", EVENTS))

    signature = asked.headers["authorization"]
    date = asked.headers["x-amz-date"][:8]
    assert signature.startswith(
        f"AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/{date}/{REGION}/bedrock/aws4_request, "
    )
    assert "Signature=" in signature
    assert "x-api-key" not in asked.headers


def test_vertex_requests_carry_the_token_of_the_service_account(google: Cloud) -> None:
    google.answers = [TOKEN]
    _, (asked,) = ask_cloud("vertex", streamed("vertex", EVENTS))

    assert "Bearer a-token" == asked.headers["authorization"]
    assert "x-api-key" not in asked.headers
    assert ["/token"] == [one.path for one in google.asked]


def test_a_request_id_of_bedrocks_is_on_record() -> None:
    answer = streamed("bedrock", EVENTS)
    answer.headers["x-amzn-requestid"] = "b-1"
    reply, _ = ask_cloud("bedrock", answer)

    assert "b-1" == reply.request_id


PASSING = {
    "throttled": Answer(b'{"message": "Too many requests"}', 429),
    "unavailable": Answer(b'{"message": "try later"}', 503),
    "model_timeout": Answer(b'{"message": "the model took too long"}', 408),
}
PASSING_FRAMES = (
    *("throttlingException", "serviceUnavailableException", "internalServerException"),
    *("modelTimeoutException", "modelStreamErrorException"),
)


@pytest.mark.parametrize("name", PASSING_FRAMES)
def test_an_exception_in_a_bedrock_stream_is_waited_out_and_charged(name: str) -> None:
    night = Night()
    broken = streamed("bedrock", EVENTS[:3], exception(name, "Too many requests"))
    reply, _ = ask_cloud("bedrock", broken, streamed("bedrock", EVENTS), night=night)

    assert "tool_use" == reply.stop_reason
    assert [name in error for error, _ in night.retries] == [True]
    assert 30 == night.lost[0].usage.input_tokens


@PROVIDERS
@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING.keys())
def test_what_passes_in_a_cloud_is_asked_again(
    provider: Provider, answer: Answer, google: Cloud
) -> None:
    google.answers = [TOKEN] if provider == "vertex" else []
    night = Night()
    answer = dataclasses.replace(answer, headers={"content-type": "application/json"})
    ask_cloud(provider, answer, streamed(provider, EVENTS), night=night)

    (said, _), *rest = night.retries
    assert [] == rest
    assert json.loads(answer.body)["message"] in said


@PROVIDERS
def test_a_cloud_stream_cut_short_is_asked_again(provider: Provider, google: Cloud) -> None:
    google.answers = [TOKEN] if provider == "vertex" else []
    night = Night()
    whole = streamed(provider, EVENTS)
    cut = dataclasses.replace(whole, body=whole.body[: len(whole.body) // 2])
    reply, _ = ask_cloud(provider, cut, whole, night=night)

    assert ("tool_use", 1) == (reply.stop_reason, len(night.retries))


def test_a_validation_error_in_a_bedrock_stream_is_final() -> None:
    broken = streamed("bedrock", EVENTS[:3], exception("validationException", "too long"))
    error = refusal_of("bedrock", broken)

    assert (StopReason.API_REFUSED, True) == (error.reason, error.history_rejected)


@PROVIDERS
def test_a_forbidden_model_points_at_the_clouds_own_credentials(
    provider: Provider, google: Cloud
) -> None:
    google.answers = [TOKEN] if provider == "vertex" else []
    error = refusal_of(provider, Answer(b'{"message": "no access to the model"}', 403))

    assert StopReason.API_REFUSED is error.reason
    assert "no access to the model" in error.message
    assert {"bedrock": "AWS", "vertex": "Google"}[provider] in error.hint
    assert "ANTHROPIC_API_KEY" not in error.hint


@PROVIDERS
def test_missing_credentials_end_in_a_sentence(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_REGION", "eu-west-8")  # the SDK keeps a session for each region
    night = Night()
    error = refusal_of(provider, night=night)

    assert (StopReason.API_REFUSED, []) == (error.reason, night.retries)
    assert "redentials" in error.message
    assert "--researcher tpe" in error.hint


def test_an_outage_of_the_token_service_is_waited_out(google: Cloud) -> None:
    # Three times, since google-auth itself tries again, in less than a few seconds.
    google.answers = [*[Answer(b"{}", 503)] * 3, TOKEN]
    night = Night()
    reply, _ = ask_cloud("vertex", streamed("vertex", EVENTS), night=night)

    assert "tool_use" == reply.stop_reason
    assert 1 == len(night.retries)
