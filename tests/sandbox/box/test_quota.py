"""A box's cgroup as the host has it: found, its CPU limit lifted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sandbox.box.container import CpuQuota, group_of, group_place

HYBRID = """30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
"""
UNIFIED = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
OURS_ONLY = "30 24 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "place"),
    [
        (
            "4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n",
            HYBRID,
            ("/sys/fs/cgroup/cpu,cpuacct/docker/ab", False),
        ),
        (
            "0::/system.slice/docker-ab.scope\n",
            UNIFIED,
            ("/sys/fs/cgroup/system.slice/docker-ab.scope", True),
        ),
        ("4:cpuacct:/docker/ab\n0::/docker/ab\n", HYBRID.splitlines()[0], None),
        ("4:cpu:/docker/ab\n", UNIFIED, None),
        ("0::/docker/ab\n", OURS_ONLY, None),
        ("", UNIFIED, None),
    ],
)
def test_a_cgroup_s_place_follows_from_what_the_kernel_shows(
    groups: str, mounts: str, place: tuple[str, bool] | None
) -> None:
    assert (place and (Path(place[0]), place[1])) == group_place(groups, mounts, "cpu")


def test_a_process_that_is_gone_has_no_limit_to_lift() -> None:
    quota = CpuQuota(2**22 + 1)
    assert (False, False) == (quota.is_in_reach, quota.lift())
    quota.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lift a limit through the kernel")
def test_a_limit_of_the_kernel_is_lifted_at_once() -> None:
    place = group_of(os.getpid(), "cpu")
    if place is None:
        pytest.skip("the cgroup of this process is not to be seen from here")
    group = place[0] / f"nightlab-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    child = subprocess.Popen(["sleep", "60"])
    try:
        (group / "cgroup.procs").write_text(str(child.pid))
        bound = group / ("cpu.max" if place[1] else "cpu.cfs_quota_us")
        bound.write_text("50000 100000" if place[1] else "50000")
        quota = CpuQuota(child.pid)
        assert quota.is_in_reach
        assert quota.lift()
        quota.close()
        assert ("max" if place[1] else "-1") == bound.read_text().split()[0]
    finally:
        child.kill()
        child.wait()
        group.rmdir()
