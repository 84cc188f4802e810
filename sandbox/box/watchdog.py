"""Ends a box whose controller is dead or frozen.

A process of the controller's own, beside it on the host, in a session of its own. Standard library
only, run as a plain script. PID 1 does the same from inside, but on the box's own CPU time, and a
storm of hundreds of forking processes can spend that for a minute ahead (docs/decisions/0006).

    watchdog.py SOCKET API_VERSION CONTAINER SECONDS

It reads its standard input, whose other end only the controller holds: a byte means that the run is
over, an end of file that the controller is dead. After SECONDS without either it is frozen. One
byte says more: the engine was asked for the container and never said that it is gone. Then it is
looked for, and removed when it comes, by a process that the controller does not wait for.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import sys
import time

RUN_IS_OVER = b"."
MAY_COME_LATE = b"?"
LATE_SECONDS = 300.0
"""How long a container whose end the engine never confirmed is looked for; then the next start
does."""
LATE_PAUSE_SECONDS = 0.5
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


def ask(path: str, method: str, target: str, body: object = None) -> int:
    """Ask the engine for something and return its answer's status; 0 without an answer."""
    connection = EngineConnection(path)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, target, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def last_word(seconds: float) -> bytes:
    """Wait for the controller's word that the run is over; nothing when it cannot give it."""
    ready, _, _ = select.select([0], [], [], seconds)
    return os.read(0, 1) if ready else b""


def end_box(path: str, api_version: str, container: str) -> None:
    """Give the box every CPU to die with, kill it and remove it."""
    place = f"/v{api_version}/containers/{container}"
    # The CPU first: a kill waits in the same debt as the box.
    ask(path, "POST", f"{place}/update", {"NanoCpus": (os.cpu_count() or 1) * 10**9})
    ask(path, "POST", f"{place}/kill")
    ask(path, "DELETE", f"{place}?force=1&v=1")


def remove_late(path: str, api_version: str, container: str) -> None:
    """Remove a container that the engine may yet make, or would not remove."""
    give_up = time.monotonic() + LATE_SECONDS
    while time.monotonic() < give_up:
        if ask(path, "DELETE", f"/v{api_version}/containers/{container}?force=1&v=1") == 204:
            return
        time.sleep(LATE_PAUSE_SECONDS)


def main() -> None:
    path, api_version, container, seconds = sys.argv[1:]
    # However the controller dies, the kernel closes its end of the pipe.
    word = last_word(float(seconds))
    if word == MAY_COME_LATE:
        if os.fork() == 0:  # nobody waits for this one
            remove_late(path, api_version, container)
    elif not word:
        time.sleep(GRACE_SECONDS)
        end_box(path, api_version, container)


if __name__ == "__main__":
    main()
