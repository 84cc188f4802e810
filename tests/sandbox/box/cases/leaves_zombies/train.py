"""Fills its process table with the dead and ends well."""

import os

for _ in range(24):
    if os.fork() == 0:
        os._exit(0)
print("done")
