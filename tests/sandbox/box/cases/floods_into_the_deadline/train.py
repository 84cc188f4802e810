"""Writes for ever, as fast as it can."""

import os

while True:
    os.write(1, b"z" * 65536)
