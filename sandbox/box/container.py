"""One container: asked for, killed, removed, whatever hangs.

A container can make every answer about it hang, and the engine with it. So nothing here is asked
without a time limit, and death is brought by the host's kernel first: PID 1 is held by a
descriptor, which cannot come to mean another process. What survives even that is an error of its
own kind, since its devices must not be used again.
"""

import contextlib
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import docker
import docker.errors
import requests

from sandbox.box.hardening import Settings
from sandbox.box.link import Counters
from sandbox.box.reaper import GONE_OR_GOING, lift_cpu_limit
from sandbox.box.supervisor import Cgroup
from sandbox.contract.errors import (
    ContainerUnkillable,
    EngineUnavailable,
    LimitNotEnforced,
)
from sandbox.contract.log import log
from sandbox.engine.host import is_readable
from sandbox.gpu.request import TOOLKIT_HINT

REMOVAL_PAUSES_SECONDS = (0.1, 1.0)
FAILED_CALLS = requests.RequestException
"""The SDK's own APIError is one of them."""

ANOTHER_PLACE = (
    "the engine does not see nightlab's directory under its path. Where nightlab runs in a "
    "container itself, mount a directory of the host at the same path there (`-v /srv/n:/srv/n`) "
    "and name it in NIGHTLAB_HOME; `nightlab setup` tries it"
)
HINTS = (
    ("executable file not found", "the image needs a `python3` on its PATH"),
    ("could not select device driver", TOOLKIT_HINT),
    ("Range of CPUs", "lower cpus in program.md to what this machine has"),
    ("rlimit type 7", "lower open_files in program.md: this machine allows less (fs.nr_open)"),
    ("rlimit type 4", "raise the hard limit of core to 1 for the engine's user (LimitCORE=1)"),
    ("bind source path does not exist", ANOTHER_PLACE),
    ("supervisor.py': [Errno 2]", ANOTHER_PLACE),
    (
        "supervisor.py': [Errno 13]",
        "boxes may not read nightlab's directory: name another in NIGHTLAB_HOME, on a local disk; "
        "under SELinux one that containers may read (`chcon -Rt container_file_t`)",
    ),
    (
        "no space left on device",
        "the disk of the engine's own data is full: `docker system df` says of what",
    ),
)
"""What to do next, by what the engine or PID 1 said when a box did not start."""


def hint_for(words: str) -> str:
    """Return what to do about an engine that starts no box; empty where its words are not known."""
    return next((hint for said, hint in HINTS if said in words), "")


class Container:
    """A box's container on its engine, and its PID 1 as this host's kernel knows it.

    Args:
        client: of the engine; used by one thread.
        name: of the container.
        death_seconds: how long it may take to be gone once it is killed.
    """

    def __init__(self, client: docker.APIClient, name: str, death_seconds: float) -> None:
        self.name = name
        self.may_come_late = False
        """The engine was asked for the container and never said that it is gone."""
        self.pid = 0
        """PID 1's process id on this host; 0 where it has none."""
        self._client = client
        self._death_seconds = death_seconds
        self._is_made = False
        self._is_unkillable = False
        self._init: int | None = None
        self._quota = CpuQuota(0)
        self._memory_group: Path | None = None

    def create(self, settings: Settings) -> None:
        """Create the container; an engine that warns has dropped a limit."""
        self.may_come_late = True
        try:
            # The SDK's friendlier calls throw the engine's warnings away.
            created = self._client.create_container_from_config(  # type: ignore[no-untyped-call]
                settings, self.name
            )
        except docker.errors.APIError:
            self.may_come_late = False  # a refusal is an answer
            raise
        self._is_made = True
        # With a warning the engine says that it left out what it cannot do, and goes on.
        if created.get("Warnings"):
            raise LimitNotEnforced(f"the engine warns: {created['Warnings']}"[:1000])

    def start(self) -> None:
        """Start it."""
        self._client.start(self.name)

    def hold(self, pid: int) -> None:
        """Take hold of PID 1, so that it can be killed without the engine.

        Args:
            pid: as this host sees it; 0 when it is in no pid namespace of ours.
        """
        self.pid = pid
        with contextlib.suppress(OSError):  # it is gone already
            self._init = os.pidfd_open(pid) if pid > 0 else None
        self._quota = CpuQuota(pid)
        found = group_of(pid, "memory")
        self._memory_group = found and found[0]

    def counters(self) -> Counters | None:
        """Return what the host's kernel counted of the box; None where it cannot be seen from here.

        It outlives PID 1 by what the engine takes to notice, so it is asked at once.
        """
        if self._memory_group is None:
            return None
        counted = Cgroup(str(self._memory_group)).counters()
        return Counters.model_validate(counted) if self._memory_group.exists() else None

    def inspect(self) -> dict[str, Any]:
        """Return what the engine recorded of it."""
        return dict(self._client.inspect_container(self.name))

    def last_lines(self) -> str:
        """Return the end of what PID 1 printed; it prints only when it cannot reach the link."""
        return str(self._client.logs(self.name, tail=20)[-2000:].decode(errors="replace"))

    def end_state(self) -> dict[str, Any]:
        """Return the engine's own view of a container whose PID 1 said nothing."""
        self._is_gone(self._death_seconds)
        # The engine notices a death a little later than the kernel.
        self._client.wait(self.name, timeout=math.ceil(self._death_seconds))
        state = self.inspect()["State"]
        names = ("Status", "ExitCode", "OOMKilled", "Error", "StartedAt", "FinishedAt")
        return {name: state.get(name) for name in names}

    @property
    def can_lift(self) -> bool:
        """Whether this process may lift the box's CPU limit itself, which costs nothing."""
        return self._quota.is_in_reach

    def lift(self) -> None:
        """Give the box every CPU to die with: by the host's kernel, else through the engine."""
        if not self._quota.lift():
            lift_cpu_limit(self._client, self.name)

    def end_now(self) -> bool:
        """Kill PID 1 at once, from any thread; False where it is out of the kernel's reach."""
        with contextlib.suppress(OSError):
            if self._init is not None:
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
                return True
        return False

    def kill(self) -> None:
        """Kill PID 1 and so its whole pid namespace: by the host's kernel first, then the engine.

        Raises:
            ContainerUnkillable: neither took.
        """
        # The kernel's way needs no engine, whose calls a container can make hang.
        log.info("container_killed", container=self.name)
        if self.end_now() and self._is_gone(self._death_seconds):
            return
        with contextlib.suppress(FAILED_CALLS):
            self._client.kill(self.name)
        if self._init is not None and not self._is_gone(self._death_seconds):
            self._is_unkillable = True
            raise self._unkillable()

    def remove(self) -> None:
        """Make sure that nothing of it is left.

        Raises:
            ContainerUnkillable: it lives on.
            EngineUnavailable: it is dead, and the engine keeps it.
        """
        try:
            self._remove()
        finally:
            self._quota.close()
            if self._init is not None:
                os.close(self._init)

    def _remove(self) -> None:
        if self._init is not None and not self._is_unkillable and not self._is_gone(0.5):
            self.lift()
            with contextlib.suppress(ContainerUnkillable):  # the engine's removal may still do it
                self.kill()
        # What lives on inside the kernel is not removed by asking again.
        for pause_seconds in () if self._is_unkillable else REMOVAL_PAUSES_SECONDS:
            try:
                return self._ask_to_remove()
            except FAILED_CALLS as error:
                call, why = "remove_container", type(error).__name__
                log.warning("engine_call_retried", call=call, container=self.name, error=why)
            time.sleep(pause_seconds)
        try:
            self._ask_to_remove()
        except FAILED_CALLS as error:
            if self._init is None or self._is_gone(0):
                problem = f"the engine did not remove a container: {error}"
                raise EngineUnavailable(problem) from error
            raise self._unkillable() from error

    def _ask_to_remove(self) -> None:
        """Remove the container; it may also be gone, or somebody else may be removing it."""
        try:
            self._client.remove_container(self.name, v=True, force=True)
        except docker.errors.APIError as error:
            if error.status_code not in GONE_OR_GOING:
                raise
            if error.status_code == 409 or not self._is_made:
                return  # one that is being made may still come
        self.may_come_late = False

    def _is_gone(self, seconds: float) -> bool:
        """Tell whether PID 1 ends in time; the kernel says so once all of its namespace has."""
        return self._init is not None and is_readable(self._init, seconds)

    def _unkillable(self) -> ContainerUnkillable:
        return ContainerUnkillable(
            f"container {self.name} was killed and lives on, inside the kernel",
            "look at it with `docker inspect` and at the kernel's log; a restart of the machine "
            "ends it, and the next start of nightlab removes what is left",
        )


class CpuQuota:
    """The file that bounds one box's CPU time, open as long as the box lives.

    Whoever dies does it on the box's own CPU time. Hundreds of processes that fork without end
    spend it far in advance, inside the kernel, and PID 1 and its death then wait for seconds. The
    engine can lift the limit too, but needs processes of its own for that, on the same busy machine
    (docs/decisions/0006).

    Args:
        pid: PID 1 as this host sees it, 0 for none; its cgroup cannot be mistaken while it lives.
    """

    def __init__(self, pid: int) -> None:
        self._file: int | None = None
        self._unbounded = b""
        try:
            if (found := group_of(pid, "cpu")) is not None:
                name, unbounded = ("cpu.max", b"max") if found[1] else ("cpu.cfs_quota_us", b"-1")
                self._unbounded = unbounded
                # Opened now: at the deadline the way there may be long, and the box is in debt.
                self._file = os.open(found[0] / name, os.O_WRONLY | os.O_CLOEXEC)
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


def group_of(pid: int, controller: str) -> tuple[Path, bool] | None:
    """Return where a process is counted, as `group_place` does; None also when it is gone."""
    with contextlib.suppress(OSError):
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        return group_place(groups, Path("/proc/self/mountinfo").read_text(), controller)
    return None


def group_place(groups: str, mounts: str, controller: str) -> tuple[Path, bool] | None:
    """Return the directory of a process's cgroup, and whether it is of version 2; None: not seen.

    Args:
        groups: the text of the process's `cgroup` file in /proc.
        mounts: the text of this process's `mountinfo`.
        controller: what the directory bounds and counts.
    """
    found = None
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = _mounted(mounts, "cgroup", controller)
            return None if root is None else (root / path.lstrip("/"), False)
        if not controllers and (root := _mounted(mounts, "cgroup2", "")):
            found = root / path.lstrip("/"), True
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
