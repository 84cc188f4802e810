"""A whole toy night through a real LiteLLM proxy: `make test-litellm`."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.morning.audit import audit
from agent.night.assemble import check_models
from agent.record.chain import read_ledger
from agent.record.events import ModelCalled, StopReason
from agent.record.usage import Spend
from tests.support.labs import work
from tests.support.minds import Mind, Scene

LITELLM = Path(__file__).parents[2] / ".litellm" / "bin" / "litellm"
START_SECONDS = 120
CONFIG = """
model_list:
  - model_name: mine
    litellm_params: {{model: hosted_vllm/stub, api_base: "{url}/v1", api_key: sk-stub}}
general_settings:
  master_key: sk-only-of-this-test-0123456789abcdef
"""
KEY = "sk-only-of-this-test-0123456789abcdef"
NEEDS_LITELLM = pytest.mark.skipif(
    not LITELLM.exists(), reason="LiteLLM is installed by `make test-litellm` alone: 760 MB"
)


class Stub(BaseHTTPRequestHandler):
    """A server of OpenAI's form with tool calls, behind which a mind of few thoughts sits."""

    mind = Mind(random.Random(5))
    usages: list[dict[str, int]]

    def do_POST(self) -> None:
        """Answer a chat completion, as a stream."""
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body)
        told = [m["content"] for m in asked["messages"] if m["role"] == "tool"][-1:]
        results = [{"type": "tool_result", "content": str(one)} for one in told]
        turn = self.mind.answer({"messages": [{"role": "user", "content": results}]})
        tools = [block for block in turn.blocks if block["type"] == "tool_use"]
        calls = [
            {
                "index": place,
                "id": f"call_{len(self.usages)}_{place}",
                "type": "function",
                "function": {"name": b["name"], "arguments": json.dumps(b["input"])},
            }
            for place, b in enumerate(tools)
        ]
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": 50}
        self.usages.append(usage)
        counted = usage | {"total_tokens": sum(usage.values())}
        self._send({"delta": {"role": "assistant", "tool_calls": calls}, "finish_reason": None})
        self._send({"delta": {}, "finish_reason": "tool_calls"}, usage=counted)
        self.wfile.write(b"data: [DONE]\n\n")

    def send_head(self) -> None:
        """Begin the stream."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()

    def _send(self, choice: dict[str, Any], **more: Any) -> None:
        if not more:
            self.send_head()
        chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "stub"}
        told = chunk | {"choices": [{"index": 0} | choice]} | more
        self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def stub() -> Iterator[str]:
    """The stub's address."""
    Stub.usages = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def litellm(root: Path, url: str) -> Iterator[str]:
    """The address of a LiteLLM proxy in front of it."""
    (root / "config.yaml").write_text(CONFIG.format(url=url))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"PATH": os.environ["PATH"], "HOME": str(root)}
    environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    words = ["--config", str(root / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    with (root / "proxy.log").open("wb") as log:
        proxy = subprocess.Popen(
            [LITELLM, *words], cwd=root, env=environ, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + START_SECONDS
        while not _is_up(address):
            told = (root / "proxy.log").read_text()[-2000:]
            assert proxy.poll() is None, told
            assert time.monotonic() < ends, told
            time.sleep(0.5)
        yield address
    finally:
        proxy.kill()
        proxy.wait()


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/liveliness", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@NEEDS_LITELLM
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_night_through_litellm_is_a_night(tmp_path: Path) -> None:
    own = {"model": "mine", "thinking": "off", "then": [], "price_usd_per_million": [1.0, 2.0]}
    scene = Scene(tmp_path, researcher=own, session={"attempts": 3, "usd": 5.0})
    place, paid = scene.place, list[ModelCalled]()
    with stub() as url, litellm(tmp_path, url) as address:
        environ = {"ANTHROPIC_BASE_URL": address, "ANTHROPIC_API_KEY": KEY}
        check_models(place.program, environ, paid, Spend())
        ended = work(
            place.begin("claude"),
            place.program,
            "claude",
            environ=environ,
            clock=place.clock.monotonic,
        )
    assert StopReason.ATTEMPTS is ended.reason, ended.explanation
    assert {"mine"} == {attempt.started.researcher for attempt in scene.history.completed}
    assert [] == audit(place.directory, read_ledger(place.directory))
    calls = [*paid, *scene.events(ModelCalled)]
    assert len(Stub.usages) == len(calls)
    billed = sum(u["prompt_tokens"] + 2 * u["completion_tokens"] for u in Stub.usages) / 1e6
    assert sum(call.cost_usd or 0.0 for call in calls) == pytest.approx(billed)
