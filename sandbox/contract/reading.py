"""Reads a file that a person names, within a bound."""

import os
import stat
from pathlib import Path

from sandbox.contract.errors import UsageError

MAX_TEXT_BYTES = 256 * 1024
"""Of program.md and what lies beside it: a few pages of prose."""
MAX_SCRIPT_BYTES = 16 * 2**20
"""Of a person's prepare.py or evaluate.py, with whatever stands in it."""


def read_named(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a plain file; links are followed, since the person made them.

    Raises:
        OSError: it cannot be read.
        UsageError: it is larger, or a device or a pipe, which may have no end.
    """
    # Without blocking: to open a pipe that nobody writes to would wait for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{path}: not a plain file", "name a file; a copy of it will do")
        content = file.read(limit_bytes + 1)  # it may grow: its size of now bounds nothing
    if len(content) > limit_bytes:
        hint = "name another file, or make it smaller"
        raise UsageError(f"{path}: larger than {limit_bytes // 1024:,} KiB", hint)
    return content
