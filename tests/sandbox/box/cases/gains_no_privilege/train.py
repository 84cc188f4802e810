"""Runs whatever is setuid and looks whether that made it somebody else."""

import os
import subprocess

before, gained = os.getresuid() + os.getresgid(), []
for program in ("/bin/su", "/usr/bin/passwd", "/bin/mount", "/usr/bin/newgrp"):
    if os.path.exists(program):
        subprocess.run([program, "--help"], capture_output=True, timeout=2)
for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]),
                lambda: os.nice(-5), lambda: os.chroot("/tmp"),
                lambda: os.sethostname("x") if hasattr(os, "sethostname") else os.setuid(0)):
    try:
        attempt()
        gained.append("yes")
    except OSError:
        pass
print(gained, before == os.getresuid() + os.getresgid(), 0 in before)
raise SystemExit(len(gained))
