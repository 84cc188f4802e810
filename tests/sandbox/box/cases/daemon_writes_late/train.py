"""Leaves a child that writes output after the main process has ended."""

import os
import time

if os.fork() == 0:
    os.setsid()
    time.sleep(0.5)
    with open("/out/late", "w") as file:
        file.write("written after the end")
    os._exit(0)
