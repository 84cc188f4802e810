"""Compares the walls PID 1 sees with those asked for.

What an engine was asked and what it recorded prove nothing: it may drop a limit without a word. So
PID 1 reads everything back from inside, before the program exists, and a run whose walls differ is
refused rather than run behind weaker ones.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sandbox.box.hardening import (
    LINK_DIRECTORY,
    TMP_INODES,
    Lease,
    is_within,
    least_rlimits,
    output_inodes,
    rlimits,
)
from sandbox.box.link import Count, Room
from sandbox.box.supervisor import GPU_NAMES
from sandbox.contract.errors import LimitNotEnforced
from sandbox.contract.record import Record
from sandbox.contract.run import RunSpec
from sandbox.gpu.request import SeenGpus, gpu_differences

PAGE_BYTES = 4096
CPU_TOLERANCE = 0.01
"""The kernel counts in hundred-thousandths of a CPU."""
PLAIN_DEVICES = frozenset(
    {"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm"}
    | {"stderr", "stdin", "stdout", "tty", "urandom", "zero"}
)
KERNEL_FILE_SYSTEMS = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"})
"""They hold no files of anybody's; what of them must be read-only is asked for by name."""
INERT = frozenset({"nosuid", "nodev", "noexec"})
WRITABLE_PLACES = {"/tmp": INERT - {"noexec"}, "/out": INERT, "/dev/shm": INERT}  # noqa: S108
DEVICE_PLACES = ("/dev", "/sys/fs/cgroup", "/proc")
"""Where the engine mounts what only root can write, as it does before each hidden file."""


class SeenMount(Record):
    """One mount as PID 1 sees it."""

    target: str
    type: str
    options: tuple[str, ...]


class Proof(Record):
    """What PID 1 sees of its walls before the program exists."""

    pid: int
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    capabilities: dict[str, int]
    no_new_privileges: int
    seccomp: int
    memory_bytes: Count | None
    memory_and_swap_bytes: Count | None
    pids: Count | None
    cpus: float | None
    rlimits: dict[str, tuple[int, int]]
    mounts: tuple[SeenMount, ...]
    not_hidden: tuple[str, ...]
    """Of the places with counters of the whole machine, those that show something."""
    capacities: dict[str, Room]
    interfaces: tuple[str, ...]
    devices: tuple[str, ...]
    gpu_nodes: dict[Annotated[str, Field(max_length=200)], tuple[Count, Count]]
    """Device nodes of GPUs below /dev, with their major and minor numbers."""
    gpu_driver: dict[Annotated[str, Field(max_length=200)], Count]
    """The minor number of each UUID that the NVIDIA driver's files tell."""
    namespaces: dict[str, str]


def require_walls(spec: RunSpec, lease: Lease, proof: Proof) -> None:
    """Check that PID 1 sees every wall that was asked for.

    Raises:
        LimitNotEnforced: naming each wall that is missing.
    """
    wrong = differences(spec, lease, proof)
    if wrong:
        raise LimitNotEnforced(
            "the engine did not enforce: " + "; ".join(wrong),
            "run `nightlab check` to see which walls this engine can build",
        )


def differences(spec: RunSpec, lease: Lease, proof: Proof) -> list[str]:
    """Return one line for each wall that PID 1 does not see as asked; names come first."""
    return [
        *_identity_differences(lease, proof),
        *_resource_differences(spec, proof),
        *_file_system_differences(spec, proof),
        *_mount_differences(spec, lease, proof),
        *_device_differences(spec, proof),
        *_unequal("not_hidden", (), proof.not_hidden),
        *gpu_differences(lease.gpus, SeenGpus(nodes=proof.gpu_nodes, driver=proof.gpu_driver)),
        *_namespace_differences(proof),
    ]


def _unequal(name: str, asked: object, seen: object) -> list[str]:
    return [] if asked == seen else [f"{name}: asked {asked}, PID 1 sees {seen}"]


def _identity_differences(lease: Lease, proof: Proof) -> list[str]:
    # The bounding set too: no setuid program may bring one back.
    user = lease.user
    none_left = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    return [
        *_unequal("pid", 1, proof.pid),
        *_unequal("uids", {user}, set(proof.uids)),
        *_unequal("gids", {user}, set(proof.gids)),
        *_unequal("groups", {user}, set(proof.groups) | {user}),
        *_unequal("capabilities", none_left, proof.capabilities),
        *_unequal("no_new_privileges", 1, proof.no_new_privileges),
        *_unequal("seccomp", 2, proof.seccomp),
        *_unequal("interfaces", ("lo",), proof.interfaces),
    ]


def _resource_differences(spec: RunSpec, proof: Proof) -> list[str]:
    limits = spec.limits
    # The kernel rounds a limit down to whole pages.
    memory = limits.memory_bytes // PAGE_BYTES * PAGE_BYTES
    cpus = limits.cpus
    if proof.cpus is not None and abs(proof.cpus - cpus) <= CPU_TOLERANCE * max(cpus, 0.1):
        cpus = proof.cpus
    return [
        *_unequal("memory_bytes", memory, proof.memory_bytes),
        *_unequal("memory_and_swap_bytes", memory, proof.memory_and_swap_bytes),
        *_unequal("pids", limits.pids, proof.pids),
        *_unequal("cpus", cpus, proof.cpus),
        *[d for n, b in rlimits(limits).items() for d in _unequal(n, (b, b), proof.rlimits.get(n))],
        *[
            f"{name}: the box needs {least}, the engine or its default-ulimits leave {soft}"
            for name, least in least_rlimits(limits).items()
            if 0 <= (soft := proof.rlimits.get(name, (0, 0))[0]) < least  # -1 is no bound
        ],
    ]


def _file_system_differences(spec: RunSpec, proof: Proof) -> list[str]:
    """Compare sizes; the kernel rounds bytes up to pages, and /dev/shm's files are not counted."""
    limits = spec.limits
    asked = {
        "/tmp": (limits.tmp_bytes, TMP_INODES),  # noqa: S108 - the box's own
        "/out": (limits.output_bytes, output_inodes(limits)),
        "/dev/shm": (limits.shm_bytes, None),  # noqa: S108 - the same
    }
    wrong: list[str] = []
    for place, (size, inodes) in asked.items():
        seen = proof.capacities.get(place)
        pages = -(-size // PAGE_BYTES)
        wrong += _unequal(f"{place} bytes", pages * PAGE_BYTES, seen and seen.bytes)
        if inodes is not None:
            wrong += _unequal(f"{place} inodes", inodes, seen and seen.inodes)
    return wrong


def _mount_differences(spec: RunSpec, lease: Lease, proof: Proof) -> list[str]:
    """Compare mounts: ours read-only, the writable ones bounded, nothing else writable."""
    seen = {mount.target: mount for mount in proof.mounts}
    wrong = [
        f"{target}: asked read-only, PID 1 sees it {'writable' if target in seen else 'missing'}"
        for target in ("/", "/sys", "/proc/sys", LINK_DIRECTORY, *(m.target for m in spec.mounts))
        if target not in seen or "ro" not in seen[target].options
    ]
    for place, flags in WRITABLE_PLACES.items():
        mount = seen.get(place)
        if mount is None or mount.type != "tmpfs" or not flags <= set(mount.options):
            wrong.append(f"{place}: asked tmpfs with {sorted(flags)}, PID 1 sees {mount}")
    places = (*DEVICE_PLACES, *lease.counters)
    writable = [mount.target for mount in proof.mounts if not _is_allowed(mount, places)]
    return wrong + [f"mounts: {target} is writable" for target in writable]


def _is_allowed(mount: SeenMount, engine_places: tuple[str, ...]) -> bool:
    is_engine_s = mount.type in ("tmpfs", "devtmpfs")
    return (
        "ro" in mount.options
        or mount.target in WRITABLE_PLACES
        or mount.type in KERNEL_FILE_SYSTEMS
        or (is_engine_s and any(is_within(mount.target, place) for place in engine_places))
    )


def _device_differences(spec: RunSpec, proof: Proof) -> list[str]:
    allowed = GPU_NAMES if spec.gpus else ()
    extra = [n for n in proof.devices if n not in PLAIN_DEVICES and not n.startswith(allowed)]
    return _unequal("devices", [], extra)


def _namespace_differences(proof: Proof) -> list[str]:
    """Compare with this process's own namespaces, which no box may share."""
    return [
        f"{name} namespace: PID 1 shares it with the host"
        for name, seen in proof.namespaces.items()
        if seen == str(Path(f"/proc/self/ns/{name}").readlink())
    ]
