"""Has PID 1 killed for memory in its place: it becomes something small, and files take it all."""

import os

with open("/proc/self/oom_score_adj", "w") as file:
    file.write("0")
os.execvp("dd", ["dd", "if=/dev/zero", "of=/tmp/hoard", "bs=64k"])
