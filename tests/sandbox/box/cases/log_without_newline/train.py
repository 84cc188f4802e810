"""Writes one line of 20 MB."""

import sys

for _ in range(20):
    sys.stdout.write("y" * 1_000_000)
