"""Leaves a daemon in a session of its own, holding the log open, and exits."""

import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("still here", flush=True)
        time.sleep(60)
    os._exit(0)
time.sleep(0.3)
print("parent done")
