"""The host's end of the link to PID 1.

PID 1 is ours but lives in a hostile place, so every message is bounded and checked. The frames are
described in `supervisor`, which imports nothing of the host's. Why it is a socket and not the
engine's attach: docs/decisions/0001.
"""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from sandbox.contract.errors import LOCAL_DISK, SandboxError
from sandbox.contract.record import Amount, Record
from sandbox.contract.run import Limits
from sandbox.engine.host import is_readable

Count = Annotated[int, Field(ge=0)]
Kind = TypeVar("Kind", bound=Record)
MAX_FRAME_BYTES = {b"H": 2**20, b"L": 2**16, b"X": 2**16, b"T": 2**22}
MAX_FRAME_BYTES |= {b"F": 2**12, b"D": 2**18, b"E": 2**14}
"""A frame of any other kind, or a longer one, was not sent by PID 1 as we wrote it."""


class Counters(Record):
    """The kernel's own counters of one box."""

    oom_kills: Count
    oom_group_kills: Count
    memory_limit_hits: Count | None
    """How often the box's own limit left nothing to give; None where the kernel does not count."""
    peak_memory_bytes: Count | None
    pids_refused: Count
    cpu_seconds: Amount | None


class Room(Record):
    """What a file system holds, or the most of it that was ever seen taken."""

    bytes: Count
    inodes: Count


class ExitReport(Record):
    """How the program ended, as PID 1 and the kernel tell it."""

    exit_code: Annotated[int, Field(ge=0, le=255)] | None
    signal: Annotated[int, Field(ge=1, le=64)] | None
    killed_by: Literal["deadline", "nightlab"] | None
    wall_seconds: Amount
    clearing_seconds: Amount
    """From the program's end, or the deadline, to the last process of the box gone."""
    all_dead: bool
    counters: Counters
    fullest: dict[str, Room]
    left: dict[str, Room]
    """What of each file system was taken when everything was dead."""
    log_omitted_bytes: Count


class FileHeader(Record):
    """An output file about to come."""

    name: Annotated[str, Field(max_length=500)]
    bytes: Count


class Skipped(Record):
    """What of the output PID 1 left out, counted by reason."""

    skipped: dict[str, Count]


class Go(Record):
    """What PID 1 is told once its walls are proven."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    limits: Limits
    collect: bool
    channel: bool


class LinkEnded(SandboxError):
    """PID 1 closed the link, or died; after go that is the end of a run like any other."""


class LinkBroken(SandboxError):
    """PID 1 sent what it never sends."""


class Listener:
    """The socket in a run's directory at which exactly one PID 1 arrives."""

    def __init__(self, run_directory: Path) -> None:
        self._directory: int | None = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A socket's address holds 107 bytes; the way through /proc is short however deep we are.
        try:
            self._socket.bind(f"/proc/self/fd/{self._directory}/link.sock")
        except PermissionError as error:
            self._socket.close()
            os.close(self._directory)
            problem = f"{run_directory} lies on a file system that has no sockets"
            raise SandboxError(problem, LOCAL_DISK) from error
        # The box's user is not ours.
        os.chmod("link.sock", 0o666, dir_fd=self._directory)  # noqa: S103
        self._socket.listen(1)  # for PID 1 and nobody else

    def accept(self, timeout_seconds: float) -> "Link | None":
        """Return the link to PID 1 and listen no more, or None when nobody came in time."""
        self._socket.settimeout(timeout_seconds)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        self.close()  # before the program exists: it finds no socket to speak at
        return Link(connection)

    def close(self) -> None:
        """Close and remove the socket, so that nobody else can arrive; may be called again."""
        self._socket.close()
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink("link.sock", dir_fd=self._directory)
            os.close(self._directory)
            self._directory = None


class Link:
    """Frames from and to one PID 1."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def peer(self) -> tuple[int, int]:
        """Return PID 1's process id and user as the kernel of this host tells them.

        The process id is 0 when it is in no namespace of ours.
        """
        size = struct.calcsize("iII")
        raw = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, user, _ = struct.unpack("iII", raw)
        return pid, user

    def send_go(self, go: Go, channel: socket.socket | None) -> None:
        """Let the program start, handing over the channel's end if there is one.

        Raises:
            LinkEnded: PID 1 is gone.
        """
        payload = go.model_dump_json().encode()
        frame = b"G" + struct.pack(">I", len(payload)) + payload
        # PID 1 waits for this; the host must not wait for one that somebody stopped.
        self._connection.settimeout(10)
        try:
            if channel is not None:
                frame = frame[socket.send_fds(self._connection, [frame], [channel.fileno()]) :]
            if frame:  # a box may be over by now, and even nothing cannot be sent to one that is
                self._connection.sendall(frame)
        except OSError as error:
            raise LinkEnded(f"PID 1 of the box was lost before its program: {error}") from error

    def send_stop(self) -> None:
        """Tell PID 1 to end the program; one that is gone already needs no telling."""
        with contextlib.suppress(OSError):
            self._connection.sendall(b"S" + struct.pack(">I", 0))

    def receive(self, deadline: float) -> tuple[bytes, bytes] | None:
        """Return the next frame's kind and payload, or None at the deadline.

        Args:
            deadline: a time on the monotonic clock.

        Raises:
            LinkEnded: PID 1 is gone.
            LinkBroken: the frame is unknown or too large.
        """
        while True:
            frame = self._take_frame()
            if frame is not None:
                return frame
            left = deadline - time.monotonic()
            if left <= 0 or not is_readable(self._connection.fileno(), left):
                return None
            try:
                piece = self._connection.recv(2**18)
            except ConnectionError as error:
                raise LinkEnded(f"PID 1 of the box was lost: {error}") from error
            if not piece:
                raise LinkEnded("PID 1 of the box was lost: end of file")
            self._received += piece

    def expect(self, kind: bytes, deadline: float) -> bytes:
        """Return the payload of the next frame, which must be of this kind.

        Raises:
            LinkEnded: PID 1 is gone.
            LinkBroken: another frame came, or none in time.
        """
        frame = self.receive(deadline)
        if frame is None:
            raise LinkBroken(f"PID 1 did not send its {kind.decode()} frame in time")
        if frame[0] != kind:
            raise LinkBroken(f"PID 1 sent frame {frame[0]!r} instead of {kind!r}")
        return frame[1]

    def shut(self) -> None:
        """End the link from another thread; PID 1 then ends its box."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the link; PID 1 then ends its box."""
        self._connection.close()

    def _take_frame(self) -> tuple[bytes, bytes] | None:
        if len(self._received) < 5:
            return None
        kind = bytes(self._received[:1])
        length = int.from_bytes(self._received[1:5], "big")
        if length > MAX_FRAME_BYTES.get(kind, -1):
            raise LinkBroken(f"PID 1 sent an impossible frame: {kind!r} of {length} bytes")
        if len(self._received) < 5 + length:
            return None
        payload = bytes(self._received[5 : 5 + length])
        del self._received[: 5 + length]
        return kind, payload


def parse(kind: type[Kind], payload: bytes) -> Kind:
    """Return a message checked against its model.

    Raises:
        LinkBroken: it is something else.
    """
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        raise LinkBroken(f"PID 1 sent a wrong {kind.__name__}: {error}"[:1000]) from error
