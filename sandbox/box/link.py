"""The host's end of the link to PID 1.

PID 1 is ours but lives in a hostile place, so every message is bounded and checked. The frames are
described in `supervisor`, which shares no code with the host.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sandbox.box.hardening import LINK_DIRECTORY, TMP_INODES, USER, file_size_limit, output_inodes
from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.contract.record import Record
from sandbox.contract.run import RunSpec
from sandbox.gpu.request import NO_GPUS, GpuRequest, SeenGpus, gpu_differences

Count = Annotated[int, Field(ge=0)]
Kind = TypeVar("Kind", bound=BaseModel)

MAX_FRAME_BYTES = {b"H": 2**20, b"L": 2**16, b"X": 2**16, b"T": 2**22, b"F": 2**12, b"D": 2**18}
MAX_FRAME_BYTES[b"E"] = 2**14
PAGE_BYTES = 4096
CPU_TOLERANCE = 0.01
STANDARD_STREAMS = ("console", "fd", "ptmx", "pts", "stderr", "stdin", "stdout", "tty")
PLAIN_DEVICES = frozenset(
    (*STANDARD_STREAMS, "core", "full", "mqueue", "null", "random", "shm", "urandom", "zero")
)
GPU_DEVICE_PREFIXES = ("nvidia", "dri", "kfd")
KERNEL_FILE_SYSTEMS = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"})
WRITABLE_PLACES = {
    "/tmp": frozenset({"nosuid", "nodev"}),  # noqa: S108 - the box's own, bounded
    "/out": frozenset({"nosuid", "nodev", "noexec"}),
    "/dev/shm": frozenset({"nosuid", "nodev", "noexec"}),  # noqa: S108 - the same
}
DEVICE_PLACES = ("/dev", "/sys/fs/cgroup", "/proc")
"""Where the engine mounts file systems that only root can write."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SeenMount(_Message):
    """One mount as PID 1 sees it."""

    target: str
    type: str
    options: tuple[str, ...]


class Capacity(_Message):
    """The size of a file system and what is free of it."""

    bytes: Count
    inodes: Count
    free_bytes: Count
    free_inodes: Count


class Proof(_Message):
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
    capacities: dict[str, Capacity]
    interfaces: tuple[str, ...]
    devices: tuple[str, ...]
    gpu_nodes: dict[Annotated[str, Field(max_length=200)], tuple[Count, Count]]
    """Device nodes of GPUs below /dev, with their major and minor numbers."""
    gpu_driver: dict[Annotated[str, Field(max_length=200)], Count]
    """The minor number of each UUID that the NVIDIA driver's files tell."""
    namespaces: dict[str, str]


class Counters(_Message):
    """The kernel's own counters of one box."""

    oom_kills: Count
    oom_group_kills: Count
    memory_limit_hits: Count
    peak_memory_bytes: Count | None
    pids_refused: Count
    cpu_seconds: Annotated[float, Field(ge=0)] | None


class Fullest(_Message):
    """The most that was ever seen taken of a file system."""

    bytes: Count
    inodes: Count


class Report(_Message):
    """How the program ended, as PID 1 and the kernel tell it."""

    exit_code: Annotated[int, Field(ge=0, le=255)] | None
    signal: Annotated[int, Field(ge=1, le=64)] | None
    killed_by: Literal["deadline", "nightlab"] | None
    wall_seconds: Annotated[float, Field(ge=0)]
    clearing_seconds: Annotated[float, Field(ge=0)]
    """From the program's end, or the deadline, to the last process of the box gone."""
    all_dead: bool
    counters: Counters
    fullest: dict[str, Fullest]
    log_omitted_bytes: Count


class FileHeader(_Message):
    """An output file about to come."""

    name: Annotated[str, Field(max_length=500)]
    bytes: Count


class Skipped(_Message):
    """What of the output PID 1 left out, counted by reason."""

    skipped: dict[str, Count]


class Go(Record):
    """What PID 1 is told once its walls are proven."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    wall_seconds: float
    log_bytes: int
    output_bytes: int
    output_files: int
    collect: bool
    channel: bool


class LinkEnded(SandboxError):
    """PID 1 closed the link, or died; after go that is the end of a run like any other."""


class LinkBroken(SandboxError):
    """PID 1 sent what it never sends."""


class Listener:
    """The socket in a run's directory at which exactly one PID 1 arrives."""

    def __init__(self, run_directory: Path) -> None:
        self._directory: int | None = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A socket's address holds 107 bytes; the way through /proc is short however deep we are.
        self._socket.bind(f"/proc/self/fd/{self._directory}/link.sock")
        # The box's user is not ours.
        os.chmod("link.sock", 0o666, dir_fd=self._directory)  # noqa: S103
        self._socket.listen(1)

    def accept(self, timeout_seconds: float) -> Link | None:
        """Return the link to PID 1 and listen no more, or None when nobody came in time."""
        self._socket.settimeout(timeout_seconds)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        self.close()
        return Link(connection)

    def close(self) -> None:
        """Close and remove the socket, so that nobody else can arrive; may be called again."""
        self._socket.close()
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink("link.sock", dir_fd=self._directory)
            os.close(self._directory)
            self._directory = None


class Link:
    """Frames from and to one PID 1."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def fileno(self) -> int:
        """Return the socket's file descriptor, for polling."""
        return self._connection.fileno()

    def peer_pid(self) -> int:
        """Return PID 1's process id as this host sees it; 0 when it is in no namespace of ours."""
        raw = self._connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        return int(struct.unpack("3i", raw)[0])

    def send_go(self, go: Go, channel: socket.socket | None) -> None:
        """Let the program start, handing over the channel's end if there is one.

        Raises:
            LinkEnded: PID 1 is gone.
        """
        payload = go.model_dump_json().encode()
        frame = b"G" + struct.pack(">I", len(payload)) + payload
        self._connection.settimeout(10)
        sent = 0
        try:
            if channel is not None:
                sent = socket.send_fds(self._connection, [frame], [channel.fileno()])
            self._connection.sendall(frame[sent:])
        except OSError as error:
            raise LinkEnded(f"PID 1 of the box was lost before its program: {error}") from error

    def send_stop(self) -> None:
        """Tell PID 1 to end the program; one that is gone already needs no telling."""
        with contextlib.suppress(OSError):
            self._connection.sendall(b"S" + struct.pack(">I", 0))

    def receive(self, deadline: float) -> tuple[bytes, bytes] | None:
        """Return the next frame's kind and payload, or None at the deadline.

        Args:
            deadline: a time on the monotonic clock.

        Raises:
            LinkEnded: PID 1 is gone.
            LinkBroken: the frame is unknown or too large.
        """
        while True:
            frame = self._take_frame()
            if frame is not None:
                return frame
            left = deadline - time.monotonic()
            if left <= 0 or not _readable(self._connection, left):
                return None
            try:
                piece = self._connection.recv(2**18)
            except ConnectionError as error:
                raise LinkEnded(f"PID 1 of the box was lost: {error}") from error
            if not piece:
                raise LinkEnded("PID 1 of the box was lost: end of file")
            self._received += piece

    def expect(self, kind: bytes, deadline: float) -> bytes:
        """Return the payload of the next frame, which must be of this kind.

        Raises:
            LinkEnded: PID 1 is gone.
            LinkBroken: another frame came, or none in time.
        """
        frame = self.receive(deadline)
        if frame is None:
            raise LinkBroken(f"PID 1 did not send its {kind.decode()} frame in time")
        if frame[0] != kind:
            raise LinkBroken(f"PID 1 sent frame {frame[0]!r} instead of {kind!r}")
        return frame[1]

    def shut(self) -> None:
        """End the link from another thread; PID 1 then ends its box."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the link; PID 1 then ends its box."""
        self._connection.close()

    def _take_frame(self) -> tuple[bytes, bytes] | None:
        if len(self._received) < 5:
            return None
        kind = bytes(self._received[:1])
        length = int.from_bytes(self._received[1:5], "big")
        if length > MAX_FRAME_BYTES.get(kind, -1):
            raise LinkBroken(f"PID 1 sent an impossible frame: {kind!r} of {length} bytes")
        if len(self._received) < 5 + length:
            return None
        payload = bytes(self._received[5 : 5 + length])
        del self._received[: 5 + length]
        return kind, payload


def _readable(connection: socket.socket, timeout_seconds: float) -> bool:
    poller = select.poll()  # select.select fails above file descriptor 1023
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(timeout_seconds * 1000))


def parse(kind: type[Kind], payload: bytes) -> Kind:
    """Return a message checked against its model.

    Raises:
        LinkBroken: it is something else.
    """
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        raise LinkBroken(f"PID 1 sent a wrong {kind.__name__}: {error}"[:1000]) from error


def require_walls(spec: RunSpec, proof: Proof, request: GpuRequest = NO_GPUS) -> None:
    """Check that PID 1 sees every wall that was asked for.

    Raises:
        LimitNotEnforced: naming each wall that is missing.
    """
    wrong = differences(spec, proof, request)
    if wrong:
        raise LimitNotEnforced(
            "the engine did not enforce: " + "; ".join(wrong),
            "run `nightlab check` to see which walls this engine can build",
        )


def differences(spec: RunSpec, proof: Proof, request: GpuRequest = NO_GPUS) -> list[str]:
    """Return one line for each wall that PID 1 does not see as asked; names come first."""
    return [
        *_identity_differences(proof, request),
        *_resource_differences(spec, proof),
        *_file_system_differences(spec, proof),
        *_mount_differences(spec, proof),
        *_device_differences(spec, proof),
        *gpu_differences(request, SeenGpus(nodes=proof.gpu_nodes, driver=proof.gpu_driver)),
        *_namespace_differences(proof),
    ]


def _unequal(name: str, asked: object, seen: object) -> list[str]:
    return [] if asked == seen else [f"{name}: asked {asked}, PID 1 sees {seen}"]


def _identity_differences(proof: Proof, request: GpuRequest) -> list[str]:
    none_left = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    nodes = request.gpus if request.form == "nodes" else ()
    groups = {USER} | {node.group for gpu in nodes for node in gpu.nodes}
    return [
        *_unequal("pid", 1, proof.pid),
        *_unequal("uids", {USER}, set(proof.uids)),
        *_unequal("gids", {USER}, set(proof.gids)),
        *_unequal("groups", groups, set(proof.groups) | {USER}),
        *_unequal("capabilities", none_left, proof.capabilities),
        *_unequal("no_new_privileges", 1, proof.no_new_privileges),
        *_unequal("seccomp", 2, proof.seccomp),
        *_unequal("interfaces", ("lo",), proof.interfaces),
    ]


def _resource_differences(spec: RunSpec, proof: Proof) -> list[str]:
    limits = spec.limits
    memory = limits.memory_bytes // PAGE_BYTES * PAGE_BYTES
    rlimits = {
        "core": (0, 0),
        "fsize": (file_size_limit(limits),) * 2,
        "nofile": (limits.open_files,) * 2,
    }
    cpus = limits.cpus
    if proof.cpus is not None and abs(proof.cpus - cpus) <= CPU_TOLERANCE * max(cpus, 0.1):
        cpus = proof.cpus  # the kernel counts in hundred-thousandths
    return [
        *_unequal("memory_bytes", memory, proof.memory_bytes),
        *_unequal("memory_and_swap_bytes", memory, proof.memory_and_swap_bytes),
        *_unequal("pids", limits.pids, proof.pids),
        *_unequal("cpus", cpus, proof.cpus),
        *[d for n, bound in rlimits.items() for d in _unequal(n, bound, proof.rlimits.get(n))],
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


def _mount_differences(spec: RunSpec, proof: Proof) -> list[str]:
    """Compare mounts: ours read-only, the writable ones bounded, nothing else writable."""
    seen = {mount.target: mount for mount in proof.mounts}
    wrong = [
        f"{target}: asked read-only, PID 1 sees it {'writable' if target in seen else 'missing'}"
        for target in ("/", "/sys", "/proc/sys", LINK_DIRECTORY, *(m.target for m in spec.mounts))
        if target not in seen or "ro" not in seen[target].options
    ]
    for place, flags in WRITABLE_PLACES.items():
        if (
            place not in seen
            or seen[place].type != "tmpfs"
            or not flags <= set(seen[place].options)
        ):
            wrong.append(f"{place}: asked tmpfs with {sorted(flags)}, PID 1 sees {seen.get(place)}")
    return wrong + [
        f"mounts: {mount.target} is writable" for mount in proof.mounts if not _is_allowed(mount)
    ]


def _is_allowed(mount: SeenMount) -> bool:
    if "ro" in mount.options or mount.target in WRITABLE_PLACES:
        return True
    if mount.type in KERNEL_FILE_SYSTEMS:
        return True
    within = any(mount.target == p or mount.target.startswith(p + "/") for p in DEVICE_PLACES)
    return within and mount.type in ("tmpfs", "devtmpfs")


def _device_differences(spec: RunSpec, proof: Proof) -> list[str]:
    allowed = GPU_DEVICE_PREFIXES if spec.gpus else ()
    extra = [
        name
        for name in proof.devices
        if name not in PLAIN_DEVICES and not name.startswith(tuple(allowed))
    ]
    return _unequal("devices", [], extra)


def _namespace_differences(proof: Proof) -> list[str]:
    """Compare with this process's own namespaces, which no box may share."""
    return [
        f"{name} namespace: PID 1 shares it with the host"
        for name, seen in proof.namespaces.items()
        if seen == str(Path(f"/proc/self/ns/{name}").readlink())
    ]
