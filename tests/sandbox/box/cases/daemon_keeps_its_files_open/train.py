"""Ends while a thread and a child still write the checkpoint."""

import os
import time

with open("/out/steady", "w") as file:
    file.write("complete")
if os.fork() == 0:
    os.setsid()
    with open("/out/growing", "wb") as file:
        while True:
            file.write(b"x" * 100)
            file.flush()
            file.seek(0)
while not os.path.exists("/out/growing"):
    time.sleep(0.01)
