"""Ends, and does not end."""

import atexit
import time

atexit.register(time.sleep, 60)
