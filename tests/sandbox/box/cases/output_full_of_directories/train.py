"""Makes directories in its output until there is room for none."""

import os

for number in range(100_000):
    os.mkdir(f"/out/{number}")
