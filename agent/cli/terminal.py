"""Output that outlives the terminal or pipe it goes to.

A night must not end because the window was closed that it was started from, and its exit code must
not come to mean something else because `head` had read enough. Once nobody reads any more, what is
written goes nowhere.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

READER_IS_GONE = (errno.EPIPE, errno.EIO)
"""What the kernel says of a pipe without a reader, and of a terminal that hung up."""


class _Outliving(io.FileIO):
    """A standard descriptor, made to stand for the null device when its reader goes away."""

    def write(self, piece: Buffer, /) -> int:
        try:
            return super().write(piece)
        except OSError as error:
            if error.errno not in READER_IS_GONE:
                raise
            _point_at_nothing(self.fileno())
            return memoryview(piece).nbytes


def outlive_readers() -> None:
    """Let no write to the standard output or error fail for want of a reader.

    A stream that the caller had closed is opened on the null device: else the next file to be
    opened, a ledger perhaps, takes the place of the standard output.
    """
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        _point_at_nothing(descriptor)
    sys.stdout, sys.stderr = _outliving(sys.stdout, 1), _outliving(sys.stderr, 2)


@contextmanager
def outlive_hang_up() -> Iterator[None]:
    """Go on when the terminal hangs up, as if started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _outliving(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream over again; one that Python found closed is none."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outliving(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        # What a terminal cannot show is shown as `?`: a night never depends on a screen.
        errors="replace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )


def _point_at_nothing(descriptor: int) -> None:
    """Let the number stand for the null device, here and in the processes started from here."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if nothing == descriptor:
        os.set_inheritable(nothing, True)
        return
    os.dup2(nothing, descriptor)
    os.close(nothing)
