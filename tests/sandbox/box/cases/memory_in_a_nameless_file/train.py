"""Hides memory in files without a name."""

import os

while True:
    hoard = os.memfd_create("hoard")
    for _ in range(8):
        os.write(hoard, bytes(2**20))
