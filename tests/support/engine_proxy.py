"""Stands between a client and an engine, and fails on purpose.

Every request is forwarded whole and answered whole, so that a fault hits exactly one of them, the
one at a given place in the order of requests, or every one of a kind.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from types import TracebackType
from typing import Literal, NamedTuple

Action = Literal["kill_before", "kill_after", "drop", "refuse", "delay", "late", "hang", "forget"]
NAMED_THING = re.compile(r"/v[\d.]+|(?<=/containers/)nightlab-\w+|(?<=/images/)sha256:\w+|\?.*")


class Fault(NamedTuple):
    """What happens at one request, or at every request of a kind.

    `kill_before` and `kill_after` call the proxy's `kill` before or after the engine has done what
    was asked, and never answer; `drop` closes the connection without asking the engine; `refuse`
    answers 500 without asking it; `delay` lets the engine do it and answers after `release`; `late`
    has the engine do it only then, when nobody waits for the answer; `hang` neither asks nor
    answers; `forget` asks for a container without its bound on processes.
    """

    at: int | None
    """The first request is number 0; None for every request of the kind."""
    action: Action
    kind: str = ""
    """A pattern for what is asked, such as "DELETE"."""

    def hits(self, number: int, request: str) -> bool:
        """Tell whether this request fails."""
        return self.at in (None, number) and re.search(self.kind, request) is not None


class _EngineConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EngineProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(f"{self.command} {NAMED_THING.sub('', self.path)}")
        if fault is None:
            self._answer(*self._forward(body))
        elif fault.action == "refuse":
            self._answer(500, b'{"message": "made to fail"}', "application/json")
        elif fault.action == "delay":
            answer = self._forward(body)
            self.server.released.wait()
            self._answer(*answer)
        elif fault.action == "late":
            self.server.released.wait()
            self.server.late.append(self._forward(body)[0])
            self.close_connection = True
        elif fault.action == "forget":
            settings = json.loads(body)
            del settings["HostConfig"]["PidsLimit"]
            self._answer(*self._forward(json.dumps(settings).encode()))
        elif fault.action == "hang":
            self.server.released.wait()
            self.close_connection = True
        else:
            self._hang_up(fault, body)

    do_POST = do_DELETE = do_GET  # noqa: N815 - the base class's names

    def _hang_up(self, fault: Fault, body: bytes) -> None:
        self.close_connection = True
        if fault.action == "kill_after":
            self._forward(body)
        if fault.action != "drop":
            self.server.kill()

    def _forward(self, body: bytes) -> tuple[int, bytes, str]:
        connection = _EngineConnection(self.server.engine_path)
        try:
            headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            kind = answer.headers.get("Content-Type") or "application/json"
            return answer.status, answer.read(), kind
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client did not wait, or is dead
            self.close_connection = True

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


class EngineProxy(ThreadingUnixStreamServer):
    """A Unix socket in front of an engine's.

    Args:
        engine_url: the real engine.
        path: where to listen.
        fault: what goes wrong, if anything.
        kill: ends the client's process; called by the two faults of that name.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        engine_url: str,
        path: Path,
        fault: Fault | None = None,
        kill: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine_path = engine_url.removeprefix("unix://")
        self.url = f"unix://{path}"
        self.requests: list[str] = []
        self.late: list[int] = []
        """What the engine answered to those that had gone."""
        self.released = threading.Event()
        self.kill = kill
        self._fault = fault
        self._lock = threading.Lock()
        super().__init__(str(path), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def next_fault(self, request: str) -> Fault | None:
        """Note a request and return what shall happen to it."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            fault = self._fault
        return fault if fault is not None and fault.hits(number, request) else None

    def release(self) -> None:
        """Let those go on that were held up."""
        self.released.set()

    def heal(self) -> None:
        """Fail no more."""
        self._fault = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
        self.shutdown()
        self._thread.join()
        self.server_close()
