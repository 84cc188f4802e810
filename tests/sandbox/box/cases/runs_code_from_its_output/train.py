"""Runs a program from /out, which is not executable, and from /tmp, which is."""

import os
import shutil
import subprocess

for place in ("/out", "/dev/shm", "/tmp"):
    shutil.copy("/bin/true", f"{place}/program")
    os.chmod(f"{place}/program", 0o6755)
    try:
        print(place, subprocess.run([f"{place}/program"]).returncode)
    except PermissionError:
        print(place, "refused")
