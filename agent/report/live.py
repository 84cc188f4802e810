"""Serves a session's report live, on this machine only.

Whoever has the address with its token sees the report; nothing else is answered and nothing can be
changed. The page asks every second what is new and gets only that: the ledger is read from where
the last poll ended, and what did not change is not rendered again. See docs/decisions/0007.
"""

import hmac
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from agent.record.chain import Follower, read_blob
from agent.report.activity import activity
from agent.report.rendering import page_policy, whole_page
from agent.report.report import Report, now_part
from agent.report.summary import summary

HOST = "127.0.0.1"
REQUEST_SECONDS = 30.0

_PORT = re.compile(r":\d{1,5}$")
_NAMES_OF_THIS_MACHINE = frozenset({"127.0.0.1", "localhost", "[::1]"})
_BODY_HEADERS = {"content-length", "transfer-encoding"}
_HEADERS = {
    "Content-Security-Policy": f"{page_policy(is_live=True)}; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveReport:
    """A session's report in parts, each with the version of the page at which it last changed."""

    def __init__(self, directory: Path, now: Callable[[], datetime]) -> None:
        self._directory = directory
        self._now = now
        self._ledger = Follower(directory)
        self._history = self._ledger.history
        self._report = self._new_report()
        self._parts: dict[str, tuple[str, int]] = {}
        self._version = 0
        self._turn = threading.Lock()

    def page(self) -> str:
        """The whole page as it is now."""
        with self._turn:
            self._poll()
            parts = {name: text for name, (text, _) in self._parts.items()}
            return whole_page(
                {name: text for name, text in parts.items() if not name.isdigit()},
                {int(name): text for name, text in parts.items() if name.isdigit()},
                summary(self._ledger.entries, self._ledger.history),
                version=self._version,
                now=self._now(),
            )

    def news(self, since: int) -> dict[str, Any] | None:
        """What changed after that version of the page; none when nothing did."""
        with self._turn:
            self._poll()
            if since == self._version:
                return None
            fresh = {name: text for name, (text, at) in self._parts.items() if at > since}
            count = sum(name.isdigit() for name in self._parts)
            return {"version": self._version, "count": count, "parts": fresh}

    def _poll(self) -> None:
        """Take in what is new; costs next to nothing when nothing is."""
        ledger = self._ledger
        found: dict[str, str] = {}
        if ledger.poll():
            if ledger.history is not self._history:
                self._history, self._report, self._parts = ledger.history, self._new_report(), {}
            found |= self._report.parts(ledger.history, ledger.entries)
            attempts = self._report.attempts(ledger.history, ledger.entries)
            found |= {str(number): text for number, text in attempts.items()}
        now = activity(self._directory, ledger.history, ledger.entries)
        found["now"] = now_part(now, ledger.problem.message if ledger.problem else "")
        changed = {n: text for n, text in found.items() if self._parts.get(n, ("",))[0] != text}
        if changed:
            self._version += 1
            self._parts |= {name: (text, self._version) for name, text in changed.items()}

    def _new_report(self) -> Report:
        return Report(lambda sha: read_blob(self._directory, sha), is_live=True)


class WatchServer(ThreadingHTTPServer):
    """Answers GET and HEAD for who knows the token, on the loopback address alone."""

    daemon_threads = True  # a browser that keeps its connection does not hold up the end

    def __init__(self, live: LiveReport, *, port: int = 0) -> None:
        self.live = live
        self.token = secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Answer)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that left is no error; anything else is ours and is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Answer(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    headers = HTTPMessage()  # until a request's own are read

    def do_GET(self) -> None:
        """The page, what is new in it, or nothing."""
        if not self._is_for_this_machine():
            return self._answer(HTTPStatus.FORBIDDEN)
        parts = urlsplit(self.path)
        token, _, name = parts.path.lstrip("/").partition("/")
        # In constant time: how long an answer takes must not tell how much of a guess was right.
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self._answer(HTTPStatus.NOT_FOUND)
        if name == "":
            page = self.server.live.page().encode()
            return self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8")
        if name == "news":
            return self._tell_news(parse_qs(parts.query).get("since", [""])[-1])
        return self._answer(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815 - http.server looks for this name

    def _tell_news(self, since: str) -> None:
        if not (since.isascii() and since.isdigit() and len(since) < 19):
            return self._answer(HTTPStatus.BAD_REQUEST)
        news = self.server.live.news(int(since))
        if news is None:
            return self._answer(HTTPStatus.NO_CONTENT)
        return self._answer(HTTPStatus.OK, json.dumps(news).encode(), "application/json")

    def _is_for_this_machine(self) -> bool:
        """Whether the browser meant us: a page elsewhere may have its own name point here."""
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and _PORT.sub("", hosts[0]) in _NAMES_OF_THIS_MACHINE

    def _answer(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain") -> None:
        # What was not understood may go on with a body; it must not be taken for a request.
        if status >= HTTPStatus.BAD_REQUEST or _BODY_HEADERS & set(map(str.lower, self.headers)):
            self.close_connection = True
        self.send_response_only(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse without a word; an unknown method is one that is not allowed."""
        is_method = code == HTTPStatus.NOT_IMPLEMENTED
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED if is_method else HTTPStatus(code))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Keep the token out of the terminal."""
