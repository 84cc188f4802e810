"""Writes wherever a bad path would lead."""

import os

written = []
for directory in ("/", "/workspace", "/nightlab", "/usr", "/etc", "/root", "/home", "/var/tmp",
                  "/run", "/sys/fs/cgroup", "/proc/sys/kernel", "/opt", "/srv", "/dev"):
    try:
        with open(f"{directory}/planted", "w"):
            written.append(directory)
    except OSError:
        pass
for path in ("/nightlab/supervisor.py", "/workspace/train.py", "/etc/passwd", "/etc/hosts",
             "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"):
    try:
        with open(path, "a"):
            written.append(path)
    except OSError:
        pass
try:
    os.mknod("/tmp/disk", 0o060666, os.makedev(254, 0))
    written.append("a device")
except OSError:
    pass
print(written)
raise SystemExit(len(written))
