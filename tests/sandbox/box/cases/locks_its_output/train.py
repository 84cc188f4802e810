"""Takes every right to its output directory away, also from PID 1, which has the same user."""

import os

with open("/out/checkpoint", "w") as file:
    file.write("weights")
os.mkdir("/out/inner")
os.chmod("/out/inner", 0)
os.chmod("/out", 0)
