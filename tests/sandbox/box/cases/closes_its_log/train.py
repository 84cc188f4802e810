"""Closes both streams and works on."""

import os
import time

os.close(1)
os.close(2)
time.sleep(0.5)
open("/out/result", "w").write("worked on")
