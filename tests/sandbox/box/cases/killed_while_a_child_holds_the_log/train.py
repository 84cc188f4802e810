"""Is killed while a child in a session of its own keeps the log open."""

import os
import signal
import time

if os.fork() == 0:
    os.setsid()
    print("child holds on", flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
