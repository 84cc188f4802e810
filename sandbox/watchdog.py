"""Ends a box whose controller is dead or frozen.

A process of the controller's own, beside it on the host, in a session of its own. Standard library
only, run as a plain script. PID 1 does the same from inside, but on the box's own CPU time, and a
storm of hundreds of forking processes can spend that for a minute ahead.

    watchdog.py SOCKET API_VERSION CONTAINER SECONDS

It reads its standard input, whose other end only the controller holds: a byte means that the run is
over, an end of file that the controller is dead. After SECONDS without either it is frozen.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import sys
import time

CALL_SECONDS = 15
GRACE_SECONDS = 0.1
"""What PID 1, which is usually done long before, is given to end the box by itself."""


class EngineConnection(http.client.HTTPConnection):
    """One connection to an engine behind a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CALL_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the engine."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CALL_SECONDS)
        self.sock.connect(self._path)


def ask(path: str, method: str, target: str, body: object = None) -> None:
    """Ask the engine for something, whatever it answers."""
    connection = EngineConnection(path)
    with contextlib.suppress(OSError, http.client.HTTPException):
        text = None if body is None else json.dumps(body)
        connection.request(method, target, text, {"Content-Type": "application/json"})
        connection.getresponse().read()
    connection.close()


def is_over(seconds: float) -> bool:
    """Wait for the controller's word that the run is over; False when it cannot give it."""
    ready, _, _ = select.select([0], [], [], seconds)
    return bool(ready and os.read(0, 1))


def end_box(path: str, api_version: str, container: str) -> None:
    """Give the box every CPU to die with, kill it and remove it."""
    place = f"/v{api_version}/containers/{container}"
    ask(path, "POST", f"{place}/update", {"NanoCpus": (os.cpu_count() or 1) * 10**9})
    ask(path, "POST", f"{place}/kill")
    ask(path, "DELETE", f"{place}?force=1&v=1")


def main() -> None:
    path, api_version, container, seconds = sys.argv[1:]
    if not is_over(float(seconds)):
        time.sleep(GRACE_SECONDS)
        end_box(path, api_version, container)


if __name__ == "__main__":
    main()
