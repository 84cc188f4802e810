"""Attempts on a box's walls, made from inside it.

Runs in the box as `python3 -I -S -c SOURCE CONTEXT`: standard library only, any Python from 3.8
on. Each attempt gets a process of its own and two seconds, so that one that hangs or dies takes no
other with it, and prints one line of JSON. Nothing here does harm where a wall is missing: files
are opened and not written, system calls get arguments that cannot succeed, no packet is sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import socket
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Context = dict[str, Any]
    Attempt = Callable[[Context], list[str]]

PROBE_SECONDS = 2.0
LOST_BYTES = 300
"""Of what an attempt saw, at most so much is told."""
REFUSALS = (errno.EPERM, errno.ENOSYS)
ROUTES = {
    "the cloud's metadata service": ("169.254.169.254", 80),
    "the internet": ("1.1.1.1", 53),
    "the engine's bridge": ("172.17.0.1", 2375),
    "a home network": ("192.168.1.1", 80),
}
HOME_SECRETS = (".docker/config.json", ".ssh", ".aws", ".config/gcloud", ".anthropic", ".netrc")
BOUNDED = ("/tmp", "/out", "/dev/shm")
SOCKET_FAMILIES = {  # name: (family, type, protocol)
    "raw packets": (17, socket.SOCK_RAW, 3),
    "raw IP": (2, socket.SOCK_RAW, 1),
    "the hypervisor (vsock)": (40, socket.SOCK_STREAM, 0),
    "the kernel's ciphers (AF_ALG)": (38, socket.SOCK_SEQPACKET, 0),
    "the firewall (netlink)": (16, socket.SOCK_RAW, 12),
    "IPsec (netlink XFRM)": (16, socket.SOCK_RAW, 6),
}
RARE_FAMILIES = {"key": 15, "rds": 21, "can": 29, "tipc": 30, "bluetooth": 31, "rxrpc": 33}
RARE_FAMILIES |= {"nfc": 39, "xdp": 44}
# family: {name: (number on x86_64, number on aarch64, arguments)}
CALLS: dict[str, dict[str, tuple[int, int, tuple[int, ...]]]] = {
    "processes": {
        "new user namespace": (272, 97, (0x10000000,)),
        "new mount namespace": (272, 97, (0x00020000,)),
        "clone into a user namespace": (56, 220, (0x10000011, 0, 0, 0, 0)),
        "clone3": (435, 435, (0, 0)),
        "setns": (308, 268, (0, 0)),
        "io_uring": (425, 425, (1, 0)),
        "kernel keyrings": (250, 219, (0, 0, 0, 0, 0)),
        "userfaultfd": (323, 282, (0xFFFF,)),
        "bpf": (321, 280, (0, 0, 0)),
        "perf_event_open": (298, 241, (0, 0, 0, 0, 0)),
        "process_vm_readv": (310, 270, (1, 0, 0, 0, 0, 0)),
        "process_vm_writev": (311, 271, (1, 0, 0, 0, 0, 0)),
        "pidfd_getfd": (438, 438, (-1, 0, 0)),
        "kcmp": (312, 272, (1, 1, 0, 0, 0)),
        "personality": (135, 92, (0x0040000,)),
        "a filter, compiled in memory of the machine's (seccomp)": (317, 277, (1, 0, 0)),
        "a filter on a socket": (54, 208, (-1, 1, 26, 0, 0)),
        "share a processor's core by rules of its own": (157, 167, (62, 1, 0, 0, 0)),
        "kernel modules": (175, 105, (0, 0, 0)),
        "kexec": (246, 104, (0, 0, 0, 0)),
        "reboot": (169, 142, (0, 0, 0, 0)),
    },
    "files": {
        "mount": (165, 40, (0, 0, 0, 0, 0)),
        "the new mount calls": (430, 430, (0, 0)),
        "pivot_root": (155, 41, (0, 0)),
        "chroot": (161, 51, (0,)),
        "open a file by its handle": (304, 265, (-1, 0, 0)),
        # What is in memory of a file that boxes share tells one what another read.
        "drop a file from memory (fadvise)": (221, 223, (-1, 0, 0, 4)),
        "have a file read ahead": (187, 213, (-1, 0, 0)),
        "ask what of a file is in memory (mincore)": (27, 232, (1, 1, 0)),
        "ask what of a file is in memory (cachestat)": (451, 451, (-1, 0, 0, 0)),
        "read only what is in memory (RWF_NOWAIT)": (327, 286, (-1, 0, 0, 0, 0, 8)),
        "read and drop from memory (RWF_DONTCACHE)": (327, 286, (-1, 0, 0, 0, 0, 128)),
        "wait for the machine's disks (syncfs)": (306, 267, (-1,)),
        "hand pages to a pipe (vmsplice)": (278, 75, (-1, 0, 0, 0)),
        "remap pages of a file": (216, 234, (0, 0, 0, 0, 0)),
    },
    "memory": {
        "swap on a file": (167, 224, (0, 0)),
        "huge pages, which no memory limit counts": (9, 222, (0, 2**21, 3, 0x40022, -1, 0)),
        "a file of huge pages": (319, 279, (0, 4)),
    },
    "time": {
        "set the clock": (227, 112, (0, 0)),
        "adjust the clock": (159, 171, (0,)),
        "a time namespace": (272, 97, (0x80,)),
    },
    "secrets": {"read the kernel's log": (103, 116, (10, 0, 0))},
}


def system_call(numbers: tuple[int, int], arguments: tuple[int, ...]) -> list[str]:
    """Make one system call; anything but a refusal means that it reached the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = numbers[1] if platform.machine() == "aarch64" else numbers[0]
    parent = os.getpid()
    ctypes.set_errno(0)
    answer = libc.syscall(number, *(ctypes.c_long(argument) for argument in arguments))
    if os.getpid() != parent:  # a clone that worked: this is its child
        os._exit(0)
    if answer == -1 and ctypes.get_errno() in REFUSALS:
        return []
    name = errno.errorcode.get(ctypes.get_errno(), "no error") if answer == -1 else "it worked"
    return ["reached the kernel: " + name]


def succeeds(what: str, attempt: Callable[..., object], *arguments: object) -> list[str]:
    """Return what gave way when the attempt raises no OSError."""
    try:
        attempt(*arguments)
    except (OSError, ValueError):
        return []
    return [what]


def read(path: str) -> str:
    """Return the beginning of a file."""
    with open(path, "rb") as file:
        return file.read(2**20).decode(errors="replace")


def read_any(*paths: str) -> str:
    """Return the beginning of the first file that can be read; nothing where none can."""
    for path in paths:
        with contextlib.suppress(OSError):
            return read(path)
    return ""


def status() -> dict[str, list[str]]:
    """Return the lines of this process's status."""
    lines = (line.split(":", 1) for line in read("/proc/self/status").splitlines())
    return {key: value.split() for key, value in lines}


def mounts() -> Iterator[tuple[str, str, set[str]]]:
    """Give target, type and options of each mount."""
    for line in read("/proc/self/mountinfo").splitlines():
        fields, kind = line.split(" - ", 1)
        yield fields.split()[4], kind.split()[0], set(fields.split()[5].split(","))


def plant(directory: str) -> None:
    """Make a file and take it away again."""
    path = os.path.join(directory, ".nightlab-check")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    os.unlink(path)


def connect(family: int, address: tuple[str, int]) -> None:
    """Connect a datagram socket: that looks for a route and sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)


# --- attempts made of their arguments; a path may hold a word of the context ------------------


def all_of(*attempts: Attempt) -> Attempt:
    return lambda context: [gave for attempt in attempts for gave in attempt(context)]


def doing(what: str, act: Callable[..., object], *arguments: object) -> Attempt:
    return lambda _: succeeds(what, act, *arguments)


def planting(*directories: str) -> Attempt:
    return lambda c: [g for d in directories for g in succeeds(d, plant, d.format(**c))]


def opening(flags: int, *paths: str) -> Attempt:
    """Open paths, of which nothing is read or written."""
    return lambda c: [p for p in paths if succeeds(p, os.open, p.format(**c), flags)]


def finding(*paths: str) -> Attempt:
    return lambda _: [path for path in paths if os.path.exists(path)]


def calling(intel: int, arm: int, arguments: tuple[int, ...]) -> Attempt:
    return lambda _: system_call((intel, arm), arguments)


# --- attempts that need words of their own ----------------------------------------------------


def rare_families(_: Context) -> list[str]:
    """Where the filter is missing, the kernel refuses with another error than "not permitted"."""
    gave = []
    for name, family in RARE_FAMILIES.items():
        try:
            socket.socket(family, socket.SOCK_RAW, 0).close()
            gave.append(name)
        except OSError as error:
            if error.errno not in REFUSALS:
                gave.append(name + ": " + errno.errorcode.get(error.errno or 0, "?"))
    return gave


def mounts_are_bounded(context: Context) -> list[str]:
    free = [t for t, kind, _ in mounts() if t not in BOUNDED and kind != "mqueue"]
    return planting(*(target for target in free if os.path.isdir(target)))(context)


def places_are_bounded(_: Context) -> list[str]:
    """A tmpfs without a bound is half of the machine's memory."""
    rooms = ((path, os.statvfs(path)) for path in BOUNDED)
    return [path for path, room in rooms if room.f_blocks * room.f_frsize > 2**26]


def places_are_inert(_: Context) -> list[str]:
    asked = {"/tmp": {"nosuid", "nodev"}}
    asked["/out"] = asked["/dev/shm"] = {"nosuid", "nodev", "noexec"}
    seen = {target: options for target, _, options in mounts()}
    return [p for p, options in asked.items() if not options <= seen.get(p, set())]


def output_is_not_executable(_: Context) -> list[str]:
    path = "/out/.nightlab-check"
    with open(path, "w") as file:
        file.write("#!/bin/true\n")
    os.chmod(path, 0o755)
    try:
        return ["/out"] if os.access(path, os.X_OK) else []
    finally:
        os.unlink(path)


def file_size(_: Context) -> list[str]:
    with open("/tmp/.nightlab-check", "wb") as file:
        try:
            return succeeds("one tebibyte, sparse", file.truncate, 2**40)
        finally:
            os.unlink("/tmp/.nightlab-check")


def kernel_files(context: Context) -> list[str]:
    """The engine hides them behind empty files and directories."""
    paths: list[str] = context["hidden_paths"]
    folders = [path for path in paths if os.path.isdir(path)]
    return [p for p in folders if os.listdir(p)] + [p for p in paths if read_any(p)]


def trace(_: Context) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    seize = 0x4206  # unlike attach it does not stop what it gets
    return ["ptrace"] if libc.ptrace(seize, 1, None, None) == 0 else []


def signal_pid_1(_: Context) -> list[str]:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(1, number)
    time.sleep(0.02)
    state = read("/proc/1/stat").rpartition(")")[2].split()[0]
    return ["PID 1 is " + state] if state in "TtZX" else []


def others(_: Context) -> list[str]:
    gave = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat("/proc/" + name).st_uid not in (os.getuid(), 0):
                gave.append(name)
    # Kernel threads have process 2 as their parent, and are seen in the machine's namespace alone.
    is_machine = read_any("/proc/2/comm").strip() == "kthreadd"
    return gave + (["PID 1 is not the box's own"] if is_machine else [])


def open_files(context: Context) -> list[str]:
    kept: list[int] = []
    with contextlib.suppress(OSError):
        for _ in range(4 * int(context["open_files"])):
            kept.append(os.open("/dev/null", os.O_RDONLY))
    return [str(len(kept))] if len(kept) > context["open_files"] else []


def swap_limit(context: Context) -> list[str]:
    swap = read_any("/sys/fs/cgroup/memory.swap.max").strip()
    if swap:
        return [] if swap == "0" else ["swap: " + swap]
    return cgroup_bound("memory_bytes", "memory/memory.memsw.limit_in_bytes")(context)


def cgroup_bound(limit: str, *files: str) -> Attempt:
    """Compare a bound in the first of the kernel's own files with the one that was asked for."""

    def attempt(context: Context) -> list[str]:
        seen = read_any(*("/sys/fs/cgroup/" + name for name in files)).strip()
        is_bounded = seen.isdigit() and int(seen) <= context[limit]
        return [] if is_bounded else [files[0] + ": " + (seen or "no such file")]

    return attempt


def lower_oom_score() -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")


def processors(context: Context) -> list[str]:
    """Read the scheduler's quota, version 2 or 1."""
    paths = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
    for names in paths:
        words = [word for name in names for word in read_any("/sys/fs/cgroup/" + name).split()]
        if len(words) == 2:
            bounded = words[0].isdigit() and int(words[0]) <= 1.01 * context["cpus"] * int(words[1])
            return [] if bounded else [" of ".join(words)]
    return ["no quota to be seen"]


def disks(_: Context) -> list[str]:
    paths = ["/dev/" + name for name in os.listdir("/dev")]
    return [path for path in paths if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)]


def make_device(mode: int, number: int) -> None:
    path = "/tmp/.nightlab-device"
    try:
        os.mknod(path, mode, number)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def ports(_: Context) -> list[str]:
    if platform.machine() != "x86_64":
        return []
    return system_call((173, 173), (0x80, 1, 1))


def not_root(_: Context) -> list[str]:
    ids = {"user": os.getresuid(), "group": (*os.getresgid(), *os.getgroups())}
    return [name + " 0" for name, numbers in ids.items() if 0 in numbers]


def capabilities(_: Context) -> list[str]:
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    seen = status()
    return [name + " " + seen[name][0] for name in sets if int(seen[name][0], 16)]


def host_name(_: Context) -> list[str]:
    name = socket.gethostname()
    gave = [] if name == "localhost" else [name]
    return gave + succeeds("sethostname", socket.sethostname, name)


def environment(context: Context) -> list[str]:
    named = {*context["variables"], "PATH", "NIGHTLAB_STARTED_MONOTONIC", "LC_CTYPE"}
    return sorted(set(os.environ) - named)


def environments(context: Context) -> list[str]:
    names = os.listdir("/proc")
    return [n for n in names if context["canary"] in read_any("/proc/" + n + "/environ")]


def inherited_sockets(_: Context) -> list[str]:
    gave = []
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            if os.readlink("/proc/self/fd/" + str(number)).startswith("socket:"):
                gave.append("descriptor " + str(number))
    return gave


PROBES: dict[tuple[str, str], Attempt] = {
    ("network", "an interface other than lo"): lambda _: [
        name for _, name in socket.if_nameindex() if name != "lo"
    ],
    ("network", "a route to the metadata service, the internet, the bridge, a home network"): (
        all_of(*(doing(name, connect, socket.AF_INET, where) for name, where in ROUTES.items()))
    ),
    ("network", "a route over IPv6"): doing(
        "the internet", connect, socket.AF_INET6, ("2606:4700:4700::1111", 53)
    ),
    ("network", "the address of a name"): doing(
        "example.com has an address", socket.getaddrinfo, "example.com", 80
    ),
    ("network", "name servers of the host"): lambda _: [
        line for line in read_any("/etc/resolv.conf").splitlines() if line.startswith("nameserver")
    ],
    ("network", "the engine's socket"): finding(
        *("/var/run/docker.sock", "/run/docker.sock"),
        *("/run/containerd/containerd.sock", "/run/podman/podman.sock"),
    ),
    ("network", "abstract sockets of the host"): lambda _: [
        line.split()[-1] for line in read("/proc/net/unix").splitlines() if "@" in line
    ],
    ("network", "a socket of a rarely used family"): rare_families,
    ("files", "write to the root file system"): planting(
        *("/", "/usr", "/usr/bin", "/etc", "/var", "/var/tmp", "/root", "/home", "/run", "/opt")
    ),
    ("files", "change a system file"): opening(
        os.O_WRONLY, "/etc/passwd", "/etc/hosts", "/etc/hostname", sys.executable
    ),
    ("files", "write into the candidate's snapshot"): all_of(
        planting("{workspace}"), opening(os.O_WRONLY, "{workspace}/train.py")
    ),
    ("files", "write to any mount that has no bound"): mounts_are_bounded,
    ("files", "a writable place of unbounded size"): places_are_bounded,
    ("files", "honour setuid or devices in a writable place"): places_are_inert,
    ("files", "run a program from the output"): output_is_not_executable,
    ("files", "a file larger than all places together"): file_size,
    ("files", "change the kernel's settings"): opening(
        os.O_WRONLY,
        *("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname"),
        *("/proc/sys/vm/overcommit_memory", "/proc/sys/fs/suid_dumpable", "/proc/sysrq-trigger"),
    ),
    ("files", "change the box's own cgroup"): all_of(
        opening(
            os.O_WRONLY,
            *("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/pids/pids.max"),
            *("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory.max"),
        ),
        planting("/sys/fs/cgroup", "/sys/fs/cgroup/memory"),
    ),
    ("files", "memory, firmware and counters of the machine in /proc and /sys"): kernel_files,
    ("processes", "trace PID 1"): trace,
    ("processes", "read memory, environment and files of PID 1"): all_of(
        opening(os.O_RDONLY, *("/proc/1/" + name for name in ("mem", "environ", "maps", "auxv"))),
        doing("/proc/1/fd", os.listdir, "/proc/1/fd"),
    ),
    ("processes", "stop or kill PID 1"): signal_pid_1,
    ("processes", "take time, files or memory priority from PID 1"): all_of(
        doing("limits", lambda: resource.prlimit(1, resource.RLIMIT_NOFILE)),
        doing("core limit", lambda: resource.prlimit(1, resource.RLIMIT_CORE, (-1, -1))),
        doing("priority", os.setpriority, os.PRIO_PROCESS, 1, 19),
        doing("affinity", lambda: os.sched_setaffinity(1, os.sched_getaffinity(0))),
        opening(os.O_WRONLY, "/proc/1/oom_score_adj"),
    ),
    ("processes", "see processes of somebody else"): others,
    ("processes", "leave a core dump, or start the host's handler of one"): all_of(
        lambda _: ["limit " + str(n) for n in resource.getrlimit(resource.RLIMIT_CORE) if n != 1],
        # At 0 a pipe in `core_pattern` is started all the same; at 1 the kernel gives up.
        doing("limit 0", resource.setrlimit, resource.RLIMIT_CORE, (0, 1)),
        doing("limit 0", resource.prlimit, 0, resource.RLIMIT_CORE, (0, 1)),
    ),
    ("processes", "open more files than allowed"): open_files,
    ("processes", "a box without a bound on processes"): cgroup_bound(
        "pids", "pids.max", "pids/pids.max"
    ),
    ("memory", "shared memory of the host (System V)"): lambda _: [
        n for n in ("shm", "sem", "msg") if read("/proc/sysvipc/" + n).count("\n") > 1
    ],
    ("memory", "a box without a memory limit"): cgroup_bound(
        "memory_bytes", "memory.max", "memory/memory.limit_in_bytes"
    ),
    ("memory", "swap beyond the memory limit"): swap_limit,
    ("memory", "network sockets, which may hold memory that nobody counts"): all_of(
        doing("AF_INET", socket.socket, socket.AF_INET, socket.SOCK_STREAM),
        doing("AF_INET6", socket.socket, socket.AF_INET6, socket.SOCK_STREAM),
    ),
    ("memory", "hide from the kernel's choice when memory is short"): doing(
        "oom_score_adj", lower_oom_score
    ),
    ("time", "real-time scheduling"): doing(
        "SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ),
    ("time", "a better priority than given"): doing(
        "nice", os.setpriority, os.PRIO_PROCESS, 0, -10
    ),
    ("time", "more processors than given"): processors,
    ("devices", "a device beyond the plain ones"): lambda context: sorted(
        set(os.listdir("/dev")) - set(context["plain_devices"])
    ),
    ("devices", "a disk"): disks,
    ("devices", "a GPU"): lambda _: [
        n for n in os.listdir("/dev") if n.startswith(("nvidia", "dri", "kfd"))
    ],
    ("devices", "memory, log, virtual machines, tunnels of the machine"): finding(
        *("/dev/mem", "/dev/port", "/dev/kmsg", "/dev/kvm"),
        *("/dev/fuse", "/dev/net/tun", "/dev/vfio", "/dev/cpu/0/msr"),
    ),
    ("devices", "make a disk of one's own"): doing(
        "mknod", make_device, stat.S_IFBLK | 0o600, os.makedev(254, 200)
    ),
    ("devices", "make the machine's memory a file"): doing(
        "mknod", make_device, stat.S_IFCHR | 0o600, os.makedev(1, 1)
    ),
    ("devices", "ports of the processor"): ports,
    ("identity", "be root, in user or group"): not_root,
    ("identity", "become root"): all_of(
        doing("setuid", lambda: os.setresuid(0, 0, 0)),
        doing("setgid", lambda: os.setresgid(0, 0, 0)),
        doing("setgroups", os.setgroups, [0]),
    ),
    ("identity", "hold a capability"): capabilities,
    ("identity", "gain privileges through a setuid program"): lambda _: (
        [] if status()["NoNewPrivs"] == ["1"] else ["no_new_privs is off"]
    ),
    ("identity", "live without a system call filter"): lambda _: (
        [] if status()["Seccomp"] == ["2"] else ["seccomp " + status()["Seccomp"][0]]
    ),
    ("identity", "the machine's name, or another"): host_name,
    ("secrets", "a variable that nobody named"): environment,
    ("secrets", "the host's canary in anybody's environment"): environments,
    ("secrets", "keys and settings in a home directory"): opening(
        os.O_RDONLY,
        *(home + "/" + name for home in ("/root", "/tmp", "") for name in HOME_SECRETS),
    ),
    ("secrets", "the host's canary file"): opening(
        os.O_RDONLY, "{canary_file}", "/proc/1/root{canary_file}", "/host{canary_file}"
    ),
    ("record", "append to the ledger"): opening(
        os.O_WRONLY | os.O_APPEND, "{canary_file}", "/proc/1/cwd{canary_file}"
    ),
    ("record", "speak to the host in PID 1's place"): all_of(
        finding("/nightlab/link.sock"), inherited_sockets
    ),
    ("record", "change PID 1's program"): all_of(
        planting("/nightlab"), opening(os.O_WRONLY, "/nightlab/supervisor.py")
    ),
    # What only an attacker needs: system calls, ways around the ordinary network.
    **{(family, n): calling(*call) for family, calls in CALLS.items() for n, call in calls.items()},
    **{
        ("network", "a socket for " + name): doing(name, socket.socket, *kind)
        for name, kind in SOCKET_FAMILIES.items()
    },
}
"""Every attempt by (family, what it tries); each returns what gave way, nothing when all held."""


def in_a_process(family: str, tried: str, attempt: Attempt, context: Context) -> bytes:
    """Make one attempt in a process of its own; return its line, or nothing if it never came."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer: dict[str, object] = {
            "family": family,
            "tried": tried,
            "error": None,
            "gave_way": [],
        }
        try:
            answer["gave_way"] = attempt(context)
        except BaseException as error:  # noqa: BLE001 - an attempt that broke was not made
            answer["error"] = repr(error)[:LOST_BYTES]
        os.write(writing, json.dumps(answer)[:4000].encode())
        os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], PROBE_SECONDS)[0]
    line = os.read(reading, 4096) if ready else b""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return line


def main(context: Context) -> None:
    """Make the attempts of the family that the context names."""
    for (family, tried), attempt in PROBES.items():
        if family == context["family"]:
            os.write(1, in_a_process(family, tried, attempt, context) + b"\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
