"""The link: frames, their bounds, and the comparison of walls seen with walls asked."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.box.hardening import TMP_INODES, Lease, file_size_limit, output_inodes
from sandbox.box.link import ExitReport, Go, Link, LinkBroken, LinkEnded, Listener, parse
from sandbox.box.proof import Proof, differences, require_walls
from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.contract.run import RunSpec
from sandbox.gpu.request import Gpu, GpuRequest, Node
from tests.support.boxes import box_spec
from tests.support.gpu_stand_ins import GPU_0

USER = 2_000_000_007
LEASE = Lease(
    run_directory=Path("/state/run"), owner="1 1 a b", deadline_monotonic_seconds=1, user=USER
)
SPEC = box_spec(mounts={Path("/state/data"): "/data"})
GO = Go(
    argv=("true",),
    environment={},
    working_directory="/",
    limits=SPEC.limits,
    collect=False,
    channel=False,
)


@pytest.fixture
def ends() -> Iterator[tuple[Link, socket.socket]]:
    """Give the host's link and the other end, raw."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Link(ours), theirs


def frame(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack(">I", len(payload)) + payload


def soon() -> float:
    return time.monotonic() + 2


def tmpfs(target: str, *options: str) -> dict[str, Any]:
    return {"target": target, "type": "tmpfs", "options": ("rw", *options)}


def read_only(target: str) -> dict[str, Any]:
    return {"target": target, "type": "ext4", "options": ("ro",)}


def good_proof(**changes: Any) -> Proof:
    """Return what PID 1 sees when every wall of `SPEC` stands."""
    limits = SPEC.limits
    sizes = {
        "/tmp": (limits.tmp_bytes, TMP_INODES),
        "/out": (limits.output_bytes, output_inodes(limits)),
        "/dev/shm": (limits.shm_bytes, 1000),
    }
    seen: dict[str, Any] = {
        "pid": 1,
        "uids": (USER,) * 4,
        "gids": (USER,) * 4,
        "groups": (),
        "capabilities": dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0),
        "no_new_privileges": 1,
        "seccomp": 2,
        "memory_bytes": limits.memory_bytes,
        "memory_and_swap_bytes": limits.memory_bytes,
        "pids": limits.pids,
        "cpus": limits.cpus,
        "rlimits": {
            "core": (1, 1),
            "fsize": (file_size_limit(limits),) * 2,
            "nofile": (limits.open_files,) * 2,
            **dict.fromkeys(("nice", "rtprio"), (0, 0)),
            **dict.fromkeys(("cpu", "data", "nproc"), (-1, -1)),
        },
        "mounts": (
            *map(read_only, ("/", "/sys", "/proc/sys", "/nightlab", "/data")),
            tmpfs("/tmp", "nosuid", "nodev"),
            tmpfs("/out", "nosuid", "nodev", "noexec"),
            tmpfs("/dev/shm", "nosuid", "nodev", "noexec"),
            tmpfs("/dev", "nosuid"),
        ),
        "not_hidden": (),
        "capacities": {
            place: {"bytes": size, "inodes": inodes} for place, (size, inodes) in sizes.items()
        },
        "interfaces": ("lo",),
        "devices": ("null", "shm", "zero"),
        "gpu_nodes": {},
        "gpu_driver": {},
        "namespaces": {"pid": "pid:[1]"},
    }
    return Proof.model_validate(seen | changes)


def mounts_with(*others: dict[str, Any]) -> list[dict[str, Any]]:
    replaced = {mount["target"] for mount in others}
    kept = [mount.model_dump() for mount in good_proof().mounts if mount.target not in replaced]
    return [*kept, *others]


def capacities_with(place: str, **sizes: int) -> dict[str, Any]:
    capacities: dict[str, Any] = good_proof().model_dump()["capacities"]
    return capacities | {place: capacities[place] | sizes}


def capabilities_with(**sets: int) -> dict[str, int]:
    return good_proof().capabilities | sets


def rlimits_with(**bounds: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return good_proof().rlimits | bounds


def test_walls_as_asked_show_no_difference() -> None:
    assert [] == differences(SPEC, LEASE, good_proof())


def test_bounds_of_the_engine_s_own_that_leave_enough_pass() -> None:
    enough = rlimits_with(cpu=(86400, 86400), data=(2**40, -1), nproc=(4096, 8192))
    assert [] == differences(SPEC, LEASE, good_proof(rlimits=enough))


BROKEN_WALLS: list[tuple[str, dict[str, Any]]] = [
    ("pid", {"pid": 7}),
    ("uids", {"uids": (USER, 0, USER, USER)}),
    ("gids", {"gids": (0,) * 4}),
    ("groups", {"groups": (USER, 999)}),
    ("capabilities", {"capabilities": capabilities_with(CapBnd=0xA80425FB)}),
    ("capabilities", {"capabilities": capabilities_with(CapEff=1)}),
    ("capabilities", {"capabilities": {}}),
    ("no_new_privileges", {"no_new_privileges": 0}),
    ("seccomp", {"seccomp": 0}),
    ("interfaces", {"interfaces": ("eth0", "lo")}),
    ("memory_bytes", {"memory_bytes": None}),
    ("memory_bytes", {"memory_bytes": 2**30}),
    ("memory_and_swap_bytes", {"memory_and_swap_bytes": 2 * SPEC.limits.memory_bytes}),
    ("memory_and_swap_bytes", {"memory_and_swap_bytes": None}),
    ("pids", {"pids": None}),
    ("cpus", {"cpus": None}),
    ("cpus", {"cpus": 1.1}),
    ("core", {"rlimits": rlimits_with(core=(0, 0))}),
    ("fsize", {"rlimits": rlimits_with(fsize=(1, 2**62))}),
    ("nofile", {"rlimits": rlimits_with(nofile=(1024, 1048576))}),
    ("nofile", {"rlimits": {"core": (1, 1), "fsize": (file_size_limit(SPEC.limits),) * 2}}),
    ("nice", {"rlimits": rlimits_with(nice=(0, 40))}),
    ("rtprio", {"rlimits": rlimits_with(rtprio=(99, 99))}),
    ("cpu", {"rlimits": rlimits_with(cpu=(2, 60))}),
    ("data", {"rlimits": rlimits_with(data=(2**20, -1))}),
    ("nproc", {"rlimits": rlimits_with(nproc=(8, 8))}),
    ("/tmp bytes", {"capacities": capacities_with("/tmp", bytes=2**40)}),
    ("/tmp inodes", {"capacities": capacities_with("/tmp", inodes=0)}),
    ("/out bytes", {"capacities": capacities_with("/out", bytes=2**40)}),
    ("/out inodes", {"capacities": capacities_with("/out", inodes=2**20)}),
    ("/dev/shm bytes", {"capacities": capacities_with("/dev/shm", bytes=2**26)}),
    ("/", {"mounts": mounts_with(tmpfs("/"))}),
    ("/data", {"mounts": mounts_with(tmpfs("/data"))}),
    ("/nightlab", {"mounts": mounts_with(tmpfs("/nightlab"))}),
    ("/proc/sys", {"mounts": mounts_with(tmpfs("/proc/sys"))}),
    ("/out", {"mounts": mounts_with(tmpfs("/out", "nosuid", "nodev"))}),
    ("/tmp", {"mounts": mounts_with(read_only("/tmp"))}),
    ("mounts", {"mounts": mounts_with(tmpfs("/extra", "nosuid"))}),
    ("mounts", {"mounts": mounts_with(tmpfs("/data/below"))}),
    ("not_hidden", {"not_hidden": ("/proc/stat",)}),
    ("devices", {"devices": ("kvm", "null")}),
    ("devices", {"devices": ("nvidia0", "null")}),
    ("GPU", {"gpu_nodes": {"nvidia0": (195, 0)}}),
    ("GPU", {"gpu_nodes": {"nvidia0": (195, 0)}, "gpu_driver": {GPU_0: 0}}),
    ("net namespace", {"namespaces": {"net": str(Path("/proc/self/ns/net").readlink())}}),
]


@pytest.mark.parametrize(("name", "changes"), BROKEN_WALLS)
def test_each_missing_wall_is_named(name: str, changes: dict[str, Any]) -> None:
    found = differences(SPEC, LEASE, good_proof(**changes))
    assert name in [difference.split(":")[0] for difference in found]


def test_no_field_of_the_proof_goes_uncompared() -> None:
    compared = {name for _, changes in BROKEN_WALLS for name in changes}
    assert set(Proof.model_fields) == compared


def test_a_missing_wall_refuses_the_run() -> None:
    with pytest.raises(LimitNotEnforced, match="pids: asked 32, PID 1 sees None"):
        require_walls(SPEC, LEASE, good_proof(pids=None))


def test_a_leased_gpu_may_have_devices_and_no_other_gpu() -> None:
    node = Node(path="nvidia0", major=195, minor=0)
    gpu = Gpu(id=GPU_0, index="0", name="", parent=None, memory_bytes=None, nodes=(node,))
    request = GpuRequest(form="hook", devices="nvidia", gpus=(gpu,))
    spec = RunSpec.model_validate(SPEC.model_dump() | {"devices": "nvidia", "gpus": (GPU_0,)})
    seen = {"nvidia0": (195, 0), "nvidiactl": (195, 255)}
    names = ("null", "nvidia0", "nvidiactl")
    lease = LEASE.model_copy(update={"gpus": request})
    assert [] == differences(spec, lease, good_proof(devices=names, gpu_nodes=seen))
    more = seen | {"nvidia1": (195, 1)}
    assert ["GPU: PID 1 sees /dev/nvidia1, not asked for"] == differences(
        spec, lease, good_proof(devices=names, gpu_nodes=more)
    )


def test_the_kernel_may_round_cpus() -> None:
    spec = box_spec(mounts={Path("/state/data"): "/data"}, cpus=0.333333)
    assert [] == differences(spec, LEASE, good_proof(cpus=0.33333))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"L", b"D", b"H"]), st.binary(max_size=300)), max_size=5),
    st.data(),
)
def test_frames_arrive_as_sent_however_they_are_cut(
    frames: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link, sent = Link(ours), b"".join(frame(*each) for each in frames)
        received: list[tuple[bytes, bytes]] = []
        while sent:
            cut = data.draw(st.integers(1, len(sent)))
            theirs.sendall(sent[:cut])
            sent = sent[cut:]
            while (each := link.receive(time.monotonic() + 0.001)) is not None:
                received.append(each)
        while len(received) < len(frames) and (each := link.receive(soon())) is not None:
            received.append(each)  # what a busy machine did not look at in time
    assert frames == received


@pytest.mark.parametrize("kind", [b"H", b"L", b"X", b"T", b"F", b"D", b"E", b"?", b"\0"])
def test_a_frame_beyond_its_bound_breaks_the_link_before_it_arrives(
    ends: tuple[Link, socket.socket], kind: bytes
) -> None:
    link, theirs = ends
    theirs.sendall(kind + struct.pack(">I", 2**24 + 1))
    with pytest.raises(LinkBroken, match="impossible frame"):
        link.receive(soon())


def test_an_unknown_kind_of_frame_breaks_the_link(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    theirs.sendall(frame(b"Z", b""))
    with pytest.raises(LinkBroken):
        link.receive(soon())


def test_another_frame_than_expected_breaks_the_link(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    theirs.sendall(frame(b"E", b"{}"))
    with pytest.raises(LinkBroken, match="instead of"):
        link.expect(b"H", soon())


def test_silence_until_the_deadline_is_no_frame(ends: tuple[Link, socket.socket]) -> None:
    assert ends[0].receive(time.monotonic() + 0.01) is None


def test_a_closed_link_is_told_from_silence(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    theirs.close()
    with pytest.raises(LinkEnded):
        link.receive(soon())


def test_go_to_a_closed_link_says_that_it_ended(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    theirs.close()
    with pytest.raises(LinkEnded, match="before its program"):
        link.send_go(GO, None)


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"{}", b'{"exit_code": 0}', b'{"exit_code": NaN}', b"[" * 60000, b"\xff"],
)
def test_a_message_of_another_shape_breaks_the_link(payload: bytes) -> None:
    with pytest.raises(LinkBroken):
        parse(ExitReport, payload)


def test_an_unknown_field_breaks_the_link() -> None:
    payload = b'{"skipped": {}, "outcome": "ok"}'
    with pytest.raises(LinkBroken, match="outcome"):
        parse(ExitReport, payload)


def test_go_carries_the_channel(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    near, far = socket.socketpair()
    with near, far:
        link.send_go(GO.model_copy(update={"channel": True}), far)
        _, passed, _, _ = socket.recv_fds(theirs, 4096, 2)
        with socket.socket(fileno=passed[0]) as received:
            received.sendall(b"hello")
            assert b"hello" == near.recv(10)
    assert 1 == len(passed)


def test_a_box_that_is_over_before_the_host_looks_again_was_not_lost(
    ends: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, theirs = ends
    send_fds = socket.send_fds

    def send_and_sleep_through_the_run(*arguments: Any) -> int:
        sent = send_fds(*arguments)
        _, passed, _, _ = socket.recv_fds(theirs, 4096, 1)
        os.close(passed[0])
        theirs.close()
        return sent

    monkeypatch.setattr(socket, "send_fds", send_and_sleep_through_the_run)
    near, far = socket.socketpair()
    with near, far:
        link.send_go(GO.model_copy(update={"channel": True}), far)


def test_a_listener_works_however_deep_its_directory_is(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["directory"] * 15)
    deep.mkdir(parents=True)
    listener = Listener(deep)
    assert listener.accept(0.01) is None
    assert (deep / "link.sock").is_socket()
    listener.close()
    assert [] == list(deep.iterdir())


def test_the_host_learns_the_process_at_the_other_end(ends: tuple[Link, socket.socket]) -> None:
    assert (os.getpid(), os.getuid()) == ends[0].peer()


def test_exactly_one_can_arrive_at_a_listener(tmp_path: Path) -> None:
    listener = Listener(tmp_path)
    path = str(tmp_path / "link.sock")
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(path)
        link = listener.accept(1)
        assert link is not None
        with pytest.raises(FileNotFoundError):
            second.connect(path)
        link.close()
    assert [] == list(tmp_path.iterdir())


def test_a_file_system_without_sockets_is_named() -> None:
    with pytest.raises(SandboxError, match="/sys/kernel lies on a file system that has no sockets"):
        Listener(Path("/sys/kernel"))
