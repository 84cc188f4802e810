"""Hangs with children that ignore signals and spin."""

import os
import signal
import time

for _ in range(8):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
time.sleep(60)
