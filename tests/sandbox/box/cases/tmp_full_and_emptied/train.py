"""Fills /tmp, notices it, makes room, and fails later for another reason."""

import contextlib
import os
import time

with contextlib.suppress(OSError), open("/tmp/cache", "wb", buffering=0) as file:
    while file.write(bytes(2**16)):
        pass
time.sleep(0.2)  # so that PID 1 sees it full
os.unlink("/tmp/cache")
raise ValueError("of its own making")
