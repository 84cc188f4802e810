"""Loses a child to the memory limit and goes on."""

import os

child = os.fork()
if child == 0:
    hoard = []
    while True:
        hoard.append(bytearray(8 * 2**20))
_, status = os.waitpid(child, 0)
print("child ended by signal", os.WTERMSIG(status), flush=True)
