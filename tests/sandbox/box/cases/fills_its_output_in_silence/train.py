"""Fills its output and gives up without a word of why."""

import contextlib
import os

fd = os.open("/out/checkpoint", os.O_CREAT | os.O_WRONLY)
with contextlib.suppress(OSError):
    while True:
        os.write(fd, bytes(2**16))
raise SystemExit(1)
