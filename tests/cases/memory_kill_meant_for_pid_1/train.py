"""Fills the box's memory with a file that no process maps, so that PID 1 is the largest process."""

import os
from pathlib import Path

Path("/proc/self/oom_score_adj").write_text("0")
nameless = os.memfd_create("hog", 0)
os.execvp("dd", ["dd", "if=/dev/zero", f"of=/proc/self/fd/{nameless}", "bs=64k"])
