"""Stops and kills all that it can reach, PID 1 by name too, with every signal there is."""

import contextlib
import os
import signal
import time

for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
for number in signal.Signals:
    with contextlib.suppress(OSError):
        os.kill(1, number)
if os.fork() == 0:
    for number in signal.Signals:
        with contextlib.suppress(OSError):
            os.kill(1, number)
    os.kill(-1, signal.SIGSTOP)
    os._exit(0)
time.sleep(60)
