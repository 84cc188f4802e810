"""Sits just below its memory limit and reads the disk through what is left."""

import glob

limit = int(__import__("os").environ.get("LIMIT", 128 * 2**20))
hoard = bytearray(limit - 24 * 2**20)
while True:
    for at in range(0, len(hoard), 4096):
        hoard[at] = 1
    for name in glob.glob("/usr/lib/python3*/**/*.py", recursive=True):
        open(name, "rb").read()
