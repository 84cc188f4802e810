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
import re
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
ENGINE_SOCKETS = (
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
)
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


def succeeds(what: str, attempt: Callable[[], object]) -> list[str]:
    """Return what gave way when the attempt raises no OSError."""
    try:
        attempt()
    except (OSError, ValueError):
        return []
    return [what]


def status() -> dict[str, list[str]]:
    """Return the lines of this process's status."""
    with open("/proc/self/status") as file:
        return {key: value.split() for key, value in (line.split(":", 1) for line in file)}


def routes(_: Context) -> list[str]:
    """Connecting a datagram socket looks for a route and sends nothing."""
    gave: list[str] = []
    for name, address in ROUTES.items():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            gave += succeeds(name, lambda s=sock, a=address: s.connect(a))  # type: ignore[misc]
    return gave


def routes_6(_: Context) -> list[str]:
    if not socket.has_ipv6:
        return []
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        return succeeds("the internet", lambda: sock.connect(("2606:4700:4700::1111", 53)))


def name_servers(_: Context) -> list[str]:
    with contextlib.suppress(OSError), open("/etc/resolv.conf") as file:
        return [line.strip() for line in file if line.startswith("nameserver")]
    return []


def abstract_sockets(_: Context) -> list[str]:
    with open("/proc/net/unix") as file:
        return [line.split()[-1] for line in file if "@" in line]


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


def mounts() -> Iterator[tuple[str, str, set[str]]]:
    """Give target, type and options of each mount."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields, kind = line.split(" - ", 1)
            yield fields.split()[4], kind.split()[0], set(fields.split()[5].split(","))


def plant(directory: str) -> None:
    """Make a file and take it away again."""
    path = os.path.join(directory, ".nightlab-check")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    os.unlink(path)


def planted(directories: list[str]) -> list[str]:
    gave: list[str] = []
    for directory in directories:
        gave += succeeds(directory, lambda d=directory: plant(d))  # type: ignore[misc]
    return gave


def opened(paths: list[str], flags: int) -> list[str]:
    """Return the paths that open; nothing is written."""
    gave: list[str] = []
    for path in paths:
        gave += succeeds(path, lambda p=path: os.close(os.open(p, flags)))  # type: ignore[misc]
    return gave


def root_is_read_only(_: Context) -> list[str]:
    system = ["/", "/usr", "/usr/bin", "/etc", "/var", "/var/tmp", "/root", "/home", "/run", "/opt"]
    return planted(system)


def snapshot(context: Context) -> list[str]:
    place: str = context["workspace"]
    return planted([place]) + opened([os.path.join(place, "train.py")], os.O_WRONLY)


def mounts_are_bounded(_: Context) -> list[str]:
    bounded = ("/tmp", "/out", "/dev/shm")
    free = [t for t, kind, _ in mounts() if t not in bounded and kind != "mqueue"]
    return planted([target for target in free if os.path.isdir(target)])


def places_are_bounded(_: Context) -> list[str]:
    """A tmpfs without a bound is half of the machine's memory."""
    rooms = ((path, os.statvfs(path)) for path in ("/tmp", "/out", "/dev/shm"))
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
            return succeeds("one tebibyte, sparse", lambda: file.truncate(2**40))
        finally:
            os.unlink("/tmp/.nightlab-check")


def kernel_settings(_: Context) -> list[str]:
    paths = ["kernel/core_pattern", "kernel/hostname", "vm/overcommit_memory", "fs/suid_dumpable"]
    return opened(["/proc/sys/" + p for p in paths] + ["/proc/sysrq-trigger"], os.O_WRONLY)


def own_cgroup(_: Context) -> list[str]:
    names = ["memory/memory.limit_in_bytes", "pids/pids.max", "cgroup.procs", "memory.max"]
    gave = opened(["/sys/fs/cgroup/" + name for name in names], os.O_WRONLY)
    return gave + planted(["/sys/fs/cgroup", "/sys/fs/cgroup/memory"])


def kernel_files(_: Context) -> list[str]:
    """The engine hides them behind empty files and directories."""
    gave = []
    for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/latency_stats"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            gave += [path] if file.read(1) else []
    for path in ("/sys/firmware", "/proc/scsi"):
        with contextlib.suppress(OSError):
            gave += [path] if os.listdir(path) else []
    return gave


def trace(_: Context) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    seize = 0x4206  # unlike attach it does not stop what it gets
    return ["ptrace"] if libc.ptrace(seize, 1, None, None) == 0 else []


def read_pid_1(_: Context) -> list[str]:
    gave = opened(["/proc/1/" + name for name in ("mem", "environ", "maps", "auxv")], os.O_RDONLY)
    return gave + succeeds("/proc/1/fd", lambda: os.listdir("/proc/1/fd"))


def signal_pid_1(_: Context) -> list[str]:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(1, number)
    time.sleep(0.02)
    with open("/proc/1/stat") as file:
        state = file.read().rpartition(")")[2].split()[0]
    return ["PID 1 is " + state] if state in "TtZX" else []


def slow_pid_1(_: Context) -> list[str]:
    limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    gave = succeeds("limits", lambda: resource.prlimit(1, resource.RLIMIT_NOFILE) and None)
    gave += succeeds("priority", lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))
    gave += succeeds("affinity", lambda: os.sched_setaffinity(1, os.sched_getaffinity(0)))
    gave += succeeds("core limit", lambda: resource.prlimit(1, resource.RLIMIT_CORE, limit))
    return gave + opened(["/proc/1/oom_score_adj"], os.O_WRONLY)


def others(_: Context) -> list[str]:
    gave = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat("/proc/" + name).st_uid not in (os.getuid(), 0):
                gave.append(name)
    return gave + (["PID 1 is not the box's own"] if _is_machines_init() else [])


def _is_machines_init() -> bool:
    """Tell whether kernel threads are to be seen, whose parent is process 2."""
    with contextlib.suppress(OSError), open("/proc/2/comm") as file:
        return file.read().strip() == "kthreadd"
    return False


def core_dumps(_: Context) -> list[str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    return [] if (soft, hard) == (0, 0) else ["limit " + str(hard)]


def open_files(context: Context) -> list[str]:
    kept: list[int] = []
    with contextlib.suppress(OSError):
        for _ in range(4 * int(context["open_files"])):
            kept.append(os.open("/dev/null", os.O_RDONLY))
    return [str(len(kept))] if len(kept) > context["open_files"] else []


def shared_memory(_: Context) -> list[str]:
    gave = []
    for name in ("shm", "sem", "msg"):
        with open("/proc/sysvipc/" + name) as file:
            gave += [name] if len(file.readlines()) > 1 else []
    return gave


def swap_limit(context: Context) -> list[str]:
    if os.path.exists("/sys/fs/cgroup/memory.swap.max"):
        with open("/sys/fs/cgroup/memory.swap.max") as file:
            swap = file.read().strip()
        return [] if swap == "0" else ["swap: " + swap]
    return _cgroup_bound("memory_bytes", ("memory/memory.memsw.limit_in_bytes",), context)


def _cgroup_bound(limit: str, files: tuple[str, ...], context: Context) -> list[str]:
    """Compare a bound in the kernel's own files with the one that was asked for."""
    for name in files:
        with contextlib.suppress(OSError), open("/sys/fs/cgroup/" + name) as file:
            seen = file.read().strip()
            ok = seen.isdigit() and int(seen) <= context[limit]
            return [] if ok else [name + ": " + seen]
    return [files[0] + ": no such file"]


def oom_score(_: Context) -> list[str]:
    def lower() -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")

    return succeeds("oom_score_adj", lower)


def real_time(_: Context) -> list[str]:
    parameter = os.sched_param(1)
    return succeeds("SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, parameter))


def processors(context: Context) -> list[str]:
    """Read the scheduler's quota, version 2 or 1."""
    paths = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
    for names in paths:
        words: list[str] = []
        for name in names:
            with contextlib.suppress(OSError), open("/sys/fs/cgroup/" + name) as file:
                words += file.read().split()
        if len(words) == 2:
            bounded = words[0].isdigit() and int(words[0]) <= 1.01 * context["cpus"] * int(words[1])
            return [] if bounded else [" of ".join(words)]
    return ["no quota to be seen"]


PLAIN_DEVICES = {"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm"}
PLAIN_DEVICES |= {"stderr", "stdin", "stdout", "tty", "urandom", "zero"}


def disks(_: Context) -> list[str]:
    paths = ["/dev/" + name for name in os.listdir("/dev")]
    return [path for path in paths if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)]


def machine_devices(_: Context) -> list[str]:
    names = ("mem", "port", "kmsg", "kvm", "fuse", "net/tun", "vfio", "cpu/0/msr")
    return [name for name in names if os.path.exists("/dev/" + name)]


def _make_device(mode: int, number: int) -> list[str]:
    path = "/tmp/.nightlab-device"
    gave = succeeds("mknod", lambda: os.mknod(path, mode, number))
    with contextlib.suppress(OSError):
        os.unlink(path)
    return gave


def ports(_: Context) -> list[str]:
    if platform.machine() != "x86_64":
        return []
    return system_call((173, 173), (0x80, 1, 1))


def not_root(_: Context) -> list[str]:
    ids = {"user": os.getresuid(), "group": os.getresgid()}
    gave = [name + " 0" for name, numbers in ids.items() if 0 in numbers]
    return gave + (["group 0"] if 0 in os.getgroups() else [])


def become_root(_: Context) -> list[str]:
    gave = succeeds("setuid", lambda: os.setresuid(0, 0, 0))
    gave += succeeds("setgid", lambda: os.setresgid(0, 0, 0))
    return gave + succeeds("setgroups", lambda: os.setgroups([0]))


def capabilities(_: Context) -> list[str]:
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    seen = status()
    return [name + " " + seen[name][0] for name in sets if int(seen[name][0], 16)]


def host_name(_: Context) -> list[str]:
    name = socket.gethostname()
    gave = [] if name == "localhost" else [name]
    return gave + succeeds("sethostname", lambda: socket.sethostname(name))


def environment(context: Context) -> list[str]:
    named = {*context["variables"], "PATH", "NIGHTLAB_STARTED_MONOTONIC", "LC_CTYPE"}
    return sorted(set(os.environ) - named)


def environments(context: Context) -> list[str]:
    gave = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError), open("/proc/" + name + "/environ", "rb") as file:
            gave += [name] if context["canary"].encode() in file.read() else []
    return gave


def homes(_: Context) -> list[str]:
    names = (".docker/config.json", ".ssh", ".aws", ".config/gcloud", ".anthropic", ".netrc")
    return opened([home + "/" + n for home in ("/root", "/tmp", "/") for n in names], os.O_RDONLY)


def canary_file(context: Context) -> list[str]:
    path: str = context["canary_file"]
    return opened([path, "/proc/1/root" + path, "/host" + path], os.O_RDONLY)


def ledger(context: Context) -> list[str]:
    path: str = context["canary_file"]
    return opened([path, "/proc/1/cwd" + path], os.O_WRONLY | os.O_APPEND)


def link(_: Context) -> list[str]:
    gave = [p for p in ("/nightlab/link.sock",) if os.path.exists(p)]
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            if re.match(r"socket:", os.readlink("/proc/self/fd/" + str(number))):
                gave.append("descriptor " + str(number))
    return gave


PROBES: dict[tuple[str, str], Attempt] = {
    ("network", "an interface other than lo"): lambda _: [
        name for _, name in socket.if_nameindex() if name != "lo"
    ],
    (
        "network",
        "a route to the metadata service, the internet, the bridge, a home network",
    ): routes,
    ("network", "a route over IPv6"): routes_6,
    ("network", "the address of a name"): lambda _: succeeds(
        "example.com has an address", lambda: socket.getaddrinfo("example.com", 80)
    ),
    ("network", "name servers of the host"): name_servers,
    ("network", "the engine's socket"): lambda _: [
        path for path in ENGINE_SOCKETS if os.path.exists(path)
    ],
    ("network", "abstract sockets of the host"): abstract_sockets,
    ("network", "a socket of a rarely used family"): rare_families,
    ("files", "write to the root file system"): root_is_read_only,
    ("files", "change a system file"): lambda _: opened(
        ["/etc/passwd", "/etc/hosts", "/etc/hostname", sys.executable], os.O_WRONLY
    ),
    ("files", "write into the candidate's snapshot"): snapshot,
    ("files", "write to any mount that has no bound"): mounts_are_bounded,
    ("files", "a writable place of unbounded size"): places_are_bounded,
    ("files", "honour setuid or devices in a writable place"): places_are_inert,
    ("files", "run a program from the output"): output_is_not_executable,
    ("files", "a file larger than all places together"): file_size,
    ("files", "change the kernel's settings"): kernel_settings,
    ("files", "change the box's own cgroup"): own_cgroup,
    ("files", "memory and firmware of the machine in /proc and /sys"): kernel_files,
    ("processes", "trace PID 1"): trace,
    ("processes", "read memory, environment and files of PID 1"): read_pid_1,
    ("processes", "stop or kill PID 1"): signal_pid_1,
    ("processes", "take time, files or memory priority from PID 1"): slow_pid_1,
    ("processes", "see processes of somebody else"): others,
    ("processes", "leave a core dump"): core_dumps,
    ("processes", "open more files than allowed"): open_files,
    ("processes", "a box without a bound on processes"): lambda c: _cgroup_bound(
        "pids", ("pids.max", "pids/pids.max"), c
    ),
    ("memory", "shared memory of the host (System V)"): shared_memory,
    ("memory", "a box without a memory limit"): lambda c: _cgroup_bound(
        "memory_bytes", ("memory.max", "memory/memory.limit_in_bytes"), c
    ),
    ("memory", "swap beyond the memory limit"): swap_limit,
    ("memory", "hide from the kernel's choice when memory is short"): oom_score,
    ("time", "real-time scheduling"): real_time,
    ("time", "a better priority than given"): lambda _: succeeds(
        "nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -10)
    ),
    ("time", "more processors than given"): processors,
    ("devices", "a device beyond the plain ones"): lambda _: sorted(
        set(os.listdir("/dev")) - PLAIN_DEVICES
    ),
    ("devices", "a disk"): disks,
    ("devices", "a GPU"): lambda _: [
        n for n in os.listdir("/dev") if n.startswith(("nvidia", "dri", "kfd"))
    ],
    ("devices", "memory, log, virtual machines, tunnels of the machine"): machine_devices,
    ("devices", "make a disk of one's own"): lambda _: _make_device(0o060600, os.makedev(254, 200)),
    ("devices", "make the machine's memory a file"): lambda _: _make_device(
        0o020600, os.makedev(1, 1)
    ),
    ("devices", "ports of the processor"): ports,
    ("identity", "be root, in user or group"): not_root,
    ("identity", "become root"): become_root,
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
    ("secrets", "keys and settings in a home directory"): homes,
    ("secrets", "the host's canary file"): canary_file,
    ("record", "append to the ledger"): ledger,
    ("record", "speak to the host in PID 1's place"): link,
    ("record", "change PID 1's program"): lambda _: (
        planted(["/nightlab"]) + opened(["/nightlab/supervisor.py"], os.O_WRONLY)
    ),
}
"""Every attempt by (family, what it tries); each returns what gave way, nothing when all held."""


def calling(numbers: tuple[int, int], arguments: tuple[int, ...]) -> Attempt:
    return lambda _: system_call(numbers, arguments)


def opening_socket(name: str, kind: tuple[int, int, int]) -> Attempt:
    return lambda _: succeeds(name, lambda: socket.socket(*kind).close())


# What only an attacker needs: system calls, ways around the ordinary network.
for family, calls in CALLS.items():
    for name, (intel, arm, arguments) in calls.items():
        PROBES[family, name] = calling((intel, arm), arguments)
for name, kind in SOCKET_FAMILIES.items():
    PROBES["network", "a socket for " + name] = opening_socket(name, kind)


def describe(family: str, tried: str, attempt: Attempt, context: Context) -> str:
    """Make one attempt and return one line about it."""
    answer: dict[str, object] = {"family": family, "tried": tried, "error": None, "gave_way": []}
    try:
        answer["gave_way"] = attempt(context)
    except BaseException as error:  # noqa: BLE001 - an attempt that broke was not made
        answer["error"] = repr(error)[:LOST_BYTES]
    return json.dumps(answer)


def in_a_process(family: str, tried: str, attempt: Attempt, context: Context) -> bytes:
    """Make one attempt in a process of its own; return its line, or nothing if it never came."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, describe(family, tried, attempt, context)[:4000].encode())
        os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], PROBE_SECONDS)[0]
    line = os.read(reading, 4096) if ready else b""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return line


def main(context: Context) -> None:
    """Make the attempts of the families that the context names."""
    for (family, tried), attempt in PROBES.items():
        if family in context["families"]:
            line = in_a_process(family, tried, attempt, context)
            if line:
                os.write(1, line + b"\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
