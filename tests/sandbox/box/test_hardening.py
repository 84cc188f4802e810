"""The walls as settings: the golden file, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sandbox.box.hardening import (
    Lease,
    Settings,
    container_settings,
    engine_differences,
    seccomp_profile,
)
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import Box, Mount, RunSpec
from sandbox.gpu.request import Gpu, GpuRequest
from tests.support.boxes import box_spec

GOLDEN = Path(__file__).parents[3] / "tests/golden" / "container_settings.json"
GPUS = ("GPU-8a6e0a5e-0000-4000-8000-000000000001", "GPU-9b7f1c3d-0000-4000-8000-000000000002")
LEASE = Lease(
    run_directory=Path("/state/runs/0123456789abcdef"),
    owner="4242 1000 pid:[4026531836] 00000000-0000-0000-0000-000000000000",
    deadline_monotonic_seconds=2_000_000_000,
    user=2_000_000_007,
    counters=("/sys/devices/system/node/node0/vmstat",),
)
GPU_LEASE = LEASE.model_copy(
    update={
        "gpus": GpuRequest(
            form="hook",
            devices="nvidia",
            gpus=tuple(
                Gpu(id=uuid, index="", name="", parent=None, memory_bytes=None, nodes=())
                for uuid in GPUS
            ),
        )
    }
)


def example_spec() -> RunSpec:
    spec = box_spec("python3", "train.py")
    mounts = (
        Mount(source=Path("/state/snapshot"), target="/workspace"),
        Mount(source=Path("/state/data/train"), target="/data"),
    )
    return RunSpec.model_validate(
        spec.model_dump() | {"mounts": mounts, "devices": "nvidia", "gpus": GPUS}
    )


def readable(settings: Settings) -> str:
    """Return settings as text, the long system call filter replaced by its file's name."""
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return text.replace(json.dumps(seccomp_profile(False))[1:-1], "<sandbox/box/seccomp.json>")


def recorded(asked: Settings) -> Settings:
    """Return what an engine that obeys answers to an inspect call."""
    config = {name: asked[name] for name in ("User", "Entrypoint", "Labels", "Healthcheck")}
    config["Env"] = [*asked["Env"], "PATH=/usr/bin"]
    return copy.deepcopy({"HostConfig": asked["HostConfig"], "Config": config})


def test_the_container_settings_are_those_of_the_golden_file(
    request: pytest.FixtureRequest,
) -> None:
    settings = readable(container_settings(example_spec(), GPU_LEASE))
    if request.config.getoption("--update-golden", default=False):
        GOLDEN.write_text(settings)
    assert GOLDEN.read_text() == settings


def test_without_a_gpu_none_is_requested_and_the_image_cannot_ask_for_one() -> None:
    settings = container_settings(box_spec(), LEASE)
    assert [] == settings["HostConfig"]["DeviceRequests"]
    assert "NVIDIA_VISIBLE_DEVICES=void" in settings["Env"]


def test_a_run_is_refused_when_its_gpus_are_not_those_it_was_leased() -> None:
    with pytest.raises(SandboxError, match="other GPUs than it was leased"):
        container_settings(example_spec(), LEASE)
    with pytest.raises(SandboxError, match="other GPUs than it was leased"):
        container_settings(box_spec(), GPU_LEASE)


@pytest.mark.parametrize(
    "target", ["/", "/nightlab", "/nightlab/x", "/out", "/tmp/cache", "/dev/shm", "/proc", "/sys"]
)
def test_a_mount_may_not_cover_a_wall(target: str) -> None:
    with pytest.raises(SandboxError, match="may not cover"):
        container_settings(box_spec(mounts={Path("/state"): target}), LEASE)


def test_two_mounts_may_not_share_a_target() -> None:
    spec = box_spec(mounts={Path("/a"): "/data", Path("/b"): "/data/"})
    with pytest.raises(SandboxError, match="share one target"):
        container_settings(spec, LEASE)


def test_an_obedient_engine_shows_no_difference() -> None:
    asked = container_settings(example_spec(), GPU_LEASE)
    assert [] == engine_differences(asked, recorded(asked))


@pytest.mark.parametrize(
    "wall", sorted(container_settings(example_spec(), GPU_LEASE)["HostConfig"])
)
def test_each_wall_that_the_engine_recorded_otherwise_is_named(wall: str) -> None:
    asked = container_settings(example_spec(), GPU_LEASE)
    answer = recorded(asked)
    answer["HostConfig"][wall] = opposite(answer["HostConfig"][wall])
    assert [wall] == engine_differences(asked, answer)


def test_limits_that_an_engine_adds_are_no_difference_and_a_changed_one_is() -> None:
    asked = container_settings(example_spec(), GPU_LEASE)
    answer = recorded(asked)
    answer["HostConfig"]["Ulimits"].insert(0, {"Name": "memlock", "Soft": 1, "Hard": 1})
    assert [] == engine_differences(asked, answer)
    answer["HostConfig"]["Ulimits"][1]["Soft"] += 1
    assert ["Ulimits"] == engine_differences(asked, answer)


def opposite(value: Any) -> Any:
    """Return something else of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case list():
            return ["something else"]
        case dict():
            return {}
        case _:
            return "something else"


def test_an_image_that_brings_a_volume_or_a_health_check_is_noticed() -> None:
    asked = container_settings(example_spec(), GPU_LEASE)
    answer = recorded(asked)
    answer["Config"] |= {"Volumes": {"/data": {}}, "Healthcheck": {"Test": ["CMD", "true"]}}
    assert ["Healthcheck", "Volumes"] == engine_differences(asked, answer)


REFUSED_CALLS = (
    "io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key userfaultfd unshare"
    " setns ptrace process_vm_readv process_vm_writev pidfd_getfd bpf perf_event_open mount umount2"
    " move_mount open_tree fsopen fsmount pivot_root chroot kexec_load kexec_file_load init_module"
    " finit_module delete_module swapon swapoff reboot kcmp lookup_dcookie quotactl acct syslog"
    " open_by_handle_at name_to_handle_at settimeofday clock_settime adjtimex sethostname iopl"
    " ioperm mbind move_pages migrate_pages vhangup fanotify_init uselib process_madvise"
    " fadvise64 readahead mincore cachestat sync syncfs vmsplice remap_file_pages seccomp"
)


def allowed_calls() -> dict[str, list[dict[str, Any]]]:
    """Return each call with the rules that let it pass."""
    rules: dict[str, list[dict[str, Any]]] = {}
    for rule in json.loads(seccomp_profile(True))["syscalls"]:
        for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW" else []:
            rules.setdefault(name, []).append(rule)
    return rules


def test_only_a_training_with_loopback_has_network_sockets() -> None:
    def families(box: Box, has_loopback: bool) -> set[int]:
        spec = box_spec(loopback=has_loopback).model_copy(update={"box": box})
        options = container_settings(spec, LEASE)["HostConfig"]["SecurityOpt"]
        rules = json.loads(options[1].removeprefix("seccomp="))["syscalls"]
        sockets = [rule for rule in rules if rule["names"] == ["socket"]]
        return {r["args"][0]["value"] for r in sockets if r["action"] == "SCMP_ACT_ALLOW"}

    assert {1, 2, 10, 16} == families("train", True)
    assert {1, 16} == families("train", False)
    assert {1, 16} == families("model", True) == families("scorer", True)


def test_everything_not_named_is_refused() -> None:
    assert "SCMP_ACT_ERRNO" == json.loads(seccomp_profile(True))["defaultAction"]


@pytest.mark.parametrize("call", REFUSED_CALLS.split())
def test_no_dangerous_call_is_named(call: str) -> None:
    assert call not in allowed_calls()


@pytest.mark.parametrize(
    "call",
    [
        *("clone", "socket", "socketpair", "prlimit64", "personality", "setpriority"),
        *("setrlimit", "prctl", "setsockopt"),
        *("mmap", "memfd_create", "shmget", "preadv2", "pwritev2"),
    ],
)
def test_a_call_with_a_dangerous_half_passes_only_with_known_arguments(call: str) -> None:
    assert all(rule.get("args") for rule in allowed_calls()[call])
