"""Loses a child to the memory limit and gives up, as a DataLoader does."""

import os

child = os.fork()
if child == 0:
    hoard = []
    while True:
        hoard.append(bytearray(8 * 2**20))
_, status = os.waitpid(child, 0)
print("child ended by signal", os.WTERMSIG(status), flush=True)
raise RuntimeError("DataLoader worker is killed by signal: Killed.")
