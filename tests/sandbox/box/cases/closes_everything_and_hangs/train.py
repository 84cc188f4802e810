"""Closes every file it has and sleeps in silence."""

import os
import time

os.closerange(0, 128)
time.sleep(60)
