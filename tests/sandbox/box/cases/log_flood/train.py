"""Writes 200 MB of lines."""

import os

line = b"x" * 99 + b"\n"
for _ in range(2000):
    os.write(1, line * 1000)
os.write(1, b"the end\n")
