"""Lifts a box's CPU limit through the host's kernel.

Whoever dies does it on the box's own CPU time. Hundreds of processes that fork without end spend it
far in advance, inside the kernel, and PID 1 and its death then wait for seconds. The engine can
lift the limit too, but it needs processes of its own for that, on the same busy machine
(docs/decisions/0006).
"""

import contextlib
import os
from pathlib import Path


class CpuQuota:
    """The file that bounds one box's CPU time, open as long as the box lives.

    Args:
        pid: PID 1 as this host sees it, 0 for none; its cgroup cannot be mistaken while it lives.
    """

    def __init__(self, pid: int) -> None:
        self._file: int | None = None
        self._unbounded = b""
        try:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
            place = quota_place(groups, Path("/proc/self/mountinfo").read_text())
            if place is not None:
                self._unbounded = place[1].encode()
                # Opened now: at the deadline the way there may be long, and the box is in debt.
                self._file = os.open(place[0], os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return  # not root, or a cgroup that is not to be seen from here: the engine must do

    @property
    def is_in_reach(self) -> bool:
        """Whether this process may lift the limit."""
        return self._file is not None

    def lift(self) -> bool:
        """Give the box every CPU; False when that was not possible."""
        with contextlib.suppress(OSError):
            return self._file is not None and os.pwrite(self._file, self._unbounded, 0) > 0
        return False

    def close(self) -> None:
        """Let go of the file; safe to call again."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def quota_place(groups: str, mounts: str) -> tuple[Path, str] | None:
    """Return the file with a process's CPU limit and the word for "none"; None where none is seen.

    Args:
        groups: the text of the process's `cgroup` file in /proc.
        mounts: the text of this process's `mountinfo`.
    """
    found = None
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            root = _mounted(mounts, "cgroup", "cpu")
            return None if root is None else (root / path.lstrip("/") / "cpu.cfs_quota_us", "-1")
        if not controllers and (root := _mounted(mounts, "cgroup2", "")):
            found = root / path.lstrip("/") / "cpu.max", "max"
    return found


def _mounted(mounts: str, kind: str, option: str) -> Path | None:
    """Return where the whole of a cgroup hierarchy is mounted."""
    for line in mounts.splitlines():
        here, there = line.split(" - ", 1)
        root, place = here.split()[3:5]
        words = there.split()
        if words[0] == kind and root == "/" and (not option or option in words[2].split(",")):
            return Path(place)
    return None
