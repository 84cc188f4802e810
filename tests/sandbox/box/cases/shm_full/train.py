"""Touches more shared memory than there is, and dies of a bus error."""

import mmap

with open("/dev/shm/batch", "wb+") as file:
    file.truncate(12 * 2**20)
    shared = mmap.mmap(file.fileno(), 12 * 2**20)
    for at in range(0, len(shared), 4096):
        shared[at] = 1
