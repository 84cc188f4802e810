"""Ends while others go on swapping what its output's names mean."""

import os
import time

os.chdir("/out")
open("steady", "w").write("weights")
os.mkdir("folder")
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        me = str(os.getpid())
        while True:
            os.symlink("/etc/passwd", "link" + me)
            os.replace("link" + me, "swapped")
            os.mkfifo("pipe" + me)
            os.replace("pipe" + me, "swapped")
time.sleep(0.3)
