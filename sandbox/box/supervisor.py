"""PID 1 of every box: starts, bounds, reaps and reports.

Standard library only, any Python from 3.8 on, and only modules that load in a few milliseconds.
It is the one process in the box that nightlab trusts, and it runs as the same user as the program
that it watches. What protects it: it is init of its pid namespace (no signal from inside stops
it), it is not dumpable (nobody opens its memory, environment or file descriptors), and it holds
the link before the program exists.

The link is a Unix stream socket to the host. Both sides send frames: one byte of kind, four bytes
of length (big endian), the payload. An end of file on the link means that the controller is dead.

    from PID 1     H  JSON: what PID 1 sees of its walls, once, before anything else
                   L  bytes: a piece of the log while it comes; dropped when the host is late
                   X  JSON: the program has ended and every other process of the box is dead
                   T  bytes: the log's head, then its tail (the same kind, sent twice)
                   F  JSON: the name and size of an output file; its bytes follow in D frames
                   D  bytes: a piece of the output file announced last
                   E  JSON: what of the output was skipped, and why; nothing follows
    from the host  G  JSON: go; with it travels, if any, the channel's file descriptor
                   S  empty: stop; the program is ended as at its deadline, and reported
"""

# pathlib takes longer to load than most of what is here together:
# ruff: noqa: PTH112, PTH115, PTH116, PTH123, PTH208

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time

TYPE_CHECKING = False
LINK_PATH = "/nightlab/link.sock"
OUTPUT_PATH = "/out"
BOUNDED_PATHS = ("/out", "/tmp", "/dev/shm")  # noqa: S108 - the box's own, mounted by us
CGROUP_PATH = "/sys/fs/cgroup"
CHANNEL_FD = 3
# What the kernel counts and shows of the whole machine: two boxes could talk by moving it.
HIDDEN_IN_PROC = (
    "acpi asound buddyinfo cgroups diskstats fs interrupts irq kallsyms kcore key-users "
    "keys kpagecgroup kpagecount kpageflags latency_stats loadavg locks mdstat meminfo "
    "pagetypeinfo partitions pressure sched_debug schedstat scsi slabinfo softirqs stat "
    "swaps timer_list timer_stats tty uptime vmallocinfo vmstat zoneinfo sys/fs "
    "sys/kernel/pty sys/debug"
)
HIDDEN_IN_SYS = (
    "block class/thermal devices/virtual/bdi devices/virtual/powercap firmware fs/bcache "
    "fs/btrfs fs/ext4 fs/f2fs fs/fuse fs/nfs fs/pstore fs/xfs fs/zfs kernel"
)
HIDDEN_PATHS = (
    *("/proc/" + name for name in HIDDEN_IN_PROC.split()),
    *("/sys/" + name for name in HIDDEN_IN_SYS.split()),
)
"""Each is hidden behind an empty file or directory, whatever a machine has of them."""
COUNTED_BELOW = (
    ("/sys/devices/system/node", ("meminfo", "numastat", "vmstat")),
    ("/sys/devices/system/cpu", ("cpuidle",)),
    ("/sys/dev/block", ("stat", "inflight")),
)
"""More of these in each directory there, named by what a machine has."""
RLIMITS = ("core", "fsize", "nofile", "nice", "rtprio", "cpu", "data", "nproc")
GPU_NAMES = ("nvidia", "dri", "kfd")
GPU_DRIVER_PATH = "/proc/driver/nvidia/gpus"
MOST_GPU_NODES = 256
HANDSHAKE_SECONDS = 120.0
"""Longer than the host takes from our proof to go, with an engine at its slowest."""
SEND_SECONDS = 60.0
REAP_SECONDS = 5.0
REAP_AT_ONCE = 64
KILL_AGAIN_SECONDS = 0.05
TICK_SECONDS = 0.05
SHORTEST_TICK_SECONDS = 0.002
FILL_BYTES_PER_SECOND = 8e9
"""Faster than a program fills a file system: how soon to look again follows from what is free."""
NICENESS = 10
"""Counts inside the box's own cgroup: PID 1 gets its turn when the program spins. Not 19: a busy
PID 1 would then take most of the box's share of a machine with neighbours."""
PIECE_BYTES = 65536
FILE_PIECE_BYTES = 262144
QUEUE_BYTES = 262144
FORWARD_BYTES = 131072
"""Most of the log forwarded in one tick; a flood is kept and counted, not shown."""
GO_BYTES = 1048576
PIPE_BYTES = 1048576
OUTPUT_DEPTH = 4
OUTPUT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\Z")
PR_SET_DUMPABLE = 4
if TYPE_CHECKING:  # typing takes milliseconds to load
    from typing import Any, NoReturn

    Go = dict[str, Any]

NO_LIMIT = 2**62  # what cgroup v1 writes for "none" is just below 2**63


def prctl(option: int, value: int) -> None:
    """Call prctl(2), which Python does not offer."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def read_text(path: str) -> str | None:
    """Return a small file's text, or None where there is none."""
    try:
        with open(path) as file:
            return file.read(PIECE_BYTES)
    except OSError:
        return None


class Cgroup:
    """The kernel's accounts of this box, version 1 or 2."""

    def __init__(self, root: str) -> None:
        self.root = root

    def number(self, *names: str) -> int | None:
        """Return the first of these files that holds a number; "max" and "none" are None."""
        for name in names:
            text = read_text(self.root + "/" + name)
            if text is not None and text.strip().isdigit():
                number = int(text)
                return number if number < NO_LIMIT else None
        return None

    def counter(self, counter: str, *names: str) -> int | None:
        """Return one line's number from the first of these files that has it."""
        for name in names:
            for line in (read_text(self.root + "/" + name) or "").splitlines():
                words = line.split()
                if len(words) == 2 and words[0] == counter:
                    return int(words[1])
        return None

    def cpu_limit(self) -> float | None:
        """Return the CPUs that the scheduler grants, or None without a bound."""
        words = (read_text(self.root + "/cpu.max") or "").split()
        if len(words) == 2 and words[0] != "max":
            return int(words[0]) / int(words[1])
        quota = self.number("cpu/cpu.cfs_quota_us", "cpu,cpuacct/cpu.cfs_quota_us")
        period = self.number("cpu/cpu.cfs_period_us", "cpu,cpuacct/cpu.cfs_period_us")
        return quota / period if quota and period else None

    def limits(self) -> dict[str, object]:
        """Return the bounds that the kernel holds; None for one that is missing."""
        memory, swap = self.number("memory.max"), self.number("memory.swap.max")
        both = self.number("memory/memory.memsw.limit_in_bytes")
        if memory is not None and swap is not None:
            both = memory + swap
        return {
            "memory_bytes": self.number("memory.max", "memory/memory.limit_in_bytes"),
            "memory_and_swap_bytes": both,
            "pids": self.number("pids.max", "pids/pids.max"),
            "cpus": self.cpu_limit(),
        }

    def cpu_seconds(self) -> float | None:
        """Return the CPU time used by everything in the box."""
        microseconds = self.counter("usage_usec", "cpu.stat")
        if microseconds is not None:
            return microseconds / 1e6
        nanoseconds = self.number("cpuacct/cpuacct.usage", "cpu,cpuacct/cpuacct.usage")
        return None if nanoseconds is None else nanoseconds / 1e9

    def counters(self) -> dict[str, object]:
        """Return what the kernel counted; a file that is not there counts nothing.

        On the host, version 1 has each controller's files below a root of its own.
        """
        # Not "max" of version 2: whoever reads files is at the limit and has room.
        hits = self.counter("oom", "memory.events")
        if hits is None:  # new kernels do not count it on version 1
            hits = self.number("memory/memory.failcnt", "memory.failcnt") or None
        events = ("memory.events", "memory/memory.oom_control", "memory.oom_control")
        peak = ("memory.peak", "memory/memory.max_usage_in_bytes", "memory.max_usage_in_bytes")
        return {
            "oom_kills": self.counter("oom_kill", *events) or 0,
            "oom_group_kills": self.counter("oom_group_kill", "memory.events") or 0,
            "memory_limit_hits": hits,
            "peak_memory_bytes": self.number(*peak),
            "pids_refused": self.counter("max", "pids.events", "pids/pids.events") or 0,
            "cpu_seconds": self.cpu_seconds(),
        }


# --- what PID 1 sees of its walls -------------------------------------------------------------


def identity() -> dict[str, object]:
    """Return users, groups, capability sets and the other lines of the process status."""
    lines = (line.split(":", 1) for line in (read_text("/proc/self/status") or "").splitlines())
    status = {key: value.split() for key, value in lines}
    return {
        "pid": os.getpid(),
        "uids": [int(uid) for uid in status["Uid"]],
        "gids": [int(gid) for gid in status["Gid"]],
        "groups": [int(group) for group in status["Groups"]],
        "capabilities": {
            name: int(status[name][0], 16)
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        },
        "no_new_privileges": int(status["NoNewPrivs"][0]),
        "seccomp": int(status["Seccomp"][0]),
    }


def mounts() -> list[dict[str, object]]:
    """Return every mount: where, of which type, with which options."""
    found: list[dict[str, object]] = []
    for line in (read_text("/proc/self/mountinfo") or "").splitlines():
        fields, kind = line.split(" - ", 1)
        words = fields.split()
        found.append({"target": words[4], "type": kind.split()[0], "options": words[5].split(",")})
    return found


def gpu_nodes() -> dict[str, tuple[int, int]]:
    """Return the number of each device node that is a GPU's, by its path below /dev."""
    names = [name for name in os.listdir("/dev") if name.startswith(GPU_NAMES)]
    folders = [name for name in names if os.path.isdir("/dev/" + name)]
    names += [folder + "/" + name for folder in folders for name in os.listdir("/dev/" + folder)]
    found = {}
    for name in sorted(names)[:MOST_GPU_NODES]:
        about = os.stat("/dev/" + name, follow_symlinks=False)
        if about.st_mode >> 12 == 0o02:
            found[name] = (os.major(about.st_rdev), os.minor(about.st_rdev))
    return found


def gpu_driver() -> dict[str, int]:
    """Return the minor number of each NVIDIA GPU of which the driver's files tell, by its UUID."""
    found = {}
    names = os.listdir(GPU_DRIVER_PATH) if os.path.isdir(GPU_DRIVER_PATH) else []
    for name in sorted(names)[:MOST_GPU_NODES]:
        text = read_text(GPU_DRIVER_PATH + "/" + name + "/information") or ""
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        uuid, minor = fields.get("GPU UUID", "").strip(), fields.get("Device Minor", "").strip()
        if "?" not in uuid and minor.isdigit():  # the driver has not looked at it yet
            found[uuid] = int(minor)
    return found


def counters_of_parts() -> list[str]:
    """Return where a machine's memory nodes, processors and disks count."""
    found = []
    for folder, names in COUNTED_BELOW:
        for part in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            paths = [os.path.realpath("/".join((folder, part, name))) for name in names]
            found += [path for path in paths if os.access(path, os.F_OK)]
    return found


def shows_something(path: str) -> bool:
    """Tell whether a file has a byte to read, or a directory an entry."""
    try:
        if os.path.isdir(path):
            return bool(os.listdir(path))
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def proof() -> dict[str, object]:
    """Return everything by which the host can tell that the walls stand."""
    rooms = {path: os.statvfs(path) for path in BOUNDED_PATHS}
    seen = identity()
    seen.update(Cgroup(CGROUP_PATH).limits())
    seen.update(
        rlimits={
            name: list(resource.getrlimit(getattr(resource, "RLIMIT_" + name.upper())))
            for name in RLIMITS
        },
        mounts=mounts(),
        not_hidden=[p for p in (*HIDDEN_PATHS, *counters_of_parts()) if shows_something(p)],
        capacities={
            path: {"bytes": room.f_blocks * room.f_frsize, "inodes": room.f_files}
            for path, room in rooms.items()
        },
        interfaces=sorted(name for _, name in socket.if_nameindex()),
        devices=sorted(os.listdir("/dev")),
        gpu_nodes=gpu_nodes(),
        gpu_driver=gpu_driver(),
        namespaces={
            name: os.readlink("/proc/self/ns/" + name)
            for name in ("pid", "net", "ipc", "uts", "mnt", "cgroup")
        },
    )
    return seen


# --- the link ---------------------------------------------------------------------------------


class LinkLost(Exception):
    """The controller is gone; the box must end."""


class Link:
    """Frames to and from the host, without ever waiting while the program runs."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.queue = bytearray()

    def offer(self, kind: bytes, payload: bytes) -> None:
        """Queue a frame that may be lost: dropped when the host does not keep up."""
        if len(self.queue) < QUEUE_BYTES:
            self.queue += kind + struct.pack(">I", len(payload)) + payload
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        try:
            while self.queue:
                sent = self.connection.send(self.queue, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                del self.queue[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise LinkLost(str(error)) from error

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame that must arrive, after what is queued."""
        try:
            self.connection.settimeout(SEND_SECONDS)
            self.connection.sendall(bytes(self.queue))
            self.queue.clear()
            self.connection.sendall(kind + struct.pack(">I", len(payload)))
            self.connection.sendall(payload)
        except OSError as error:
            raise LinkLost(str(error)) from error

    def send_json(self, kind: bytes, value: object) -> None:
        self.send(kind, json.dumps(value).encode())

    def wait_for_go(self) -> tuple[Go, int | None]:
        """Return the host's instructions and the channel's file descriptor, if one came."""
        self.connection.settimeout(HANDSHAKE_SECONDS)
        space = socket.CMSG_SPACE(struct.calcsize("i"))
        piece, passed, _, _ = self.connection.recvmsg(5, space, socket.MSG_CMSG_CLOEXEC)
        header = piece + self._receive(5 - len(piece))
        length = struct.unpack(">I", header[1:])[0]
        if header[:1] != b"G" or length > GO_BYTES:
            raise LinkLost("the host sent something else than go")
        go = json.loads(self._receive(length).decode())
        self.connection.setblocking(False)  # with a timeout Python waits before it sends
        return go, (struct.unpack("i", passed[0][2][:4])[0] if passed else None)

    def expect_stop(self) -> None:
        """Read the one thing that the host may say after go; anything else is its end."""
        try:
            order = self.connection.recv(5)  # sent at once, so it comes at once
        except OSError as error:
            raise LinkLost(str(error)) from error
        if order != b"S\0\0\0\0":
            raise LinkLost("the controller is gone")

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            piece = self.connection.recv(length - len(received))
            if not piece:
                raise LinkLost("end of file")
            received += piece
        return received


# --- the log ----------------------------------------------------------------------------------


class Log:
    """Head and tail of the program's output; the middle is only counted."""

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        self.head = bytearray()
        self.tail = bytearray()
        self.total_bytes = 0

    def add(self, piece: bytes) -> None:
        self.total_bytes += len(piece)
        room = self.keep_bytes - len(self.head)
        if room > 0:
            self.head += piece[:room]
            piece = piece[room:]
        self.tail += piece
        if len(self.tail) > self.keep_bytes + 8 * PIECE_BYTES:  # trim seldom: each trim moves all
            del self.tail[: -self.keep_bytes]

    def finish(self) -> int:
        """Cut the tail to its length and return how many bytes are in neither part."""
        del self.tail[: max(0, len(self.tail) - self.keep_bytes)]
        return self.total_bytes - len(self.head) - len(self.tail)


# --- the program ------------------------------------------------------------------------------


def child_environment(go: Go) -> dict[str, str]:
    """Return exactly the named variables, and the image's own PATH."""
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    environment.update(go["environment"])
    environment["NIGHTLAB_STARTED_MONOTONIC"] = repr(time.monotonic())
    if go["channel"]:
        environment["NIGHTLAB_CHANNEL_FD"] = str(CHANNEL_FD)
    return environment


def become_program(go: Go, output_fd: int, channel_fd: int | None) -> NoReturn:
    """Turn this forked child into the program. Never returns."""
    try:
        os.setsid()
        os.nice(NICENESS)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_DUMPABLE, 1)  # or the next file belongs to root and cannot be written
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # the kernel shall pick the program before PID 1
        output = fcntl.fcntl(output_fd, fcntl.F_DUPFD_CLOEXEC, 10)
        channel = None if channel_fd is None else fcntl.fcntl(channel_fd, fcntl.F_DUPFD_CLOEXEC, 10)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if channel is not None:
            os.dup2(channel, CHANNEL_FD)
        os.chdir(go["working_directory"])
        os.execvpe(go["argv"][0], go["argv"], child_environment(go))  # noqa: S606 - its purpose
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process must not go on
        os.write(output_fd, f"nightlab: cannot start the program: {error}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


class Run:
    """One program from its start to the death of the last process of the box."""

    def __init__(self, link: Link, go: Go, channel_fd: int | None) -> None:
        self.link = link
        self.go = go
        self.log = Log(go["limits"]["log_bytes"])
        self.status: int | None = None
        self.killed_by: str | None = None
        self.forward_bytes = FORWARD_BYTES
        self.next_tick = self.next_look = 0.0
        self.tick_seconds = SHORTEST_TICK_SECONDS
        self.fullest = {path: {"bytes": 0, "inodes": 0} for path in BOUNDED_PATHS}
        self.left: dict[str, dict[str, int]] = {}
        self.wakeup, signal_end = os.pipe()
        for fd in (self.wakeup, signal_end):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(signal_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.output, output_end = os.pipe()
        os.set_blocking(self.output, False)
        with contextlib.suppress(OSError):  # the kernel may grant less: a flood then waits sooner
            fcntl.fcntl(self.output, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_BYTES)
        self.started = time.monotonic()
        self.main = os.fork()
        if self.main == 0:
            become_program(go, output_end, channel_fd)
        os.close(output_end)
        if channel_fd is not None:
            os.close(channel_fd)  # the other box must see the end when the program closes it

    def watch(self) -> None:
        """Return when the main process has ended, time is up or the host has seen enough."""
        poller = select.poll()
        for source in (self.link.connection.fileno(), self.output, self.wakeup):
            poller.register(source, select.POLLIN)
        while self.status is None and self.killed_by is None:
            left = self.started + self.go["limits"]["wall_seconds"] - time.monotonic()
            if left <= 0:
                self.killed_by = "deadline"
                return
            events = dict(poller.poll(1000 * min(left, self.tick_seconds)))
            if self.link.connection.fileno() in events:
                self.link.expect_stop()
                self.killed_by = "nightlab"
                return
            if self.output in events and not self.drain(1):
                poller.unregister(self.output)
            if self.wakeup in events:
                os.read(self.wakeup, 4096)
            self.reap(REAP_AT_ONCE)
            self.link.flush()
            self.tick()

    def drain(self, pieces: int) -> bool:
        """Read up to `pieces` of output; return False at its end."""
        for _ in range(pieces):
            try:
                piece = os.read(self.output, PIECE_BYTES)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self.log.add(piece)
            if self.forward_bytes > 0:
                self.forward_bytes -= len(piece)
                self.link.offer(b"L", piece)
        return True

    def tick(self) -> None:
        """Do what is due from time to time, however busy the log is."""
        now = time.monotonic()
        if now >= self.next_tick:
            self.next_tick = now + TICK_SECONDS
            self.forward_bytes = FORWARD_BYTES
        if now >= self.next_look:
            free_bytes = self.sample()
            soon = max(SHORTEST_TICK_SECONDS, free_bytes / FILL_BYTES_PER_SECOND)
            self.tick_seconds = min(TICK_SECONDS, soon)
            self.next_look = now + self.tick_seconds

    def sample(self) -> int:
        """Note how full the writable file systems are, and return the least that one has free.

        Files can be gone by the end, so this is done while the program runs.
        """
        least = NO_LIMIT
        for path, fullest in self.fullest.items():
            room = os.statvfs(path)
            least = min(least, room.f_bfree * room.f_frsize)
            taken = (room.f_blocks - room.f_bfree) * room.f_frsize
            now = {"bytes": taken, "inodes": room.f_files - room.f_ffree}
            fullest.update((kind, max(most, now[kind])) for kind, most in list(fullest.items()))
            self.left[path] = now
        return least

    def reap(self, most: int) -> bool:
        """Collect up to `most` dead processes; return False when none is left at all."""
        for _ in range(most):  # a program can make orphans faster than they are collected
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.main:
                self.status = status
        return True

    def end(self) -> bool:
        """Kill and collect everything that lives; return False if something would not die."""
        give_up = time.monotonic() + REAP_SECONDS
        while True:
            kill_everything()
            again = time.monotonic() + KILL_AGAIN_SECONDS  # each round visits every process
            while time.monotonic() < again:
                if not self.reap(REAP_AT_ONCE):
                    self.drain(2 * PIPE_BYTES // PIECE_BYTES)  # its last words
                    return True
                time.sleep(0.0005)
            if time.monotonic() > give_up:
                return False

    def report(self, all_dead: bool, ended: float) -> dict[str, object]:
        """Return the end of the program as the kernel tells it."""
        exit_code, number = how_it_ended(self.status)
        return {
            "exit_code": exit_code,
            "signal": number,
            "killed_by": self.killed_by,
            "wall_seconds": ended - self.started,
            "clearing_seconds": time.monotonic() - ended,
            "all_dead": all_dead,
            "counters": Cgroup(CGROUP_PATH).counters(),
            "fullest": self.fullest,
            "left": self.left,
            "log_omitted_bytes": self.log.finish(),
        }


def how_it_ended(status: int | None) -> tuple[int | None, int | None]:
    """Return the exit code or the signal of a wait status; neither while it is unknown."""
    if status is None:
        return None, None
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def kill_everything() -> None:
    """Kill every process of the box but this one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # of this pid namespace, which is the box


# --- the output -------------------------------------------------------------------------------


class Output:
    """Sends plain regular files of the output directory, and counts what it leaves out."""

    def __init__(self, link: Link, limits: dict[str, int]) -> None:
        self.link = link
        self.bytes_left = limits["output_bytes"]
        self.files_left = limits["output_files"]
        self.skipped: dict[str, int] = {}

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def directory(self, fd: int, prefix: str, depth: int) -> None:
        """Send one directory's files in the order of their names."""
        for name in sorted(os.listdir(fd)):
            if not OUTPUT_NAME.match(name):
                self.skip("name")
                continue
            try:
                self.entry(fd, name, prefix, depth)
            except OSError as error:
                self.skip("symlink" if error.errno == errno.ELOOP else "unreadable")

    def entry(self, parent: int, name: str, prefix: str, depth: int) -> None:
        """Send one entry if it is a file, enter it if it is a directory, else count it."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode >> 12
        if kind not in (0o10, 0o04):
            self.skip({0o12: "symlink", 0o01: "fifo", 0o14: "socket"}.get(kind, "device"))
            return
        fd = os.open(name, flags, dir_fd=parent)
        try:
            if kind == 0o10:
                self.file(fd, prefix + name)
            elif depth == OUTPUT_DEPTH:
                self.skip("depth")
            else:
                self.directory(fd, prefix + name + "/", depth + 1)
        finally:
            os.close(fd)

    def file(self, fd: int, name: str) -> None:
        """Send one regular file if it is within what is left."""
        about = os.fstat(fd)
        if about.st_nlink != 1:
            self.skip("hardlink")
        elif about.st_size > self.bytes_left:
            self.skip("too_large")
        elif self.files_left == 0:
            self.skip("too_many")
        else:
            self.bytes_left -= about.st_size
            self.files_left -= 1
            self.link.send_json(b"F", {"name": name, "bytes": about.st_size})
            left = about.st_size
            while left:
                piece = os.read(fd, min(left, FILE_PIECE_BYTES))
                if not piece:
                    raise LinkLost("an output file shrank")  # nobody is left who could do that
                left -= len(piece)
                self.link.send(b"D", piece)


def send_output(link: Link, go: Go) -> None:
    """Send the output files, then what was skipped."""
    output = Output(link, go["limits"])
    if go["collect"]:
        # The directory is the program's own, to lock as well.
        os.chmod(OUTPUT_PATH, 0o700)  # noqa: PTH101 - PID 1 starts without pathlib
        fd = os.open(OUTPUT_PATH, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        output.directory(fd, "", 1)
        os.close(fd)
    link.send_json(b"E", {"skipped": output.skipped})


# --- the main line ----------------------------------------------------------------------------


def supervise(link: Link) -> None:
    """Prove the walls, run the program, report."""
    link.send_json(b"H", proof())
    go, channel_fd = link.wait_for_go()
    run = Run(link, go, channel_fd)
    run.watch()
    ended = time.monotonic()
    all_dead = run.end()
    run.sample()
    link.send_json(b"X", run.report(all_dead, ended))
    link.send(b"T", bytes(run.log.head))
    link.send(b"T", bytes(run.log.tail))
    if all_dead:  # with something alive in the box its files may still change
        send_output(link, go)


def main() -> None:
    prctl(PR_SET_DUMPABLE, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # init without a handler cannot be hit from inside
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(LINK_PATH)
    try:
        supervise(Link(connection))
    except LinkLost as error:
        kill_everything()
        sys.exit(f"nightlab: link lost: {error}")


if __name__ == "__main__":
    main()
