"""Sends itself the signal of a polite shutdown."""

import os
import signal

os.kill(os.getpid(), signal.SIGTERM)
