"""PID 1's parts that need no box: its log, the kernel's accounts, the Python it can do with."""

from __future__ import annotations

import ast
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.box import supervisor
from sandbox.box.supervisor import Cgroup, Link, Log
from tests.support.boxes import wait_until

SOURCE = Path(supervisor.__file__).read_text()
NO_LIMIT = 9223372036854771712


def planted(root: Path, files: dict[str, str]) -> Cgroup:
    """Return the accounts of a cgroup tree with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return Cgroup(str(root))


@given(st.lists(st.binary(max_size=200_000), max_size=20), st.integers(1, 100_000))
def test_head_and_tail_are_exact_and_the_middle_is_counted(
    pieces: list[bytes], keep_bytes: int
) -> None:
    log, whole = Log(keep_bytes), b"".join(pieces)
    for piece in pieces:
        log.add(piece)
    omitted_bytes = log.finish()
    rest = whole[keep_bytes:]
    assert whole[:keep_bytes] == log.head
    assert rest[-keep_bytes:] == log.tail
    assert len(rest) - len(log.tail) == omitted_bytes


def test_limits_of_cgroup_version_2_are_read(tmp_path: Path) -> None:
    cgroup = planted(
        tmp_path,
        {
            "memory.max": "1048576",
            "memory.swap.max": "0",
            "pids.max": "32",
            "cpu.max": "150000 100000",
        },
    )
    expected = {"memory_bytes": 2**20, "memory_and_swap_bytes": 2**20, "pids": 32, "cpus": 1.5}
    assert expected == cgroup.limits()


def test_limits_of_cgroup_version_1_are_read(tmp_path: Path) -> None:
    cgroup = planted(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": "1048576",
            "memory/memory.memsw.limit_in_bytes": "1048576",
            "pids/pids.max": "32",
            "cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    expected = {"memory_bytes": 2**20, "memory_and_swap_bytes": 2**20, "pids": 32, "cpus": 1.5}
    assert expected == cgroup.limits()


def test_what_is_not_bounded_is_none_in_version_2(tmp_path: Path) -> None:
    files = {"memory.max": "max", "memory.swap.max": "max", "pids.max": "max"}
    cgroup = planted(tmp_path, files | {"cpu.max": "max 100000"})
    assert {None} == set(cgroup.limits().values())


def test_what_is_not_bounded_is_none_in_version_1(tmp_path: Path) -> None:
    cgroup = planted(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": str(NO_LIMIT),
            "memory/memory.memsw.limit_in_bytes": str(NO_LIMIT),
            "pids/pids.max": "max",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert {None} == set(cgroup.limits().values())


def test_counters_of_cgroup_version_2_are_read(tmp_path: Path) -> None:
    cgroup = planted(
        tmp_path,
        {
            "memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 1",
            "memory.peak": "4096",
            "pids.events": "max 3",
            "cpu.stat": "usage_usec 2500000\nuser_usec 1",
        },
    )
    expected = {
        "oom_kills": 1,
        "oom_group_kills": 1,
        "memory_limit_hits": 2,
        "peak_memory_bytes": 4096,
        "pids_refused": 3,
        "cpu_seconds": 2.5,
    }
    assert expected == cgroup.counters()


def test_counters_of_cgroup_version_1_are_read(tmp_path: Path) -> None:
    cgroup = planted(
        tmp_path,
        {
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1",
            "memory/memory.failcnt": "7",
            "memory/memory.max_usage_in_bytes": "4096",
            "pids/pids.events": "max 3",
            "cpuacct/cpuacct.usage": "2500000000",
        },
    )
    expected = {
        "oom_kills": 1,
        "oom_group_kills": 0,
        "memory_limit_hits": 7,
        "peak_memory_bytes": 4096,
        "pids_refused": 3,
        "cpu_seconds": 2.5,
    }
    assert expected == cgroup.counters()


def test_on_the_host_version_1_has_the_same_counters_without_a_folder(tmp_path: Path) -> None:
    events = "oom_kill_disable 0\nunder_oom 0\noom_kill 2"
    files = {"memory.oom_control": events, "memory.failcnt": "0"}
    counters = planted(tmp_path, files | {"memory.max_usage_in_bytes": "4096"}).counters()
    assert (2, None, 4096) == (
        counters["oom_kills"],
        counters["memory_limit_hits"],
        counters["peak_memory_bytes"],
    )


def test_reading_files_up_to_the_limit_is_not_running_out_of_memory(tmp_path: Path) -> None:
    """The host ran out: version 2 counts the kill in the box, and no lack of its own."""
    events = "low 0\nhigh 0\nmax 31\noom 0\noom_kill 1\noom_group_kill 0"
    assert 0 == planted(tmp_path, {"memory.events": events}).counters()["memory_limit_hits"]


def hierarchy_2() -> Path | None:
    """Return where cgroup version 2 is mounted whole, with or without controllers."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        here, there = line.split(" - ", 1)
        if there.startswith("cgroup2 ") and here.split()[3] == "/":
            return Path(here.split()[4])
    return None


@pytest.mark.skipif(os.geteuid() != 0 or hierarchy_2() is None, reason="needs root and cgroup 2")
def test_a_real_cgroup_of_version_2_is_read() -> None:
    """Its CPU account is there always; memory and pids only where version 1 does not have them."""
    root = hierarchy_2()
    assert root is not None
    group = root / f"nightlab-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    burn = "import time\nwhile time.process_time() < 0.2: pass\ninput()"
    try:
        with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as process:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert wait_until(lambda: (Cgroup(str(group)).cpu_seconds() or 0) > 0.1, 20)
            process.communicate(b"\n")
        counters = Cgroup(str(group)).counters()
        with_memory = (group / "memory.events").exists()
        assert (0, 0) == (counters["oom_kills"], counters["pids_refused"])
        assert with_memory == (counters["peak_memory_bytes"] is not None)
    finally:
        group.rmdir()


def test_a_host_that_does_not_read_never_holds_pid_1_up() -> None:
    """The log is offered and dropped; only what is sent after the end may wait."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"G" + struct.pack(">I", 2) + b"{}")
        link = Link(ours)
        assert ({}, None) == link.wait_for_go()
        started = time.monotonic()
        for _ in range(200):
            link.offer(b"L", bytes(65536))
        assert time.monotonic() - started < 5


def test_it_is_python_3_8() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))


def test_it_needs_the_standard_library_only() -> None:
    nodes = ast.walk(ast.parse(SOURCE))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    assert set() == imported - set(sys.stdlib_module_names)
