"""Touches more of a mapped file than /tmp has room for, and dies of a bus error."""

import mmap
import os

room = os.statvfs("/tmp")
size = room.f_blocks * room.f_frsize
with open("/tmp/other", "wb") as other:
    other.write(bytes(size // 2))
with open("/tmp/batch", "wb+") as file:
    file.truncate(size)
    shared = mmap.mmap(file.fileno(), size)
    for at in range(0, size, 4096):
        shared[at] = 1
