"""Writes a line of a gigabyte."""

import os

piece = b"z" * 2**20
for _ in range(1024):
    left = memoryview(piece)
    while left:
        left = left[os.write(1, left) :]
